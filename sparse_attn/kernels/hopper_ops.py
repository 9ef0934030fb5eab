"""Pieces the Gluon kernels for Hopper share: tiles in and out of shared memory, bias, masses."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import inputs
from .tile_ops import LOG2_E

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# tokens of one tile, and query rows of one consumer
TILE = gl.constexpr(64)
# keeps a hopelessly stale LSE from turning a whole row into inf / inf
MAX_MASS = gl.constexpr(1e30)
# tiles whose masses are added up over the rows at once: that takes a barrier of the warpgroup
STRIP = gl.constexpr(8)
# [warp, row, tile] as the threads of a warpgroup hold the rows of a score tile
STRIP_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1, 2], [1, 8, 4], [4, 1, 1], [2, 1, 0]))
# renamed after Triton 3.6
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


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
def wait_for(bars, turn, STAGES: gl.constexpr):
    mbarrier.wait(bars.index(turn % STAGES), (turn // STAGES) & 1)


@gluon.jit
def start_scores(b_q, tile, D: gl.constexpr, S: gl.constexpr):
    """Start the product of the queries with one tile of keys."""
    b_zero = gl.zeros([TILE, TILE], gl.float32, S)
    keys = tile.reshape([TILE, D]).permute((1, 0))
    return warpgroup_mma(b_q, keys, b_zero, use_acc=False, is_async=True)


@gluon.jit
def add_bias(b_s, p_bias, first, o_k, Lk, scale_log2):
    """Unscaled scores of the tile at `first` with their bias; keys past Lk get -inf."""
    o_k += first
    b_bias = gl.load(p_bias + o_k, mask=o_k < Lk, other=float("-inf"))
    return b_s + (b_bias * (LOG2_E / scale_log2))[None, :]


@gluon.jit
def mask_listed(b_s, p_listed, first, first_pseudo, num_listed, o_k):
    """Scores of the tile at `first`; the stand-in of a block that is listed counts for nothing."""
    o_k += first - first_pseudo
    m_k = (o_k >= 0) & (o_k < num_listed)
    b_byte = gl.load(p_listed + o_k // 8, mask=m_k, other=0).to(gl.int32)
    return gl.where(((b_byte >> (o_k % 8)) & 1 == 1)[None, :], float("-inf"), b_s)


@gluon.jit
def has_bias(p_flags, first0, first1):
    """Whether a key of these two tiles has a bias."""
    return gl.load(p_flags + first0 // TILE) | gl.load(p_flags + first1 // TILE)


@gluon.jit
def empty_strip():
    """(the strip, the numbers of its columns)."""
    o_t = gl.arange(0, STRIP, layout=gl.SliceLayout(0, gl.SliceLayout(1, STRIP_LAYOUT)))
    return gl.zeros([4, 8, STRIP], gl.float32, STRIP_LAYOUT), o_t


@gluon.jit
def put_masses(b_strip, o_t, t, b_rows):
    """Note [4, 8] sums of the rows of tile t, each of two rows 8 apart, in a column of the strip."""
    b_rows = gl.convert_layout(b_rows, gl.SliceLayout(2, STRIP_LAYOUT))
    return gl.where((o_t == t % STRIP)[None, None, :], b_rows[:, :, None], b_strip)


@gluon.jit
def store_masses(p_masses, b_strip, first, begin, end):
    """Add up the rows of the strip, whose columns are tiles from `first` on, and store the masses
    of tiles `begin` to `end` - 1.
    """
    b_mass = gl.sum(b_strip.reshape([32, STRIP]), 0)
    b_mass = gl.where(b_mass > MAX_MASS, MAX_MASS, b_mass)
    o_t = first + gl.arange(0, STRIP, layout=b_mass.type.layout)
    gl.store(p_masses + o_t, b_mass, mask=(o_t >= begin) & (o_t < end))


def source(x: torch.Tensor) -> TensorDescriptor:
    """x as a TMA descriptor of one tile."""
    shape, strides, block = inputs.descriptor_geometry(x, TILE.value)
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[x.dtype])
    return TensorDescriptor(x, shape, strides, block, layout)


def bias_tiles(key_bias: torch.Tensor | None) -> torch.Tensor | None:
    """[B, ceil(Lk / 64)] bool: tiles of which some key has a bias."""
    if key_bias is None:
        return None
    padded = torch.nn.functional.pad(key_bias, (0, -key_bias.shape[-1] % TILE.value))
    return padded.unflatten(-1, (-1, TILE.value)).any(-1)
