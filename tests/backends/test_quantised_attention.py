"""Attention with INT8 scores, and values in INT8 or on Hopper in FP8, against float64."""

import pytest
import torch
from close import assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.permuted import Pooled
from tests.backends import inputs
from tests.backends.implementations import implementations

pytest.importorskip("triton")

from sparse_attn.backends.triton.quantise import TILE, quantise

QUANTISED = pytest.mark.parametrize(
    "attention", implementations("quantised_attention", "triton", "hopper")
)
# B, H, Lq, Lk, D, block_q, block_k
CASES = [
    (1, 1, 64, 64, 64, 64, 64),  # one block, an odd list
    (1, 2, 200, 331, 64, 64, 64),  # ragged last query block and last key block
    (2, 1, 192, 256, 128, 64, 64),  # batch; nothing ragged
    (1, 2, 300, 300, 128, 128, 64),  # the headline block size, ragged
    (1, 1, 200, 290, 128, 64, 128),  # a last key block of one tile
    (1, 1, 300, 450, 64, 128, 128),  # a ragged key block whose second tile holds keys
]
# on the quantised inputs only the weights err: by half a step of 127 of their tile's largest one, or of
# e4m3, 1/16 at most, 0.027 on average; on the inputs themselves values err as well
WEIGHT_ERROR = {"triton": 0.02, "hopper": 0.04}
ERROR = {"triton": 0.03, "hopper": 0.06}
LSE_ERROR = 1e-3
VALUES = {"triton": torch.int8, "hopper": torch.float8_e4m3fn}


def name(case):
    return "B{}-H{}-Lq{}-Lk{}-D{}-q{}-k{}".format(*case)


def relative(out, exact):
    """Relative L2 error."""
    assert torch.isfinite(out).all()
    return ((out.double() - exact).norm() / exact.norm()).item()


def of_quantised(q, k, v, scale, dtype, key_bias=None, pooled=None, **options):
    """(out, lse) in float64 of the numbers that the kernel multiplies."""
    Lq, D = q.shape[2:]
    x = quantise(q, k, v, scale=scale, values=dtype, key_bias=key_bias, pooled=pooled)

    def keys(x, scales, number):
        found = x.double() * scales.repeat_interleave(TILE, 2)[..., None].double()
        return found[:, :, :number]

    def values(v8, tile_scale, number):
        found = inputs.stored_values(v8, tile_scale, D)[:, :, :number]
        return found * x.v_scale[:, :, None].double() + x.v_mean[:, :, None].double()

    ln_2 = 0.6931471805599453
    q8 = x.q[:, :, :Lq].double() * x.q_scale[:, :, :Lq, None].double() * ln_2
    Lk = k.shape[2]
    if pooled is not None:
        N = pooled.k_mean.shape[2]
        means = keys(x.pooled_k, x.pooled_k_scale, N), values(x.pooled_v, x.pooled_v_tile_scale, N)
        pooled = Pooled(*means, pooled.log_sizes.double())
    out, lse = reference.attention(
        q8, keys(x.k, x.k_scale, Lk), values(x.v, x.v_tile_scale, Lk), scale=1.0,
        key_bias=key_bias, pooled=pooled, **options,
    )  # fmt: skip
    return out, lse + x.q_shift[:, :, :Lq].double()


def check(attention, q, k, v, scale=0.125, **options):
    out, lse = attention(q, k, v, scale=scale, **options)
    folder = attention.args[1]
    exact, exact_lse = of_quantised(q, k, v, scale, VALUES[folder], **options)
    assert_within("lse", lse, exact_lse, LSE_ERROR)
    assert relative(out, exact) < WEIGHT_ERROR[folder]
    exact, _ = inputs.exact_attention(q, k, v, scale, **options)
    assert relative(out, exact) < ERROR[folder]
    return out, lse


@pytest.mark.parametrize("case", CASES, ids=name)
@QUANTISED
def test_matches_reference(attention, case, device):
    B, H, Lq, Lk, D, block_q, block_k = case
    q, k, v = inputs.make(B, H, Lq, Lk, D, torch.bfloat16, device)
    mask = inputs.random_mask(B, H, Lq, Lk, block_q, block_k, device)
    out, _ = check(attention, q, k + 2, v, D**-0.5, mask=mask)
    assert out.transpose(1, 2).is_contiguous()


