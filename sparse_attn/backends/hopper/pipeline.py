"""What the Gluon kernels for Hopper share: queries, keys and values on their way through shared memory.

A producer warp streams pairs of 64-token tiles with TMA; consumer warpgroups own 64 query rows each.
The tiles of keys that a program reads come in pairs. The last pair goes first: it alone can be ragged
or odd, so only the first turn masks. The means of a pooled tail come last.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton.operands import Operands
from ..triton.softmax import LOG2_E

DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}

# tokens of one tile, and query rows of one consumer
TILE = gl.constexpr(64)
# rows of blocks at either end of a head that are begun before the others: 512 tokens of text or more
END = gl.constexpr(8)
# keeps a hopelessly stale LSE from turning a whole row into inf / inf
MAX_MASS = gl.constexpr(1e30)
# tiles whose masses are added up over the rows at once: that takes a barrier of the warpgroup
STRIP = gl.constexpr(8)
# renamed after Triton 3.6
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# public after Triton 3.6
_aggregate = getattr(gluon, "aggregate", None) or tl.core._aggregate


def aggregate(cls):
    """A class whose values kernels hand around; its constructor takes the fields in their order."""
    fields = tuple(cls.__annotations__)

    @gluon.constexpr_function
    def __init__(self, *values):
        for field, value in zip(fields, values, strict=True):
            known = not isinstance(value, tl.core.base_value)
            setattr(self, field, gl.constexpr(value) if known else value)

    cls.__init__ = __init__
    return _aggregate(cls)


@aggregate
class Work:
    """The query rows of one program, and the tiles of keys that they read.

    A pair has two tiles; `num_pairs` of them are of keys, at least one, which an empty list leaves
    past the end, and `num_pooled_pairs` of means.
    """

    i_b: gl.tensor
    i_h: gl.tensor
    i_bh: gl.tensor
    i_q: gl.tensor
    first_q: gl.tensor
    Lk: gl.tensor
    p_list: gl.tensor | gl.constexpr
    num_tiles: gl.tensor
    num_pairs: gl.tensor
    num_pooled_pairs: gl.tensor | gl.constexpr
    BLOCK_K: gl.constexpr
    LISTED: gl.constexpr

    @gluon.jit
    def tile_first(self, t):
        """First key of the t-th tile; Lk or more for one past the end."""
        first = t * TILE
        if self.LISTED:
            PARTS: gl.constexpr = self.BLOCK_K // TILE
            listed = t < self.num_tiles
            block = gl.load(self.p_list + t // PARTS, mask=listed, other=0)
            first = gl.where(listed, block * self.BLOCK_K + (t % PARTS) * TILE, self.Lk)
        return first

    @gluon.jit
    def pair(self, n):
        """First keys of both tiles of the n-th pair."""
        return self.tile_first(2 * n), self.tile_first(2 * n + 1)


@gluon.jit
def _place(pid, Nq):
    """Head and row of a program that walks lists: of every head both ends first, then the others.

    Rows of text lie at an end and list every block: begun last, one would outlast all others.
    """
    num_ends = gl.minimum(2 * END, Nq)
    i_inner = pid - gl.num_programs(0) // Nq * num_ends
    num_inner = gl.maximum(Nq - num_ends, 1)
    i_bh = gl.where(i_inner < 0, pid // num_ends, i_inner // num_inner)
    i_q = gl.where(i_inner < 0, pid % num_ends, i_inner % num_inner + num_ends)
    return i_bh, (i_q + Nq - num_ends // 2) % Nq


@gluon.jit
def make_work(
    Nq, H, Lk, kv_indices, kv_num_blocks, num_pooled, ROWS: gl.constexpr, BLOCK_K: gl.constexpr
):  # fmt: skip
    """The work of this program, which owns ROWS query rows: of all keys where there are no lists."""
    LISTED: gl.constexpr = kv_indices is not None
    pid = gl.program_id(0)
    p_list = kv_indices
    num_tiles = gl.cdiv(Lk, TILE)
    i_bh = pid // Nq
    i_q = pid % Nq
    if LISTED:
        i_bh, i_q = _place(pid, Nq)
        row = i_bh.to(gl.int64) * Nq + i_q
        p_list += row * gl.cdiv(Lk, BLOCK_K)
        num_tiles = gl.load(kv_num_blocks + row) * (BLOCK_K // TILE)
    return Work(
        i_bh // H, i_bh % H, i_bh, i_q, i_q * ROWS, Lk, p_list, num_tiles,
        gl.maximum(gl.cdiv(num_tiles, 2), 1), gl.cdiv(num_pooled, 2 * TILE), BLOCK_K, LISTED,
    )  # fmt: skip


@aggregate
class Queries:
    """The rows of every consumer, each with a barrier that says they are there."""

    tiles: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    CONSUMERS: gl.constexpr

    @gluon.jit
    def load(self, desc, work):
        """Load all of them."""
        for i in gl.static_range(self.CONSUMERS):
            bar = self.ready.index(i)
            mbarrier.expect(bar, desc.block_type.nbytes)
            _tma_load(
                desc, [work.i_b, work.i_h, work.first_q + i * TILE, 0], bar, self.tiles.index(i)
            )

    @gluon.jit
    def wait(self, i, D: gl.constexpr):
        """[64, D] of consumer i, in shared memory."""
        mbarrier.wait(self.ready.index(i), 0)
        return self.tiles.index(i).reshape([TILE, D])


@gluon.jit
def make_queries(desc, D: gl.constexpr, CONSUMERS: gl.constexpr):
    tiles = gl.allocate_shared_memory(desc.dtype, [CONSUMERS, 1, 1, TILE, D], desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(ready.index(i), count=1)
    return Queries(tiles, ready, CONSUMERS)


@aggregate
class Ring:
    """STAGES pairs of tiles, filled by the producer and freed by all consumers, turn by turn."""

    tiles: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def load(self, desc, turn, work, first0, first1):
        """Load the tiles that start at rows first0 and first1, once this turn's stage is free."""
        stage = turn % self.STAGES
        mbarrier.wait(self.free.index(stage), ((turn // self.STAGES) & 1) ^ 1)
        bar = self.ready.index(stage)
        mbarrier.expect(bar, 2 * desc.block_type.nbytes)
        _tma_load(desc, [work.i_b, work.i_h, first0, 0], bar, self.tiles.index(2 * stage))
        _tma_load(desc, [work.i_b, work.i_h, first1, 0], bar, self.tiles.index(2 * stage + 1))

    @gluon.jit
    def wait(self, turn, needed=True):
        """Wait for the tiles of this turn."""
        mbarrier.wait(
            self.ready.index(turn % self.STAGES), (turn // self.STAGES) & 1, pred=needed
        )  # fmt: skip

    @gluon.jit
    def release(self, turn):
        """Let the producer have this turn's stage."""
        mbarrier.arrive(self.free.index(turn % self.STAGES))

    @gluon.jit
    def tile(self, turn, i: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
        """[ROWS, COLS] tile i of this turn."""
        return self.tiles.index(2 * (turn % self.STAGES) + i).reshape([ROWS, COLS])


@gluon.jit
def make_ring(
    desc, ROWS: gl.constexpr, COLS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """A ring of [ROWS, COLS] tiles that `desc` loads."""
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(desc.dtype, [2 * STAGES, 1, 1, ROWS, COLS], desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=CONSUMERS)
    return Ring(tiles, ready, free, STAGES)


@gluon.jit
def start_scores(b_q, keys, S: gl.constexpr):
    """Start the product of the queries with one tile of keys [64, D]."""
    ACC: gl.constexpr = gl.int32 if b_q.dtype == gl.int8 else gl.float32
    b_zero = gl.zeros([TILE, TILE], ACC, S)
    return warpgroup_mma(b_q, keys.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def add_bias(b_s, p_bias, first, o_k, L, scale_log2):
    """Unscaled scores of the tile at `first` with their bias; keys past L get -inf.

    `scale_log2` makes scores units of log2: one number, or one a row, [64, 1].
    """
    o_k += first
    b_bias = gl.load(p_bias + o_k, mask=o_k < L, other=float("-inf"))
    return b_s + b_bias[None, :] * (LOG2_E / scale_log2)


@gluon.jit
def is_biased(p_flags, first0, first1, L):
    """Whether a key of these two tiles has a bias; the second may lie past the end."""
    flag = gl.load(p_flags + first1 // TILE, mask=first1 < L, other=1)
    return gl.load(p_flags + first0 // TILE) | flag


@gluon.jit
def load_words(p_words, pair, num_words):
    """The bits of a row of the mask for the two tiles of a pair of means, two words each."""
    p_words += 4 * pair
    m_tile1 = 4 * pair + 2 < num_words
    word0 = gl.load(p_words)
    word1 = gl.load(p_words + 1)
    word2 = gl.load(p_words + 2, mask=m_tile1, other=-1)
    word3 = gl.load(p_words + 3, mask=m_tile1, other=-1)
    return word0, word1, word2, word3


@gluon.constexpr_function
def log2_block(block_k):
    """log2 of the keys that the mean of a whole block stands for."""
    return float(block_k.bit_length() - 1)


@gluon.jit
def is_listed(word0, word1, o_k):
    """Which of 64 means stand for listed blocks, as the bits of two words say."""
    word = gl.where(o_k < 32, word0, word1)
    return (word >> (o_k % 32)) & 1 == 1


@gluon.jit
def store_masses(p_masses, b_mass, first, begin, end):
    """Store those of the [STRIP] masses of tiles from `first` on that belong to tiles `begin` to
    `end` - 1.
    """
    b_mass = gl.where(b_mass > MAX_MASS, MAX_MASS, b_mass)
    o_t = first + gl.arange(0, STRIP, layout=b_mass.type.layout)
    gl.store(p_masses + o_t, b_mass, mask=(o_t >= begin) & (o_t < end))


@gluon.jit
def store_output(x, work, first_q, b_out, D: gl.constexpr):
    """Store the rows [64, D] from `first_q` on, each where `x.order`, if there is one, has it from."""
    o_row = first_q + gl.arange(0, TILE, layout=gl.SliceLayout(1, b_out.type.layout))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, b_out.type.layout))
    o_to = o_row
    if x.order is not None:
        p_order = x.order + work.i_b.to(gl.int64) * x.stride_ob
        p_order += work.i_h.to(gl.int64) * x.stride_oh
        o_to = gl.load(p_order + o_row, mask=o_row < x.Lq, other=0)
    row = (work.i_b.to(gl.int64) * x.Lq + o_to) * x.H + work.i_h
    p_out = x.out + row[:, None] * D + o_d[None, :]
    gl.store(p_out, b_out.to(x.out.dtype.element_ty), mask=(o_row < x.Lq)[:, None])


def source(x: torch.Tensor | None, rows: int = TILE.value) -> TensorDescriptor | None:
    """x [B, H, L, D] as a TMA descriptor of a tile of `rows` tokens of one head; None stays None."""
    if x is None:
        return None
    # a dimension of one entry may carry any stride; TMA wants a multiple of 16 bytes
    strides = [s if n > 1 else x.shape[-1] for s, n in zip(x.stride(), x.shape, strict=True)]
    strides[-1] = 1
    block = [1, 1, rows, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), strides, block, layout)


def bias_flags(key_bias: torch.Tensor | None) -> torch.Tensor | None:
    """[B, ceil(Lk / 64)] bool: tiles of which some key has a bias."""
    return None if key_bias is None else _any_of_tile(key_bias != 0, False)


def uneven_flags(x: Operands, block_k: int) -> torch.Tensor | None:
    """[B, ceil(N / 64)] bool: tiles of means of which some stand for other than `block_k` keys.

    Without a key bias only the last can; None then.
    """
    if x.pooled is None or x.key_bias is None:
        return None
    flags = _any_of_tile(x.pooled.log_sizes == float("-inf"), True)
    if x.k.shape[2] % block_k:
        # the last block is short
        flags[:, -1] = True
    return flags


def _any_of_tile(x: torch.Tensor, past_the_end: bool) -> torch.Tensor:
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE.value), value=past_the_end)
    return x.unflatten(-1, (-1, TILE.value)).any(-1)


def mask_words(x: Operands) -> torch.Tensor | None:
    """The bits of a mask beside means as int32, two words for every 64 blocks; those past N are set."""
    if x.pooled is None:
        return None
    words = torch.nn.functional.pad(x.mask.bits, (0, -x.mask.bits.shape[-1] % 8), value=255)
    if x.num_pooled % 8:
        words[..., x.num_pooled // 8] |= 256 - (1 << x.num_pooled % 8)
    # little-endian, so that bit 0 is the first block
    return words.view(torch.int32)
