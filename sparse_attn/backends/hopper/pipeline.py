"""Pieces the Gluon kernels for Hopper share: tiles in and out of shared memory, bias, masses."""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton import launch as inputs
from ..triton.softmax import LOG2_E

DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}

# tokens of one tile, and query rows of one consumer
TILE = gl.constexpr(64)
# keeps a hopelessly stale LSE from turning a whole row into inf / inf
MAX_MASS = gl.constexpr(1e30)
# tiles whose masses are added up over the rows at once: that takes a barrier of the warpgroup
STRIP = gl.constexpr(8)
# the bias of the mean of a whole block
LOG_TILE = math.log(TILE.value)
# log2 of the keys that the mean of a whole block stands for
LOG2_TILE = gl.constexpr(6.0)
# renamed after Triton 3.6
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def tile_first(p_list, t, num_tiles, Lk, BLOCK_K: gl.constexpr, LISTED: gl.constexpr):
    """First key of the t-th tile; Lk or more for one past the end."""
    first = t * TILE
    if LISTED:
        PARTS: gl.constexpr = BLOCK_K // TILE
        listed = t < num_tiles
        block = gl.load(p_list + t // PARTS, mask=listed, other=0)
        first = gl.where(listed, block * BLOCK_K + (t % PARTS) * TILE, Lk)
    return first


@gluon.jit
def load_queries(q_desc, q_tiles, q_ready, i_b, i_h, first_q, CONSUMERS: gl.constexpr):
    for i in gl.static_range(CONSUMERS):
        bar = q_ready.index(i)
        mbarrier.expect(bar, q_desc.block_type.nbytes)
        _tma_load(q_desc, [i_b, i_h, first_q + i * TILE, 0], bar, q_tiles.index(i))


@gluon.jit
def load_pair(desc, ring, ready, free, turn, i_b, i_h, first0, first1, STAGES: gl.constexpr):
    """Load two tiles into the stage of this turn, once it is free."""
    stage = turn % STAGES
    mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
    bar = ready.index(stage)
    mbarrier.expect(bar, 2 * desc.block_type.nbytes)
    _tma_load(desc, [i_b, i_h, first0, 0], bar, ring.index(2 * stage))
    _tma_load(desc, [i_b, i_h, first1, 0], bar, ring.index(2 * stage + 1))


@gluon.jit
def wait_for(bars, turn, STAGES: gl.constexpr, needed=True):
    mbarrier.wait(bars.index(turn % STAGES), (turn // STAGES) & 1, pred=needed)


@gluon.jit
def start_scores(b_q, tile, D: gl.constexpr, S: gl.constexpr):
    """Start the product of the queries with one tile of keys."""
    ACC: gl.constexpr = gl.int32 if b_q.dtype == gl.int8 else gl.float32
    b_zero = gl.zeros([TILE, TILE], ACC, S)
    keys = tile.reshape([TILE, D]).permute((1, 0))
    return warpgroup_mma(b_q, keys, b_zero, use_acc=False, is_async=True)


@gluon.jit
def add_bias(b_s, p_bias, first, o_k, Lk, scale_log2):
    """Unscaled scores of the tile at `first` with their bias; keys past Lk get -inf.

    `scale_log2` makes scores units of log2: one number, or one a row, [64, 1].
    """
    o_k += first
    b_bias = gl.load(p_bias + o_k, mask=o_k < Lk, other=float("-inf"))
    return b_s + b_bias[None, :] * (LOG2_E / scale_log2)


@gluon.jit
def has_bias(p_flags, first0, first1, Lk):
    """Whether a key of these two tiles has a bias; the second may lie past the end."""
    flag = gl.load(p_flags + first1 // TILE, mask=first1 < Lk, other=1)
    return gl.load(p_flags + first0 // TILE) | flag


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


def source(x: torch.Tensor, rows: int = TILE.value) -> TensorDescriptor:
    """x [B, H, L, D] as a TMA descriptor of a tile of `rows`."""
    shape, strides, block = inputs.descriptor_geometry(x, rows)
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    return TensorDescriptor(x, shape, strides, block, layout)


def bias_tiles(key_bias: torch.Tensor | None, means: int = 0) -> torch.Tensor | None:
    """[B, ceil(Lk / 64)] bool: tiles of which some key has a bias; in the last `means` keys, one
    that is not the log of a whole block.
    """
    if key_bias is None:
        return None
    biased = key_bias != 0
    if means:
        biased[:, -means:] = (key_bias[:, -means:] - LOG_TILE).abs() > 1e-6
    padded = torch.nn.functional.pad(biased, (0, -key_bias.shape[-1] % TILE.value))
    return padded.unflatten(-1, (-1, TILE.value)).any(-1)


def tail_words(tail: torch.Tensor) -> torch.Tensor:
    """The bits of a tail as int32, two words for every 64 means or part of them."""
    # little-endian, so that bit 0 is the first block
    return torch.nn.functional.pad(tail, (0, -tail.shape[-1] % 8)).view(torch.int32)