@QUANTISED
def test_without_a_mask_is_dense(attention, device):
    q, k, v = inputs.make(1, 2, 150, 270, 128, torch.float16, device)
    check(attention, q, k, v, 128**-0.5)


@pytest.mark.parametrize("layout", ["BLHD", "packed"])
@QUANTISED
def test_reads_strided_inputs_in_place(attention, layout, device):
    q, k, v = inputs.make(2, 2, 130, 130, 64, torch.bfloat16, device, layout)
    check(attention, q, k, v, mask=inputs.random_mask(2, 2, 130, 130, 64, 64, device))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@QUANTISED
def test_key_bias_hides_padding(attention, dense, device):
    q, k, v = inputs.make(2, 1, 192, 200, 64, torch.bfloat16, device)
    bias = torch.randn(2, 200, device=device)
    bias[0, 150:] = float("-inf")
    bias[1, 10:140] = float("-inf")
    mask = None
    if not dense:
        keep = inputs.random_mask(2, 1, 192, 200, 64, 64, device).to_dense()
        keep[..., 0] = True
        mask = inputs.mask_of(keep, device)
    check(attention, q, k, v, mask=mask, key_bias=bias)


@QUANTISED
def test_rows_without_a_visible_key_are_zero(attention, device):
    q, k, v, bias, mask = inputs.a_row_without_keys(device)
    out, lse = check(attention, q, k, v + 3, mask=mask, key_bias=bias)
    assert (out[:, :, :64] == 0).all() and (lse[:, :, :64] == float("-inf")).all()


@QUANTISED
def test_a_row_that_keeps_no_block_is_zero(attention, device):
    q, k, v = inputs.make(1, 2, 192, 192, 64, torch.bfloat16, device)
    mask = inputs.mask_of(torch.zeros(1, 2, 3, 3), device)
    out, lse = attention(q, k, v + 3, scale=0.1, mask=mask)
    assert (out == 0).all() and (lse == float("-inf")).all()


@QUANTISED
def test_a_shared_offset_of_keys_or_values_costs_no_precision(attention, device):
    q, k, v = inputs.make(1, 1, 192, 256, 64, torch.bfloat16, device)
    k += 20 * torch.randn(64, device=device)
    v += 20 * torch.randn(64, device=device)
    exact, exact_lse = inputs.exact_attention(q, k, v, 0.125)
    out, lse = attention(q, k, v, scale=0.125)
    assert relative(out, exact) < 0.01
    assert_within("lse", lse, exact_lse, 0.05)


def check_tail(attention, q, k, v, mask, key_bias=None, own_order=False):
    """Rows of q over the tokens of k and v and the means of what the mask does not keep."""
    B, H, L, _ = k.shape
    order = torch.arange(L, device=k.device, dtype=torch.int32).expand(B, H, L)
    moved = reference.permute(None, k.float(), v.float(), order, key_bias)
    pooled = moved.pooled.of_blocks(L, mask.block_k)
    means = (x.to(q.dtype) for x in (pooled.k_mean, pooled.v_mean))
    out_order = inputs.random_orders(*q.shape[:3], q.device) if own_order else None
    return check(
        attention, q, k, v, q.shape[-1] ** -0.5, mask=mask, key_bias=key_bias,
        pooled=Pooled(*means, pooled.log_sizes), order=out_order,
    )  # fmt: skip


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize(
    "block_q, block_k, D, L",
    [(64, 64, 64, 330), (128, 64, 128, 330), (128, 64, 64, 384), (128, 128, 128, 330)],
)
@QUANTISED
def test_a_tail_stands_for_what_is_skipped(attention, block_q, block_k, D, L, biased, device):
    q, k, v = inputs.make(2, 2, L, L, D, torch.bfloat16, device, "BLHD")
    bias = None
    if biased:
        bias = torch.zeros(2, L, device=device)
        bias[0, 70:80] = -2.0
    mask = inputs.random_mask(2, 2, L, L, block_q, block_k, device)
    # keys share an offset, so zeros lie far from them
    out, _ = check_tail(attention, q, k + 3, v, mask, bias, own_order=True)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("block_q, D", [(64, 64), (128, 128)])
@QUANTISED
def test_means_past_one_block_of_them_count(attention, block_q, D, device):
    L = 64 * 65 + 5
    q, k, v = inputs.make(1, 1, 64, L, D, torch.bfloat16, device)
    keep = torch.zeros(1, 1, 1, 66)
    keep[..., [0, 40, 65]] = 1
    check_tail(attention, q, k, v, inputs.mask_of(keep, device, block_q))


