"""Which key blocks each query block reads, one bit per block pair, and what share they hold."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

# byte i of an integer, 0 or 1, times this is bit i of the highest byte
GATHER = 0x0102040810204080
# a map of more blocks than this is averaged down for people
MAP_SIZE = 96
# a mask of more pairs of blocks than this is of several blocks together, rows first: of 16 s at 720p it takes
# half of what it would, of 24 s a quarter, and is still finer, beside the video, than one of 5 s
MOST_PAIRS = 4096**2
# tokens of the blocks that attention can walk, the fastest first
WALKED = 128, 64


def mask_blocks(tokens: int, block_q: int, block_k: int) -> dict[str, int]:
    """Tokens per block of the mask of a sequence: the kernels' blocks, or so many of them."""
    rows, columns = block_q, block_k
    while -(-tokens // rows) * -(-tokens // columns) > MOST_PAIRS:
        if rows <= columns:
            rows += block_q
        else:
            columns += block_k
    return {"block_q": rows, "block_k": columns}


def walked(block: int) -> int:
    """Tokens of the largest blocks that attention can walk, of which a mask's of `block` are multiples."""
    return next(size for size in WALKED if block % size == 0)


@dataclass(frozen=True)
class BlockMask:
    """A compact block mask.

    Args:
        bits: [B, H, Nq, ceil(Nk / 8)] uint8; bit j of byte b, lowest first, is key block 8 b + j.
        num_k: Nk, key blocks per row.
        block_q, block_k: tokens per query block and per key block.
    """

    bits: torch.Tensor
    num_k: int
    block_q: int
    block_k: int

    @classmethod
    def from_dense(cls, keep: torch.Tensor, *, block_q: int, block_k: int) -> "BlockMask":
        """Pack `keep`, [B, H, Nq, Nk] bool, True where the key block is read."""
        num_k = keep.shape[-1]
        # eight bools as one integer; the product brings them together in its highest byte
        shape = *keep.shape[:-1], num_k + -num_k % 8
        padded = torch.zeros(shape, dtype=torch.uint8, device=keep.device)
        padded[..., :num_k] = keep
        eights = padded.view(torch.int64).mul_(GATHER)
        bits = eights.view(torch.uint8)[..., 7::8].contiguous()
        return cls(bits, num_k, block_q, block_k)

    def to_dense(self) -> torch.Tensor:
        """Return the [B, H, Nq, Nk] bool map this mask was packed from."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        return ((self.bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., : self.num_k]

    def density(self) -> torch.Tensor:
        """Kept share of all block pairs, [B, H] float32 in [0, 1]."""
        return torch.stack([_count(bits) for bits in self.bits.unbind(1)], 1) / (
            self.bits.shape[-2] * self.num_k
        )

    def block_map(self) -> torch.Tensor:
        """The kept share of each cell of the batch's first row, times 255; [H, rows, columns] uint8.

        A side has at most MAP_SIZE cells; the map is on the mask's device.
        """
        sizes = self.bits.shape[-2], self.num_k
        rows, columns = (_cells(blocks, self.bits.device) for blocks in sizes)
        # counts, exact in half precision for any video that fits a GPU
        dtype = torch.float16 if self.bits.device.type == "cuda" else torch.float32
        counts = [
            rows.to(dtype) @ (head.to_dense()[0, 0].to(dtype) @ columns.to(dtype).T)
            # one head at a time: the pairs of all heads would be gigabytes
            for head in (
                self.with_bits(self.bits[:1, h : h + 1]) for h in range(self.bits.shape[1])
            )
        ]
        sizes = rows.sum(1, keepdim=True) * columns.sum(1)
        return (torch.stack(counts).float() / sizes * 255).round().to(torch.uint8)

    def of_blocks(self, tokens: int, block_q: int, block_k: int) -> "BlockMask":
        """The same mask of a sequence of `tokens` in smaller blocks, of which its own are multiples."""
        rows, each = self.block_q // block_q, self.block_k // block_k
        if rows == each == 1:
            return self
        bits, num_k = self.bits, -(-tokens // block_k)
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        ones = torch.arange(256, dtype=torch.uint8, device=bits.device)[:, None] >> shifts & 1
        # a byte becomes `each` bytes
        wider = BlockMask.from_dense(ones.repeat_interleave(each, -1), block_q=1, block_k=1).bits
        heads = [wider[head.int()].flatten(-2) for head in bits.unbind(1)]
        found = torch.stack(heads, 1)[..., : -(-num_k // 8)]
        # the last block may be shorter
        found[..., -1] &= 0xFF >> -num_k % 8
        found = found.repeat_interleave(rows, -2)[..., : -(-tokens // block_q), :]
        return BlockMask(found.contiguous(), num_k, block_q, block_k)

    def as_walked(self, tokens: int) -> "BlockMask":
        """The same mask of a sequence of `tokens` in the largest blocks that attention can walk."""
        return self.of_blocks(tokens, walked(self.block_q), walked(self.block_k))

    def with_bits(self, bits: torch.Tensor) -> "BlockMask":
        return replace(self, bits=bits)


def _count(bits: torch.Tensor) -> torch.Tensor:
    """How many bits are set in the rows of a head, [B, Nq, bytes] uint8."""
    # in each byte: of pairs, of fours, of all
    counts = bits - ((bits >> 1) & 0x55)
    counts = (counts & 0x33) + ((counts >> 2) & 0x33)
    return ((counts + (counts >> 4)) & 0x0F).sum((-1, -2))


def _cells(blocks: int, device) -> torch.Tensor:
    """[cells, blocks] bool: which blocks make up each of at most MAP_SIZE cells of a side."""
    cells = min(blocks, MAP_SIZE)
    first = torch.arange(cells, device=device)[:, None] * blocks
    block = torch.arange(blocks, device=device)
    return (block >= first // cells) & (block * cells < first + blocks)


def sum_pool(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sums of `rows` x `columns` neighbouring blocks of a map [B, H, Nq, Nk]; the last may be of fewer."""
    if rows == columns == 1:
        return x
    return F.avg_pool2d(x, (rows, columns), ceil_mode=True, divisor_override=1)


def recall(masses: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Share of each head's mass on the kept blocks.

    Args:
        masses: [B, H, Nq, Nk] float32 block masses.
        keep: [B, H, Nq, Nk] bool.

    Returns:
        [B, H] float32 in [0, 1]; NaN where a mass is NaN.
    """
    kept = (masses * keep).sum((-1, -2), dtype=torch.float32)
    return kept / masses.sum((-1, -2), dtype=torch.float32)
