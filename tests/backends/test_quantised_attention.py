import pytest
import torch

pytest.importorskip("triton")

from close import assert_within

from sparse_attn.backends.permuted import log_sizes
from sparse_attn.backends.reference import expand_blocks
from sparse_attn.backends.triton.permute import arrange
from sparse_attn.backends.triton.quantise import TILE, quantise
from sparse_attn.backends.triton.quantised_attention import low_precision_attention
from sparse_attn.backends.triton.unpack_mask import unpack_mask
from sparse_attn.block_mask import BlockMask
from tests.backends import kernel_reference as reference

# B, H, Lq, Lk, D, block_q, block_k
CASES = [
    (1, 1, 64, 64, 64, 64, 64),  # one block, an odd list
    (1, 2, 200, 331, 64, 64, 64),  # ragged last query block and last key block
    (2, 1, 192, 256, 128, 64, 64),  # batch; nothing ragged
    (1, 2, 300, 300, 128, 128, 64),  # the headline block size, ragged
    (1, 1, 200, 290, 128, 64, 128),  # a last key block of one tile
    (1, 1, 300, 450, 64, 128, 128),  # a ragged key block whose second tile holds keys
]
PRECISIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# on the quantised inputs only the weights err: half a step of e4m3 is 1/16 at most, 0.027 on average
WEIGHT_ERROR = 0.04
# on the inputs themselves values err as much again, and FP8 scores too
ERROR = {"int8": 0.06, "fp8": 0.1}
# a GPU adds up FP8 products in few bits: products of 128 e4m3 numbers were off by up to 2^-11 of the
# largest of them, at any size of theirs; INT8 ones were exact (H200, Triton 3.6, 2026-11-24)
FP8_SUMS = 2**-11


def name(case):
    return "B{}-H{}-Lq{}-Lk{}-D{}-q{}-k{}".format(*case)


