"""The one table of tile sizes, warps, stages and registers, per kernel and GPU architecture.

Milliseconds are at 24 heads x 119,040 tokens x 128 in bfloat16 (HunyuanVideo, 720p) in blocks of 64
keys, NVIDIA H200, torch 2.11, Triton 3.6, 2026-11-23 and 24, if nothing else is said; cuDNN dense
took 279 in the same process.
"""

import threading
from dataclasses import dataclass
from functools import cache

import torch

# compute capability, or an AMD architecture such as "gfx942"
Card = tuple[int, int] | str

# what a kernel may be compiled for anywhere: the oldest tensor cores served
ANY_CARD = (8, 0)
HOPPER = (9, 0)

# largest shared memory of one program, bytes
SHARED_MEMORY = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (11, 0): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}


@dataclass(frozen=True)
class Tile:
    """What one program of a Triton kernel holds on chip.

    Args:
        tile_q, tile_k: queries or other rows, and keys or other columns; attention takes two tiles
            of keys a turn.
        num_stages: turns whose loads are under way at once; 3 is Triton's own default.
        maxnreg: registers a thread, so that more programs share a multiprocessor.
    """

    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes besides its arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # AMD's compiler knows no such option
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


@dataclass(frozen=True)
class HopperTile:
    """The partitions of one Gluon program: consumers of 64 query rows each, and one producer warp.

    Args:
        stages: pairs of 64-key tiles in its ring.
        consumer_registers, producer_registers: a thread, of the warps that are added to the first
            four, which keep what is left over.
        maxnreg: registers a thread for all of it, so that two programs share a multiprocessor.
    """

    consumers: int
    stages: int
    consumer_registers: int
    producer_registers: int = 24
    maxnreg: int | None = None

    @property
    def tile_q(self) -> int:
        """Query rows."""
        return 64 * self.consumers

    @property
    def options(self) -> dict[str, int | None]:
        """What a launch takes besides its arguments; the four warps are the first consumer's."""
        return {
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "CONSUMER_REGISTERS": self.consumer_registers,
            "PRODUCER_REGISTERS": self.producer_registers,
            "num_warps": 4,
            "maxnreg": self.maxnreg,
        }


# ---- Gluon kernels, on Hopper


# sparse at density 0.2, 128 rows: 6 stages 57.5 and 55.1 (two runs), 5 stages 59.5, 4 stages 56.8 and
# 59.1; with a key bias on the last 200 keys 59.8 (57.1 and 60.1 without), on all 81.3
# sparse at density 0.2, 64 rows: 3 stages 68.6 and 68.3, 2 stages 73.4
# dense: 289.8 and 300.1; with masses 297.9; 64 rows 327.7
# registers: 240 is the most that two consumers and the first four warps can have beside the producer
# (64K a multiprocessor); one consumer has the first four warps, all of 128
def hopper_attention(block_q: int) -> HopperTile:
    """The tile of attention, and of quantised attention, for query blocks of 64 or 128."""
    if block_q == 64:
        return HopperTile(1, stages=3, consumer_registers=0, maxnreg=128)
    return HopperTile(2, stages=6, consumer_registers=240)


# quantised attention with INT8 scores, 1.28 for quantising not included: sparse at 0.2 39.0 to 39.2,
# with a tail 44.7, with a key bias on the last 200 keys 39.7, 64 rows 43.0 to 44.6, dense 196.5
# with P V summed in float32 48.2, 54.4 (64 rows) and 232.8; two consumers that exponentiate by turns
# 41.8, 45.6 and 196.5; one loop for all tiles, which looked for a bias in every turn and always
# rescaled the sums, 39.5, with a tail 49.7, with a bias 45.3, 64 rows 42.2
hopper_quantised_attention = hopper_attention


# bfloat16: 3 consumers with two tiles in turn 146.5; 4 with one tile 144.1 and 143.9, but then
# Triton 3.9 spills; 2 with two pairs of tiles 162.3 and 159.9. A quarter of the exponentials as a
# polynomial: 153.2 instead of 144.1
# INT8, which leaves more registers: 4 consumers 114.8, 3 of them 120.2; every eighth exponential as a
# polynomial 116.1. A key bias takes those registers back
# the first consumer takes what registers are left over from the others and the producer
def hopper_block_masses(int8: bool, has_bias: bool) -> HopperTile:
    """The tile of block masses."""
    if int8 and not has_bias:
        return HopperTile(4, stages=4, consumer_registers=112)
    return HopperTile(3, stages=4, consumer_registers=160)


# ---- Triton kernels, on every card


