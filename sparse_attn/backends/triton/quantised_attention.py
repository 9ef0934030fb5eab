"""Attention in eight bits, sparse or dense: INT8 or FP8 scores, FP8 values where the card has it.

The quantisation is part of every call. On Hopper `hopper_low_precision.py` does the work; the
plain kernel here serves the other cards, with values in their own dtype below compute capability
8.9.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from . import launch as inputs
from .quantise import TILE, quantise, to_fp8
from .softmax import INTERPRETED, LOG2_E, load_rows, mask_scores, matmul, store_rows
from .unpack_mask import listed

PRECISIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# log2(448): the largest weight of a row becomes the largest number of FP8 (e4m3)
WEIGHT_SHIFT = tl.constexpr(8.807354922057604)

SIZES = [
    "stride_vb", "stride_vh", "stride_vl", "stride_ob", "stride_oh",
    "H", "Lq", "Lk", "Nq", "Nk", "num_rows", "list_stride", "num_listed",
]  # fmt: skip


@triton.jit
def eight_bit_scores(b_q, b_k):
    """[Q, K] products in float32."""
    b_k = tl.trans(b_k)
    if INTERPRETED:
        b_s = tl.dot(b_q.to(tl.float32), b_k.to(tl.float32))
    elif b_q.dtype == tl.int8:
        b_s = tl.dot(b_q, b_k, out_dtype=tl.int32).to(tl.float32)
    else:
        b_s = tl.dot(b_q, b_k)
    return b_s


@triton.jit
def _attend_tile(
    b_q, b_scale, b_acc, b_max, b_sum, p_k, p_k_scale, v, p_v, p_bias, p_listed, num_listed,
    tile, i_b, i_h, stride_vb, stride_vh, stride_vl, Lk,
    D: tl.constexpr, TILE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr,
    RAGGED: tl.constexpr, FP8_VALUES: tl.constexpr,
):  # fmt: skip
    """Online softmax over one tile of keys."""
    o_t = tl.arange(0, TILE)
    o_d = tl.arange(0, D)
    first = tile * TILE
    # the keys are padded
    b_k = tl.load(p_k + (first + o_t)[:, None] * D + o_d[None, :])
    b_s = eight_bit_scores(b_q, b_k) * (b_scale * tl.load(p_k_scale + tile))[:, None]
    # they are scaled already
    b_s = mask_scores(
        b_s, 1.0, p_bias, first, Lk, p_listed, num_listed * TILE, num_listed,
        TILE, HAS_BIAS, HAS_TAIL, RAGGED,
    )  # fmt: skip
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    # a row may have met only keys at -inf so far
    b_pivot = tl.where(b_new == float("-inf"), 0.0, b_new) if HAS_BIAS else b_new
    b_p = tl.exp2(b_s - (b_pivot - WEIGHT_SHIFT)[:, None])
    b_rescale = tl.exp2(b_max - b_pivot)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_zero = tl.zeros([b_q.shape[0], D], dtype=tl.float32)
    if FP8_VALUES:
        b_v = tl.load(p_v + (o_d + tile * D)[:, None] * TILE + o_t[None, :])
        b_p = to_fp8(b_p, b_v.dtype)
        # a sum of its own: the tensor cores add up FP8 products in about 14 bits
        if INTERPRETED:
            b_new_acc = tl.dot(b_p.to(tl.float32), tl.trans(b_v).to(tl.float32))
        else:
            b_new_acc = tl.dot(b_p, tl.trans(b_v))
    else:
        b_v = load_rows(
            v, i_b, i_h, first, stride_vb, stride_vh, stride_vl, Lk, TILE, D,
            TMA=False, RAGGED=RAGGED,
        )  # fmt: skip
        b_new_acc = matmul(b_p.to(b_v.dtype), b_v, b_zero)
    return b_acc * b_rescale[:, None] + b_new_acc, b_new, b_sum


@triton.jit
def _tile(p_list, t, BLOCK_K: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr):
    PARTS: tl.constexpr = BLOCK_K // TILE
    if LISTED:
        t = tl.load(p_list + t // PARTS) * PARTS + t % PARTS
    return t


@triton.jit(
    do_not_specialize=SIZES,
    do_not_specialize_on_alignment=[
        "lse", "key_bias", "q_scale", "q_shift", "k_scale", "v_scale", "v_mean",
        "kv_indices", "kv_num_blocks", "tail", "order",
    ],
)  # fmt: skip
def _low_precision_attention_kernel(
    q, k, v, v8, out, lse, key_bias, q_scale, q_shift, k_scale, v_scale, v_mean,
    kv_indices, kv_num_blocks, tail, order,
    stride_vb, stride_vh, stride_vl, stride_ob, stride_oh,
    H, Lq, Lk, Nq, Nk, num_rows, list_stride, num_listed,
    D: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    FP8_VALUES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_bh, i_q = (pid // Nq).to(tl.int64), pid % Nq
    i_b, i_h = pid // Nq // H, pid // Nq % H
    o_q = i_q * TILE_Q + tl.arange(0, TILE_Q)
    o_d = tl.arange(0, D)
    p_bias = key_bias
    if HAS_BIAS:
        p_bias += i_b.to(tl.int64) * Lk
    p_list = kv_indices
    p_listed = lse  # not read
    if HAS_TAIL:
        p_listed = tail + (i_bh * Nq + i_q) * tl.cdiv(num_listed, 8)
    if HAS_ORDER:
        order += i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh
    if LISTED:
        PARTS: tl.constexpr = BLOCK_K // TILE
        p_list += (i_bh * Nq + i_q) * list_stride
        num_blocks = tl.load(kv_num_blocks + i_bh * Nq + i_q)
        # the list ascends, so only its last block can run past Lk, or have one tile
        last = tl.load(p_list + num_blocks - 1, mask=num_blocks > 0, other=0)
        num_tiles = tl.where(num_blocks > 0, (num_blocks - 1) * PARTS, 0)
        num_all = num_tiles + tl.where(num_blocks > 0, tl.minimum(PARTS, Nk - last * PARTS), 0)
        num_whole = tl.where((last + 1) * BLOCK_K > Lk, num_tiles, num_all)
    else:
        num_all = Nk
        num_whole = Lk // TILE

    # [TILE_Q, D]; the queries are padded
    row = i_bh * num_rows + o_q
    b_q = tl.load(q + row[:, None] * D + o_d[None, :])
    b_scale = tl.load(q_scale + row)
    p_k = k + i_bh * Nk * TILE * D
    p_k_scale = k_scale + i_bh * Nk
    p_v = v8
    if FP8_VALUES:
        p_v += i_bh * Nk * TILE * D
    b_acc = tl.zeros([TILE_Q, D], dtype=tl.float32)
    b_max = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([TILE_Q], dtype=tl.float32)
    for t in tl.range(0, num_whole):
        b_acc, b_max, b_sum = _attend_tile(
            b_q, b_scale, b_acc, b_max, b_sum, p_k, p_k_scale, v, p_v, p_bias, p_listed, num_listed,
            _tile(p_list, t, BLOCK_K, TILE, LISTED), i_b, i_h, stride_vb, stride_vh, stride_vl, Lk,
            D, TILE, HAS_BIAS, HAS_TAIL, False, FP8_VALUES,
        )  # fmt: skip
    # at most two turns
    for t in tl.range(num_whole, num_all, num_stages=1):
        b_acc, b_max, b_sum = _attend_tile(
            b_q, b_scale, b_acc, b_max, b_sum, p_k, p_k_scale, v, p_v, p_bias, p_listed, num_listed,
            _tile(p_list, t, BLOCK_K, TILE, LISTED), i_b, i_h, stride_vb, stride_vh, stride_vl, Lk,
            D, TILE, HAS_BIAS, HAS_TAIL, True, FP8_VALUES,
        )  # fmt: skip

    if FP8_VALUES:
        b_acc *= tl.load(v_scale + i_bh * D + o_d)[None, :]
        # a row without a key has sum 0
        b_acc += b_sum[:, None] * tl.load(v_mean + i_bh * D + o_d)[None, :]
    b_max += tl.load(q_shift + row) * LOG2_E - WEIGHT_SHIFT
    store_rows(out, lse, b_acc, b_sum, b_max, i_b, i_h, H, Lq, o_q, D, order, HAS_ORDER)


def quantised_attention(q, k, v, *, scale, key_bias=None, mask=None, pooled=None, order=None):
    """Attention with INT8 scores and, where the card has it, FP8 values; all as of `attention`."""
    if mask is None:
        return low_precision_attention(
            q, k, v, scale=scale, precision="int8", key_bias=key_bias, order=order
        )
    return low_precision_attention(
        q, scale=scale, precision="int8", block_q=mask.block_q, block_k=mask.block_k, order=order,
        **listed(k, v, key_bias, mask, pooled),
    )  # fmt: skip


def why_not_quantised(q, k, v, block_q: int, block_k: int) -> str | None:
    """Reason why `quantised_attention` cannot serve the call, or None."""
    return why_not(q, k, v, block_q, block_k, "int8")


def low_precision_attention(
    q, k, v, *, scale, precision,
    kv_indices=None, kv_num_blocks=None, block_q=64, block_k=64, key_bias=None,
    tail=None, order=None,
):  # fmt: skip
    """Attention in eight bits over the listed key blocks, or over every key without lists.

    Args:
        q: [B, H, Lq, D] float16 or bfloat16; k, v: [B, H, Lk, D].
        scale: positive factor of the scores.
        precision: "int8" (INT8 scores) or "fp8"; values are FP8 either way, if the card has it.
        kv_indices, kv_num_blocks: as `sparse_attention` takes them, or None.
        key_bias: [B, Lk] float32 added to the scaled scores, or None.
        tail: as `sparse_attention` takes it, or None.
        order: as `sparse_attention` takes it, or None.

    Returns:
        out [B, H, Lq, D] viewed on [B, Lq, H, D], and lse [B, H, Lq] float32 in the order of q.
        A row without a key is zero, its lse -inf.
    """
    inputs.refuse(why_not(q, k, v, block_q, block_k, precision))
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    listed = kv_indices is not None
    if not listed:
        # the larger one is faster
        block_q = 128
    Nq = triton.cdiv(Lq, block_q)
    if listed:
        if kv_num_blocks.shape != (B, H, Nq) or kv_indices.shape[:3] != (B, H, Nq):
            raise ValueError(
                f"`kv_num_blocks` must be [{B}, {H}, {Nq}] for {Lq} tokens in blocks of "
                f"{block_q}, got {list(kv_num_blocks.shape)}; `kv_indices` is "
                f"{list(kv_indices.shape)}."
            )
        kv_indices = kv_indices.to(torch.int32).contiguous()
        kv_num_blocks = kv_num_blocks.to(torch.int32).contiguous()
    q, k, v = inputs.aligned(q), inputs.aligned(k), inputs.aligned(v)
    key_bias = inputs.checked_bias(key_bias, B, Lk)
    num_listed, tail = inputs.checked_tail(tail, Lk, (B, H, Nq), block_k if listed else 0, key_bias)
    order_strides = (0, 0)
    if order is not None:
        order = inputs.checked_order(order, q)
        order_strides = order.stride()[:2]
    out = inputs.empty_output(q)
    lse = torch.empty((B, H, Lq), device=q.device, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if Lk == 0:
        return out.zero_(), lse.fill_(float("-inf"))

    hopper = tiles.choose("low precision", q, block_q, block_k).hopper
    fp8_values = has_fp8(q)
    options = {"key_bias": key_bias, "tail": tail, "num_listed": num_listed, "order": order}
    with inputs.on_device(q):
        x = quantise(
            q, k, v, scale=float(scale), dtype=PRECISIONS[precision],
            values=fp8_values, ordered=hopper, key_bias=key_bias,
        )  # fmt: skip
        if hopper:
            from ..hopper import quantised_attention as hopper_low_precision

            hopper_low_precision.launch(
                x, out, lse, Lk, block_q=block_q, block_k=block_k,
                kv_indices=kv_indices, kv_num_blocks=kv_num_blocks, **options,
            )  # fmt: skip
            return out, lse
        tile = tiles.tile_for("low precision", (8, 0), D, block_q, block_k)
        _low_precision_attention_kernel[(B * H * Nq,)](
            x.q, x.k, v, x.v, out, lse, key_bias,
            x.q_scale, x.q_shift, x.k_scale, x.v_scale, x.v_mean,
            kv_indices, kv_num_blocks, tail, order,
            *inputs.row_strides(v), *order_strides,
            H, Lq, Lk, Nq, triton.cdiv(Lk, TILE), x.q.shape[2],
            kv_indices.shape[-1] if listed else 0, num_listed,
            D=D,
            TILE_Q=block_q,
            TILE=TILE,
            BLOCK_K=block_k,
            LISTED=listed,
            HAS_BIAS=key_bias is not None,
            HAS_TAIL=tail is not None,
            HAS_ORDER=order is not None,
            FP8_VALUES=fp8_values,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse


def has_fp8(q) -> bool:
    """Whether the tensor cores of q's device multiply FP8."""
    if q.device.type != "cuda":
        # interpreted
        return True
    return torch.cuda.get_device_capability(q.device) >= (8, 9)


def why_not(q, k, v, block_q: int, block_k: int, precision: str) -> str | None:
    """Reason why this kernel cannot serve the call, or None."""
    if precision not in PRECISIONS:
        return f"needs the precision int8 or fp8, got {precision}"
    reason = inputs.why_not_tensors(q, k, v) or inputs.why_not_blocks(block_q, block_k)
    if reason is not None or q.device.type != "cuda":
        return reason
    if torch.version.hip is not None:
        return "needs an NVIDIA card for eight bits"
    if precision == "fp8" and not has_fp8(q):
        major, minor = torch.cuda.get_device_capability(q.device)
        return f"needs compute capability 8.9 or newer for FP8, got {major}.{minor}"
    return None