@pytest.mark.parametrize("kept", [True, False], ids=["all", "none"])
@pytest.mark.parametrize("block_q, L", [(64, 600), (128, 576)])
@QUANTISED
def test_a_tail_of_rows_that_keep_all_or_none(attention, block_q, L, kept, device):
    q, k, v = inputs.make(1, 1, 100, L, 128, torch.bfloat16, device)
    shape = 1, 1, inputs.blocks(100, block_q), inputs.blocks(L, 64)
    check_tail(attention, q, k, v, inputs.mask_of(torch.full(shape, kept), device, block_q))


@pytest.mark.parametrize("block_q", [64, 128])
@QUANTISED
def test_a_tail_of_equal_keys_or_queries_of_zero(attention, block_q, device):
    q, k, v = inputs.make(1, 2, 128, 600, 128, torch.bfloat16, device)
    q[:, 0, 20:90] = 0
    k[:, 1] = k[:, 1, :1]
    check_tail(attention, q, k, v, inputs.random_mask(1, 2, 128, 600, block_q, 64, device))


@pytest.mark.parametrize("where", ["front", "back", "both"])
@pytest.mark.parametrize("block_q", [64, 128])
@QUANTISED
def test_a_tail_with_a_bias_in_front_or_behind(attention, block_q, where, device):
    L = 64 * 11 + 20
    q, k, v = inputs.make(1, 1, 128, L, 128, torch.bfloat16, device)
    bias = torch.zeros(1, L, device=device)
    if where != "back":
        bias[:, :70] = 1.5
    if where != "front":
        bias[:, -200:] = -0.7
        # a whole block, so its mean, and a part of one
        bias[:, -100:] = float("-inf")
    mask = inputs.random_mask(1, 1, 128, L, block_q, 64, device)
    check_tail(attention, q, k, v, mask, bias)