# with wgmma off (DISABLE_MMA_V3, as on every card but Hopper's), 2026-11-30; torch's flash attention took
# 510 in the same process. Dense: 128 rows, pairs of 32 keys, 4 warps, 2 stages 500, 3 stages 506, pairs of 16 keys
# 528. Sparse at density 0.2: 102 (100; 113), with a tail 118, of which means in pairs of 32 keys 5 more; 64 rows,
# 2 warps, pairs of 16 keys 114, of 32 112, with 4 warps 154, with a tail 129. Dense with masses 528 (522; 616).
# As they are now, with flash at 499: 488, 100, 110, 115, 126 and 522; heads of 64, dense, with flash at 277: 279, 3
# stages 281, 168 registers 320, 8 warps 505, 64 rows 287 (8 heads, x3)
# Masked keys after the main loop, by tiles as large, took registers from it: 526, 114, 121 and 598
# two stages leave room for two programs in the 100 KB of a multiprocessor of RTX cards, or pairs of 32 keys
# with 128 rows for one. With no more than that on the H200, 64 rows with pairs of 16 keys 105, of 32 136; 128 rows
# with pairs of 16 keys, dense and at 0.2, 519 and 109, of 32 490 and 98, with 3 stages 629 and 132 (8 heads, x3)
def attention(card: Card, block_q: int, head_dim: int, tail: bool = False) -> Tile:
    """The tile of attention over pairs of key tiles, or of its `tail`; in the table a warp has 32 rows."""
    if isinstance(card, str):
        return _amd_attention(card, block_q)
    if not tail and head_dim == 128 and (tile := _tuned_for(card, f"attention {block_q}")):
        return tile
    keys = 32 if head_dim == 64 or (block_q == 128 and not tail) else 16
    # a third spills 296 bytes a thread of the search on A100
    stages = 2 if (block_q, keys, head_dim) == (128, 32, 128) else _stages(card)
    return Tile(block_q, keys, block_q // 32, stages)


def _stages(card: Card) -> int:
    room = 0 if isinstance(card, str) else SHARED_MEMORY.get(card, 0)
    return 3 if room > SHARED_MEMORY[8, 9] else 2


# AMD cards were compiled for only: gfx942 takes the tiles of other cards without a spill; on gfx1100
# those spill up to 1,374 registers, these at most 107, and that in the search with blocks of 128 alone
def _amd_attention(card: str, block_q: int) -> Tile:
    if card.startswith("gfx9"):
        return Tile(block_q, 16, block_q // 32)
    return Tile(block_q, 16, 8 if block_q == 64 else 16, 1)


# with wgmma off, 2026-11-30, quantising (1.7) included, 168 registers: dense 355, density 0.2 73, with a tail 82
# (4 stages 357; 2 stages 399, 82 and 94; as many registers as it takes 388, 87 and 99); 128 rows, 4 warps 529, 115 and
# 116, 2 stages 434. Blocks of 128 are two halves. What is masked, after the main loop and by tiles as large, took
# registers from it: dense 386, 76 and 93. comfy-kitchen's int8_attention takes 365. As they are now: 356, 73.6 and
# 81.2. Heads of 64, dense: 128 registers, 2 stages 211, 3 stages 222, 168 registers 226; 128 rows 228 (8 heads, x3)
def quantised_attention(card: Card, head_dim: int) -> Tile:
    """The tile of attention in eight bits."""
    if head_dim == 64:
        return Tile(64, 64, 4, 2, maxnreg=128)
    return _tuned_for(card, "quantised_attention") or Tile(64, 64, 4, 3, maxnreg=168)


# with wgmma off, bfloat16: 256 rows, 4 warps, 3 stages 249 to 264, 128 rows with 2 stages and 128 registers 251; with
# no more than 100 KB of a multiprocessor, as on RTX cards, 323 and 396 (8 heads, x3). INT8: 256 rows, 3 stages 149,
# 2 stages 170; 128 rows, 2 warps, 3 stages 156, with 4 warps and 128 registers 176, 2 stages 197
def block_masses(card: Card, int8: bool, has_bias: bool) -> Tile:
    """The tile of block masses."""
    if isinstance(card, str):
        return Tile(128, 64, 8 if card.startswith("gfx9") else 16, 1)
    if tile := _tuned_for(card, "block_masses"):
        return tile
    # a bias takes registers
    if has_bias or (_stages(card) == 3 and not int8):
        return Tile(128, 64, 4, 2, maxnreg=128)
    return Tile(256, 64, 4, 3)


# 64 rows: 5.6; others not measured. A warp owns sixteen rows, the height of a matrix instruction
def pooled_masses(block_q: int) -> Tile:
    """The tile of pooled masses."""
    return Tile(block_q, 64, block_q // 16, 2)


# bits of a mask per turn of one warp: 256 took 0.18, 512 0.16, 4 warps with 1,024 0.23, 8 with 2,048
# 0.28 (1,860 x 1,860 blocks a head, density 0.2)
UNPACK_MASK = Tile(1, 512, 1)

# a block of tokens, whole: 0.37 for one of q, k and v, four fifths of the card's bandwidth
PERMUTE = Tile(64, 0, 4)

# blocks of queries and keys, and how many tiles of keys a program takes. Not measured apart: it reads two
# maps and writes one, 1.0 GB of 4.8 TB/s; three products of 64 x 32 x 128 a tile hide behind that
TAIL_ERROR = Tile(64, 32, 8, 2)
TAIL_ERROR_TURNS = 16
# the deviation of one block of values. Not measured apart: it reads the values once
DEVIATION = Tile(64, 0, 4)

# scores that one warp ranks, the least and the most that a program holds: a binary for each power of 2.
# A whole selection of 24 x 1,860 x 1,860 scores took 0.89, with twice as many a warp 0.96
SCORES_PER_WARP = 512
SCORES_LEAST, SCORES_MOST = 1024, 8192


def row_wise_top_k(num_k: int) -> Tile:
    """The tile of row-wise top-k: one row of scores."""
    scores = max(SCORES_LEAST, 1 << (num_k - 1).bit_length())
    return Tile(1, scores, scores // SCORES_PER_WARP)


# tokens of a tile. Not measured apart: the order of 24 x 118,800 tokens takes 7.9 on the device, features
# and all. It reads queries and keys once, and writes a third as much
def features(card: Card, triton: tuple[int, int]) -> Tile:
    """The tile of features."""
    # Triton 3.8 spills 328 bytes a thread with 4 warps where it multiplies by mma.sync, 80 with 8
    return Tile(64, 0, 8 if triton == (3, 8) and card[0] in (8, 12) else 4)


# the PCA tree: samples of a node by features; tokens that are measured along its direction or moved.
# Not measured apart from the order (`features`)
PCA_DIRECTION = Tile(128, 64, 4)
PCA_ALONG = Tile(128, 64, 4)
PCA_TAKE = Tile(128, 1, 4)
# tokens that one program sorts; larger nodes are left to torch. More do not fit a program's registers
PCA_SORTED = 2048


def pca_sort(tokens: int) -> Tile:
    """The tile that sorts a node: eight tokens a lane."""
    size = 1 << (tokens - 1).bit_length()
    return Tile(1, size, max(1, size // 256))


# quantising, 1.28 together: rows that a program adds up side by side, of SUM_SPLITS programs a head;
# tiles of 64 rows that a program rotates in ROTATE_TURNS turns, by a product of 64 x D x D; tiles of
# values. Not measured apart
SUMS = Tile(16, 0, 4)
SUM_SPLITS = 64
MEANS = Tile(1, 0, 4)
ROTATE_TURNS = 8


def rotate(card: Card, triton: tuple[int, int]) -> Tile:
    """The tile of rotating."""
    # Triton before 3.8 cannot compile what follows its product for tcgen05, which takes 4 warps or more
    return Tile(64, 0, 2 if card[0] in (10, 11) and triton < (3, 8) else 4, 2)


# all of it for INT8 with one warp, whose column sums wait for no other, 1.94, with two 2.20, four 2.84
VALUES = Tile(64, 0, 1)


# ---- tiles that were measured on the card at hand (`tuned.py`)

_tuned: dict[Card, tuple[dict[str, Tile], str]] = {}


def use(card: Card, found: dict[str, Tile], said: str) -> None:
    """Let tiles take the place of the table's on a card.

    Args:
        found: by `tuned.candidates`' names. said: what is told of them.
    """
    _tuned[card] = found, said


def in_use(card: Card) -> tuple[dict[str, Tile], str]:
    """What `use` was told of a card."""
    return _tuned.get(card, ({}, ""))


def _tuned_for(card: Card, name: str) -> Tile | None:
    return in_use(card)[0].get(name)


# ---- cards

# kinds of card on which the tiles were measured; for the others they were chosen on one of these
MEASURED = (HOPPER,)


_here = threading.local()


def stand_for(card: Card) -> None:
    """Take every device for a card from now on, in a thread that only compiles or loads."""
    _here.stands_for = card


def card_of(device: torch.device | None = None) -> Card:
    """A card, by default the current one; any card where there is none."""
    stands_for = getattr(_here, "stands_for", None)
    if stands_for is not None:
        return stands_for
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        # interpreted
        return ANY_CARD
    return _card(torch.cuda.current_device() if device is None else device)


@cache
def _card(device: torch.device | int) -> Card:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName
    return torch.cuda.get_device_capability(device)