def blocks(length, block):
    return -(-length // block)


def relative(out, exact):
    """Relative L2 error."""
    assert torch.isfinite(out).all()
    return ((out.double() - exact).norm() / exact.norm()).item()


def run(q, k, v, keep, block_q, block_k, scale, precision, key_bias=None):
    lists = {}
    if keep is not None:
        lists = dict(zip(("kv_indices", "kv_num_blocks"), reference.lists(keep), strict=True))
    return low_precision_attention(
        q, k, v, scale=scale, precision=precision, block_q=block_q, block_k=block_k,
        key_bias=key_bias, **lists,
    )  # fmt: skip


def of_quantised(q, k, v, scale, precision, key_bias=None, keep=None):
    """(out, lse) in float64 of the numbers that the kernel multiplies, and what its lse may err."""
    B, H, Lq, D = q.shape
    Lk = k.shape[2]
    x = quantise(
        q, k, v, scale=scale, dtype=PRECISIONS[precision], values=True, ordered=False,
        key_bias=key_bias,
    )  # fmt: skip
    q8 = x.q.double() * x.q_scale[..., None].double()
    k8 = x.k.double() * x.k_scale.repeat_interleave(TILE, 2)[..., None].double()
    v8 = x.v.view(B, H, -1, D, TILE).double().transpose(-1, -2).flatten(2, 3)
    v8 = v8 * x.v_scale[:, :, None].double() + x.v_mean[:, :, None].double()
    ln_2 = 0.6931471805599453
    q8, k8, v8 = q8[:, :, :Lq] * ln_2, k8[:, :, :Lk], v8[:, :, :Lk]
    out, lse = reference.attention(q8, k8, v8, 1.0, key_bias, keep)
    allowed = 1e-4
    if precision == "fp8" and q.device.type == "cuda":
        allowed += FP8_SUMS * (q8 @ k8.mT).abs().max().item()
    return out, lse + x.q_shift[:, :, :Lq].double(), allowed


def check(q, k, v, keep, block_q, block_k, precision, key_bias=None):
    scale = q.shape[-1] ** -0.5
    tokens = None
    if keep is not None:
        tokens = expand_blocks(keep, block_q, block_k, q.shape[2], k.shape[2])
    out, lse = run(q, k, v, keep, block_q, block_k, scale, precision, key_bias)
    exact, exact_lse, allowed = of_quantised(q, k, v, scale, precision, key_bias, tokens)
    assert_within("lse", lse, exact_lse, allowed)
    assert relative(out, exact) < WEIGHT_ERROR
    exact, _ = reference.attention(q, k, v, scale, key_bias, tokens)
    assert relative(out, exact) < ERROR[precision]
    return out, lse


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_reference(case, precision, device):
    B, H, Lq, Lk, D, block_q, block_k = case
    q, k, v = reference.make(B, H, Lq, Lk, D, torch.bfloat16, device)
    keep = reference.random_keep(B, H, blocks(Lq, block_q), blocks(Lk, block_k), 0.4, device)
    out, _ = check(q, k + 2, v, keep, block_q, block_k, precision)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_lists_is_dense(precision, device):
    q, k, v = reference.make(1, 2, 150, 270, 128, torch.float16, device)
    check(q, k, v, None, 64, 64, precision)


@pytest.mark.parametrize("layout", ["BLHD", "packed"])
def test_reads_strided_inputs_in_place(layout, device):
    q, k, v = reference.make(2, 2, 130, 130, 64, torch.bfloat16, device, layout)
    check(q, k, v, reference.random_keep(2, 2, 3, 3, 0.5, device), 64, 64, "int8")


@pytest.mark.parametrize("keep", [True, False])
def test_key_bias_hides_padding(keep, device):
    q, k, v = reference.make(2, 1, 192, 200, 64, torch.bfloat16, device)
    bias = torch.randn(2, 200, device=device)
    bias[0, 150:] = float("-inf")
    bias[1, 10:140] = float("-inf")
    keep = reference.random_keep(2, 1, 3, 4, 0.5, device) if keep else None
    if keep is not None:
        keep[..., 0] = True
    check(q, k, v, keep, 64, 64, "int8", bias)


def test_rows_without_a_visible_key_are_zero(device):
    q, k, v = reference.make(1, 1, 128, 192, 64, torch.bfloat16, device)
    bias = torch.zeros(1, 192, device=device)
    bias[:, 64:128] = float("-inf")
    keep = torch.tensor([[[[False, True, False], [True, True, False]]]], device=device)
    out, lse = check(q, k, v + 3, keep, 64, 64, "int8", bias)
    assert (out[:, :, :64] == 0).all() and (lse[:, :, :64] == float("-inf")).all()


def test_query_block_with_no_key_blocks_is_zero(device):
    q, k, v = reference.make(1, 2, 192, 192, 64, torch.bfloat16, device)
    keep = torch.zeros(1, 2, 3, 3, dtype=torch.bool, device=device)
    out, lse = run(q, k, v + 3, keep, 64, 64, 0.1, "int8")
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_a_shared_offset_of_keys_or_values_costs_no_precision(device):
    q, k, v = reference.make(1, 1, 192, 256, 64, torch.bfloat16, device)
    k += 20 * torch.randn(64, device=device)
    v += 20 * torch.randn(64, device=device)
    exact, exact_lse = reference.attention(q, k, v, 0.125)
    out, lse = run(q, k, v, None, 64, 64, 0.125, "int8")
    assert relative(out, exact) < 0.01
    assert_within("lse", lse, exact_lse, 0.05)


def with_tail(L, keep, block_q, bias):
    """(options of the call, what each query reads) for L tokens whose means follow them."""
    N = blocks(L, 64)
    bits = BlockMask.from_dense(keep, block_q=block_q, block_k=64).bits
    indices, counts = unpack_mask(bits, N, more=blocks(N, 64))
    tokens = expand_blocks(keep, block_q, 64, L, N * 64)
    means = torch.nn.functional.pad(expand_blocks(~keep, block_q, 1, L, N), (0, -N % 64))
    options = {"kv_indices": indices, "kv_num_blocks": counts, "key_bias": bias, "tail": bits}
    return options, torch.cat([tokens, means], -1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("block_q, D, L", [(64, 64, 330), (128, 128, 330), (128, 64, 384)])
def test_a_tail_stands_for_what_is_skipped(block_q, D, L, precision, device):
    B, H = 2, 2
    q, k, v = reference.make(B, H, L, L, D, torch.bfloat16, device, "BLHD")
    order = reference.random_orders(B, H, L, device)
    mine = torch.zeros(B, L, device=device)
    # a bias of the caller's own
    mine[0, 70:80] = -2.0
    bias = whole_bias(mine)
    keep = reference.random_keep(B, H, blocks(L, block_q), blocks(L, 64), 0.4, device)
    options, read = with_tail(L, keep, block_q, bias)
    # keys share an offset, so the zeros behind the tokens and the means lie far from them
    q, k, v = arrange(q, order), arrange(k + 3, order, means=True), arrange(v, order, means=True)
    scale = D**-0.5
    out, lse = low_precision_attention(
        q, k, v, scale=scale, precision=precision, block_q=block_q, order=order, **options
    )
    assert out.transpose(1, 2).is_contiguous()
    out = out.gather(2, order.long()[..., None].expand_as(out))
    exact, exact_lse, allowed = of_quantised(q, k, v, scale, precision, bias, read)
    assert_within("lse", lse, exact_lse, allowed)
    assert relative(out, exact) < WEIGHT_ERROR
    exact, _ = reference.attention(q, k, v, scale, bias, read)
    assert relative(out, exact) < ERROR[precision]


def whole_bias(mine):
    """The tokens' bias, and that of the means behind them; -inf hides what only pads."""
    sizes = log_sizes(len(mine), mine.shape[1], mine, mine.device)
    pads = torch.full((len(mine), 64), float("-inf"), device=mine.device)
    return torch.cat(
        [mine, pads[:, : -mine.shape[1] % 64], sizes, pads[:, : -sizes.shape[1] % 64]], 1
    )


def check_tail(q, k, v, keep, block_q, mine=None):
    """Rows of q over the tokens of k and v, in their order, and the means of what `keep` skips."""
    B, H, L, _ = k.shape
    bias = whole_bias(torch.zeros(B, L, device=k.device) if mine is None else mine)
    order = torch.arange(L, device=k.device, dtype=torch.int32).expand(B, H, L)
    k, v = arrange(k, order, means=True), arrange(v, order, means=True)
    options, read = with_tail(L, keep, block_q, bias)
    read = read[:, :, : q.shape[2]]
    out, lse = low_precision_attention(
        q, k, v, scale=0.3, precision="int8", block_q=block_q, **options
    )  # fmt: skip
    exact, exact_lse, _ = of_quantised(q, k, v, 0.3, "int8", bias, read)
    assert_within("lse", lse, exact_lse, 1e-4)
    assert relative(out, exact) < WEIGHT_ERROR


@pytest.mark.parametrize("block_q, D", [(64, 64), (128, 128)])
def test_means_past_one_block_of_them_count(block_q, D, device):
    L = 64 * 65 + 5
    q, k, v = reference.make(1, 1, 64, L, D, torch.bfloat16, device)
    keep = torch.zeros(1, 1, 1, 66, dtype=torch.bool, device=device)
    keep[..., [0, 40, 65]] = True
    check_tail(q, k, v, keep, block_q)


@pytest.mark.parametrize("kept", [True, False], ids=["all", "none"])
@pytest.mark.parametrize("block_q, L", [(64, 600), (128, 576)])
def test_a_tail_of_rows_that_keep_all_or_none(block_q, L, kept, device):
    q, k, v = reference.make(1, 1, 100, L, 128, torch.bfloat16, device)
    keep = torch.full((1, 1, blocks(100, block_q), blocks(L, 64)), kept, device=device)
    check_tail(q, k, v, keep, block_q)


@pytest.mark.parametrize("block_q", [64, 128])
def test_a_tail_of_equal_keys_or_queries_of_zero(block_q, device):
    q, k, v = reference.make(1, 2, 128, 600, 128, torch.bfloat16, device)
    q[:, 0, 20:90] = 0
    k[:, 1] = k[:, 1, :1]
    check_tail(q, k, v, reference.random_keep(1, 2, 128 // block_q, 10, 0.4, device), block_q)


@pytest.mark.parametrize("where", ["front", "back", "both"])
@pytest.mark.parametrize("block_q", [64, 128])
def test_a_tail_with_a_bias_in_front_or_behind(block_q, where, device):
    L = 64 * 11 + 20
    q, k, v = reference.make(1, 1, 128, L, 128, torch.bfloat16, device)
    mine = torch.zeros(1, L, device=device)
    if where != "back":
        mine[:, :70] = 1.5
    if where != "front":
        mine[:, -200:] = -0.7
        # a whole block, so its mean, and a part of one
        mine[:, -100:] = float("-inf")
    keep = reference.random_keep(1, 1, 128 // block_q, 12, 0.4, device)
    check_tail(q, k, v, keep, block_q, mine)


@pytest.mark.parametrize("block_q", [64, 128])
def test_hidden_keys_at_the_end_of_a_list(block_q, device):
    # on Hopper the last pair of tiles goes first, so rows start without a key
    q, k, v = reference.make(1, 1, 128, 64 * 8, 64, torch.bfloat16, device)
    bias = torch.zeros(1, 64 * 8, device=device)
    bias[:, -256:] = float("-inf")
    keep = torch.ones(1, 1, 128 // block_q, 8, dtype=torch.bool, device=device)
    check(q, k, v, keep, block_q, 64, "int8", bias)


@pytest.mark.parametrize("heads", ["their own", "expanded", "strided"])
def test_an_order_says_where_rows_go(heads, device):
    B, H, L = 2, 3, 130
    q, k, v = reference.make(B, H, L, L, 64, torch.bfloat16, device)
    plain, lse = run(q, k, v, None, 64, 64, 0.125, "int8")
    order = reference.random_orders(B, H, L, device)
    if heads == "expanded":
        order = order[:1, :1].expand(B, H, L)
    elif heads == "strided":
        order = torch.cat([order, order], -1)[..., L:]
    out, same = low_precision_attention(q, k, v, scale=0.125, precision="int8", order=order)
    to = order.long()[..., None].expand_as(out)
    assert torch.equal(out.gather(2, to), plain) and torch.equal(same, lse)
    assert out.transpose(1, 2).is_contiguous()


def test_hidden_keys_and_values_spoil_nothing(device):
    q, k, v = reference.make(1, 1, 128, 192, 64, torch.bfloat16, device)
    bias = torch.zeros(1, 192, device=device)
    bias[:, 70:90] = float("-inf")
    clean, _ = run(q, k, v, None, 64, 64, 0.125, "int8", bias)
    k[:, :, 70:90] = 1e4
    v[:, :, 70:90] = 1e4
    assert torch.equal(run(q, k, v, None, 64, 64, 0.125, "int8", bias)[0], clean)


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
def test_errs_less_than_peers_where_channels_stand_out(outliers, device):
    q, k, v = reference.make(1, 2, 128, 512, 128, torch.bfloat16, device)
    k += 4 * torch.randn(1, 2, 1, 128, device=device)
    q[..., outliers] *= 4
    k[..., [17, *outliers]] *= 4
    v *= torch.randn(1, 2, 1, 128, device=device).exp()
    exact, _ = reference.attention(q, k, v, 0.09)
    out, _ = run(q, k, v, None, 64, 64, 0.09, "int8")
    assert relative(out, exact) < 1.02 * relative(emulated_peer(q, k, v, 0.09), exact)


def test_nan_in_a_query_stays_in_its_row(device):
    q, k, v = reference.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    clean, _ = run(q, k, v, None, 64, 64, 0.125, "int8")
    q[0, 0, 7, 3] = float("nan")
    out, lse = run(q, k, v, None, 64, 64, 0.125, "int8")
    assert out[0, 0, 7].isnan().all() and lse[0, 0, 7].isnan()
    out[0, 0, 7] = clean[0, 0, 7]
    assert torch.equal(out, clean)


def test_reads_nothing_beside_its_tensors(device):
    whole = [torch.full((1, 2, 400, 64), float("nan"), device=device) for _ in range(3)]
    q, k, v = (x.half()[:, :1, 100:230] for x in whole)
    for x, y in zip((q, k, v), reference.make(1, 1, 130, 130, 64, q.dtype, device), strict=True):
        x.copy_(y)
    check(q, k, v, torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device), 64, 64, "int8")


def test_two_runs_are_bit_equal(device):
    q, k, v = reference.make(1, 2, 256, 256, 128, torch.bfloat16, device)
    keep = reference.random_keep(1, 2, 4, 4, 0.5, device)
    first, second = (run(q, k, v, keep, 64, 64, 0.1, "int8") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_large_scores_do_not_overflow(device):
    q, k, v = reference.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    out, lse = run(q * 30, k, v, None, 64, 64, 1.0, "int8")
    _, exact_lse = reference.attention(q * 30, k, v, 1.0)
    assert torch.isfinite(out).all()
    assert_within("lse", lse / exact_lse, torch.ones_like(exact_lse), 0.05)


def test_refuses_what_it_cannot_serve(device):
    q, k, v = reference.make(1, 1, 64, 64, 64, torch.bfloat16, device)
    with pytest.raises(ValueError, match="needs the precision int8 or fp8, got int4"):
        run(q, k, v, None, 64, 64, 0.1, "int4")
    with pytest.raises(ValueError, match="needs blocks of 64 or 128 tokens, got 32 x 64"):
        run(q, k, v, None, 32, 64, 0.1, "int8")
    with pytest.raises(ValueError, match="`kv_num_blocks` must be"):
        keep = torch.ones(1, 1, 2, 1, dtype=torch.bool, device=device)
        run(q, k, v, keep, 64, 64, 0.1, "int8")
    with pytest.raises(ValueError, match="`order` must be"):
        order = torch.arange(64, device=device, dtype=torch.int32)
        low_precision_attention(q, k, v, scale=0.1, precision="int8", order=order)
    with pytest.raises(ValueError, match="A tail needs"):
        bits = torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=device)
        low_precision_attention(q, k, v, scale=0.1, precision="int8", tail=bits)
    with pytest.raises(ValueError, match="needs float16 or bfloat16, got float32"):
        run(q.float(), k.float(), v.float(), None, 64, 64, 0.1, "int8")