@pytest.mark.parametrize("block_q", [64, 128])
@QUANTISED
def test_hidden_keys_at_the_end_of_a_list(attention, block_q, device):
    # on Hopper the last pair of tiles goes first, so rows start without a key
    q, k, v = inputs.make(1, 1, 128, 64 * 8, 64, torch.bfloat16, device)
    bias = torch.zeros(1, 64 * 8, device=device)
    bias[:, -256:] = float("-inf")
    mask = inputs.mask_of(torch.ones(1, 1, 128 // block_q, 8), device, block_q)
    check(attention, q, k, v, mask=mask, key_bias=bias)


@pytest.mark.parametrize("heads", ["their own", "expanded", "strided"])
@QUANTISED
def test_an_order_says_where_rows_go(attention, heads, device):
    B, H, L = 2, 3, 130
    q, k, v = inputs.make(B, H, L, L, 64, torch.bfloat16, device)
    plain, lse = attention(q, k, v, scale=0.125)
    order = inputs.random_orders(B, H, L, device)
    if heads == "expanded":
        order = order[:1, :1].expand(B, H, L)
    elif heads == "strided":
        order = torch.cat([order, order], -1)[..., L:]
    out, same = attention(q, k, v, scale=0.125, order=order)
    to = order.long()[..., None].expand_as(out)
    assert torch.equal(out.gather(2, to), plain) and torch.equal(same, lse)
    assert out.transpose(1, 2).is_contiguous()


@QUANTISED
def test_hidden_keys_and_values_spoil_nothing(attention, device):
    q, k, v = inputs.make(1, 1, 128, 192, 64, torch.bfloat16, device)
    bias = torch.zeros(1, 192, device=device)
    bias[:, 70:90] = float("-inf")
    clean, _ = attention(q, k, v, scale=0.125, key_bias=bias)
    k[:, :, 70:90] = 1e4
    v[:, :, 70:90] = 1e4
    assert torch.equal(attention(q, k, v, scale=0.125, key_bias=bias)[0], clean)


def emulated_peer(q, k, v, scale):
    """INT8 scores in blocks of 128 queries x 64 keys less their mean, and FP8 weights and values.

    What SageAttention and SpargeAttn do, in float64 but for their roundings.
    """
    k = k.float() - k.float().mean(2, keepdim=True)

    def blockwise(x, rows):
        x = x.float().unflatten(2, (-1, rows))
        step = x.abs().amax((3, 4), keepdim=True) / 127
        return ((x / step).round() * step).flatten(2, 3).double()

    s = blockwise(q, 128) @ blockwise(k, 64).mT * scale
    p = (s - s.amax(-1, keepdim=True)).exp()
    step = v.float().abs().amax(2, keepdim=True) / 448
    v8 = (v.float() / step).to(torch.float8_e4m3fn).double() * step
    p8 = (p * 448).to(torch.float8_e4m3fn).double() / 448
    return p8 @ v8 / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("outliers", [[], [5, 40]], ids=["none", "same"])
@QUANTISED
def test_errs_less_than_peers_where_channels_stand_out(attention, outliers, device):
    q, k, v = inputs.make(1, 2, 128, 512, 128, torch.bfloat16, device)
    k += 4 * torch.randn(1, 2, 1, 128, device=device)
    q[..., outliers] *= 4
    k[..., [17, *outliers]] *= 4
    v *= torch.randn(1, 2, 1, 128, device=device).exp()
    exact, _ = inputs.exact_attention(q, k, v, 0.09)
    out, _ = attention(q, k, v, scale=0.09)
    assert relative(out, exact) < 1.02 * relative(emulated_peer(q, k, v, 0.09), exact)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@QUANTISED
def test_many_weights_too_small_for_a_step_still_count(attention, dense, device):
    # in every tile one key weighs 400 times each of the others, which are 63
    q, k, v = inputs.make(1, 2, 128, 256, 64, torch.bfloat16, device)
    q[:], k[:] = 1.0, 0.0
    v -= 2
    k[:, :, 20::64], v[:, :, 20::64] = 0.75, 2.0
    mask = None if dense else inputs.mask_of(torch.tensor([[[1, 0, 1, 1]] * 2] * 2)[None], device)
    out, lse = attention(q, k, v, scale=0.125, mask=mask)
    exact, exact_lse = inputs.exact_attention(q, k, v, 0.125, mask=mask)
    assert_within("lse", lse, exact_lse, 5e-3)
    assert relative(out, exact) < 0.1


@QUANTISED
def test_nan_in_a_query_stays_in_its_row(attention, device):
    q, k, v = inputs.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    clean, _ = attention(q, k, v, scale=0.125)
    q[0, 0, 7, 3] = float("nan")
    out, lse = attention(q, k, v, scale=0.125)
    assert out[0, 0, 7].isnan().all() and lse[0, 0, 7].isnan()
    out[0, 0, 7] = clean[0, 0, 7]
    assert torch.equal(out, clean)


@QUANTISED
def test_reads_nothing_beside_its_tensors(attention, device):
    whole = [torch.full((1, 2, 400, 64), float("nan"), device=device) for _ in range(3)]
    q, k, v = (x.half()[:, :1, 100:230] for x in whole)
    for x, y in zip((q, k, v), inputs.make(1, 1, 130, 130, 64, q.dtype, device), strict=True):
        x.copy_(y)
    check(attention, q, k, v, mask=inputs.mask_of(torch.ones(1, 1, 3, 3), device))


@QUANTISED
def test_two_runs_are_bit_equal(attention, device):
    q, k, v = inputs.make(1, 2, 256, 256, 128, torch.bfloat16, device)
    mask = inputs.random_mask(1, 2, 256, 256, 64, 64, device)
    first, second = (attention(q, k, v, scale=0.1, mask=mask) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@QUANTISED
def test_large_scores_do_not_overflow(attention, device):
    q, k, v = inputs.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    out, lse = attention(q * 30, k, v, scale=1.0)
    _, exact_lse = inputs.exact_attention(q * 30, k, v, 1.0)
    assert torch.isfinite(out).all()
    assert_within("lse", lse / exact_lse, torch.ones_like(exact_lse), 0.05)


def test_says_what_it_cannot_serve(device):
    from sparse_attn.backends.triton.quantised_attention import why_not_quantised

    q, k, v = inputs.make(1, 1, 64, 64, 64, torch.bfloat16, device)
    assert why_not_quantised(q, k, v, 64, 128) is None
    said = "needs blocks of 64 or 128 tokens, got 32 x 64"
    assert why_not_quantised(q, k, v, 32, 64) == said
    said = "needs float16 or bfloat16, got float32"
    assert why_not_quantised(q.float(), k.float(), v.float(), 64, 64) == said
    said = "needs head_dim 64 or 128, got 32"
    assert why_not_quantised(q[..., :32], k[..., :32], v[..., :32], 64, 64) == said
