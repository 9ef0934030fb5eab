"""Attention, sparse and dense, by every implementation, against float64."""

from dataclasses import replace

import pytest
import torch
from close import assert_as_accurate_as, assert_within

from sparse_attn.backends import reference
from tests.backends import inputs
from tests.backends.implementations import implementations

ATTENTION = pytest.mark.parametrize(
    "attention", implementations("attention", "torch", "triton", "hopper")
)
KERNELS = pytest.mark.parametrize("attention", implementations("attention", "triton", "hopper"))
# B, H, Lq, Lk, D, block_q, block_k
CASES = [
    (1, 1, 64, 64, 64, 64, 64),  # one block, an odd list
    (1, 2, 200, 331, 64, 64, 64),  # ragged last query block and last key block
    (2, 1, 192, 256, 128, 64, 64),  # batch; nothing ragged
    (1, 2, 300, 300, 128, 128, 64),  # the headline block size, ragged
    (1, 1, 200, 290, 128, 64, 128),  # a key block of two tiles, the second one empty
    (1, 1, 300, 450, 64, 128, 128),  # a ragged key block whose second tile holds keys
]
DTYPES = [torch.bfloat16, torch.float16]
# largest error seen against float64 is 2e-6 interpreted and 5e-6 on an H200
LSE_TOLERANCE = 2e-5


def name(case):
    return "B{}-H{}-Lq{}-Lk{}-D{}-q{}-k{}".format(*case)


def check(attention, q, k, v, scale=0.125, key_bias=None, **options):
    """Plain torch tells no LSE with a mask, and a bias passes through the dtype of q there."""
    out, lse = attention(q, k, v, scale=scale, key_bias=key_bias, **options)
    exact, exact_lse = inputs.exact_attention(q, k, v, scale, key_bias, **options)
    hidden = None if key_bias is None else key_bias.clamp_min(torch.finfo(q.dtype).min)
    same_dtype = inputs.torch_attention(q, k, v, scale, hidden, **options)
    assert_as_accurate_as("out", out, same_dtype, exact)
    if lse is not None and attention.args[1] != "torch":
        assert_within("lse", lse, exact_lse, LSE_TOLERANCE)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
@ATTENTION
def test_a_mask_keeps_blocks(attention, case, dtype, device):
    B, H, Lq, Lk, D, block_q, block_k = case
    q, k, v = inputs.make(B, H, Lq, Lk, D, dtype, device)
    mask = inputs.random_mask(B, H, Lq, Lk, block_q, block_k, device)
    out, _ = check(attention, q, k, v, mask=mask)
    # the host's layout is a view of the output
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:4], ids=name)
@ATTENTION
def test_without_a_mask_it_is_dense(attention, case, dtype, device):
    B, H, Lq, Lk, D, _, _ = case
    q, k, v = inputs.make(B, H, Lq, Lk, D, dtype, device)
    out, _ = check(attention, q, k, v)
    assert out.transpose(1, 2).is_contiguous() or attention.args[1] == "torch"


@pytest.mark.parametrize("layout", ["BLHD", "packed"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@ATTENTION
def test_reads_strided_inputs_in_place(attention, dense, layout, device):
    q, k, v = inputs.make(2, 2, 130, 130, 64, torch.bfloat16, device, layout)
    mask = None if dense else inputs.random_mask(2, 2, 130, 130, 64, 64, device)
    check(attention, q, k, v, mask=mask)


@KERNELS
def test_copies_rows_that_start_off_16_bytes(attention, device):
    q, k, v = inputs.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    q = torch.nn.functional.pad(q, (3, 2))[..., 3:67]
    check(attention, q, k, v, mask=inputs.random_mask(1, 1, 128, 128, 64, 64, device))


@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@ATTENTION
def test_key_bias_hides_padding(attention, dense, value, device):
    q, k, v = inputs.make(2, 1, 192, 300, 64, torch.bfloat16, device)
    bias = torch.randn(2, 300, device=device)
    # a whole first pair of tiles is hidden, so the maximum stays at -inf for a while
    bias[0, :140] = value
    bias[1, 100:] = value
    mask = None
    if not dense:
        mask = inputs.random_mask(2, 1, 192, 300, 64, 64, device)
        keep = mask.to_dense()
        # torch knows nothing of rows that see only finfo.min, so each row keeps a free block
        keep[0, ..., 3] = keep[1, ..., 0] = True
        mask = inputs.mask_of(keep, device)
    check(attention, q, k, v, key_bias=bias, mask=mask)


@pytest.mark.parametrize("block_q", [64, 128, None])
@ATTENTION
def test_a_bias_of_a_few_keys_reaches_those_alone(attention, block_q, device):
    q, k, v = inputs.make(2, 2, 200, 650, 64, torch.bfloat16, device)
    bias = inputs.few_biased_keys(2, 650, device)
    mask = block_q and inputs.random_mask(2, 2, 200, 650, block_q, 64, device)
    check(attention, q, k, v, key_bias=bias, mask=mask)


@ATTENTION
def test_rows_without_a_visible_key_are_zero_and_harm_no_other(attention, device):
    q, k, v, bias, mask = inputs.a_row_without_keys(device)
    out, lse = check(attention, q, k, v, key_bias=bias, mask=mask)
    assert (out[:, :, :64] == 0).all()
    assert lse is None or (lse[:, :, :64] == float("-inf")).all()


@ATTENTION
def test_means_are_no_keys_where_a_bias_hides_all(attention, device):
    q, k, v, bias, mask = inputs.a_row_without_keys(device)
    means = reference.permute(None, k, v, torch.arange(192, device=device).expand(1, 1, 192), bias)
    hidden = replace(means.pooled, log_sizes=torch.full((1, 3), float("-inf"), device=device))
    out, _ = check(attention, q, k, v, key_bias=bias, mask=mask, pooled=hidden)
    assert (out[:, :, :64] == 0).all()


@ATTENTION
def test_keys_hidden_everywhere_give_zero(attention, device):
    q, k, v = inputs.make(2, 1, 64, 130, 64, torch.bfloat16, device)
    bias = torch.zeros(2, 130, device=device)
    bias[0] = float("-inf")
    out, lse = attention(q, k, v, scale=0.125, key_bias=bias)
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all()
    assert torch.isfinite(out[1]).all()


@ATTENTION
def test_a_row_that_keeps_no_block_is_zero(attention, device):
    q, k, v = inputs.make(1, 2, 192, 192, 64, torch.bfloat16, device)
    mask = inputs.mask_of(torch.zeros(1, 2, 3, 3), device)
    out, lse = attention(q, k, v, scale=0.1, mask=mask)
    assert (out == 0).all() and (lse is None or (lse == float("-inf")).all())


@pytest.mark.parametrize("block_k", [64, 128])
@ATTENTION
def test_reads_only_what_the_mask_keeps(attention, block_k, device):
    q, k, v = inputs.make(1, 1, 192, 470, 64, torch.bfloat16, device)
    keep = inputs.random_mask(1, 1, 192, 470, 64, block_k, device).to_dense()
    keep[:, :, 1] = keep[:, :, 0]
    mask = inputs.mask_of(keep, device, 64, block_k)
    out, lse = attention(q, k, v, scale=0.125, mask=mask)
    unread = ~keep.any(2)[0, 0].repeat_interleave(block_k)[:470]
    assert unread.any()
    k[:, :, unread] = float("nan")
    v[:, :, unread] = float("nan")
    poisoned_out, poisoned_lse = attention(q, k, v, scale=0.125, mask=mask)
    assert torch.equal(out, poisoned_out) and (lse is None or torch.equal(lse, poisoned_lse))


def test_copies_rows_that_lie_too_far_apart():
    pytest.importorskip("triton")
    from sparse_attn.backends.triton.launch import aligned

    x = torch.zeros(1, 1, 2, 2**23, dtype=torch.bfloat16)
    assert aligned(x[..., :64]).stride(2) == 64
    near = x.view(1, 1, 4, 2**22)[..., :64]
    assert aligned(near) is near


def test_copies_what_lies_in_order_but_begins_off_16_bytes():
    pytest.importorskip("triton")
    from sparse_attn.backends.triton.launch import aligned

    x = torch.arange(2 * 3 * 8 * 64 + 1, dtype=torch.float32).half()[1:].view(2, 3, 8, 64)
    assert x.is_contiguous() and x.data_ptr() % 16
    assert aligned(x).data_ptr() % 16 == 0 and torch.equal(aligned(x), x)


@KERNELS
def test_reads_nothing_beside_its_tensors(attention, device):
    whole = [torch.full((1, 2, 400, 64), float("nan"), device=device) for _ in range(3)]
    q, k, v = (x.half()[:, :1, 100:230] for x in whole)
    for x, y in zip((q, k, v), inputs.make(1, 1, 130, 130, 64, q.dtype, device), strict=True):
        x.copy_(y)
    check(attention, q, k, v, mask=inputs.mask_of(torch.ones(1, 1, 3, 3), device))


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@ATTENTION
def test_nan_in_a_query_stays_in_its_row(attention, dense, device):
    q, k, v = inputs.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    mask = None if dense else inputs.mask_of(torch.ones(1, 1, 2, 2), device)
    clean, _ = attention(q, k, v, scale=0.125, mask=mask)
    q[0, 0, 7, 3] = float("nan")
    out, lse = attention(q, k, v, scale=0.125, mask=mask)
    assert out[0, 0, 7].isnan().all() and (lse is None or lse[0, 0, 7].isnan())
    out[0, 0, 7] = clean[0, 0, 7]
    assert_within("out", out, clean.double(), 0.0 if attention.args[1] != "torch" else 1e-2)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@ATTENTION
def test_two_runs_are_bit_equal(attention, dense, device):
    q, k, v = inputs.make(1, 2, 256, 256, 128, torch.bfloat16, device)
    mask = None if dense else inputs.random_mask(1, 2, 256, 256, 64, 64, device)
    first, second = (attention(q, k, v, scale=0.1, mask=mask) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1] is None or torch.equal(first[1], second[1])


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@KERNELS
def test_large_scores_do_not_overflow(attention, dense, device):
    q, k, v = inputs.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    mask = None if dense else inputs.mask_of(torch.ones(1, 1, 2, 2), device)
    exact, exact_lse = inputs.exact_attention(q * 30, k, v, 1.0)
    out, lse = attention(q * 30, k, v, scale=1.0, mask=mask)
    assert_as_accurate_as("out", out, inputs.torch_attention(q * 30, k, v, 1.0), exact)
    assert_within("lse", lse / exact_lse, torch.ones_like(exact_lse), 1e-5)


@KERNELS
def test_refuses_what_does_not_belong_together(attention, device):
    q, k, v = inputs.make(1, 2, 128, 128, 64, torch.bfloat16, device)
    mask = inputs.mask_of(torch.ones(1, 2, 2, 2), device)
    means = reference.permute(q, k, v, inputs.random_orders(1, 2, 128, device)).pooled
    for wrong, said in (
        ({"mask": inputs.mask_of(torch.ones(1, 2, 3, 2), device)}, "mask must be of 2 x 2 blocks"),
        ({"mask": inputs.mask_of(torch.ones(1, 2, 2, 9), device)}, "mask must be of 2 x 2 blocks"),
        ({"key_bias": torch.zeros(1, 127, device=device)}, "`key_bias` must be [1, 128]"),
        (
            {"order": torch.arange(128, device=device)},
            "`order` must be [1, 2, 128] int32, got [128]",
        ),
        ({"pooled": means}, "Pooled keys need a mask"),
    ):
        with pytest.raises(ValueError) as error:
            attention(q, k, v, scale=0.1, **wrong)
        assert said in str(error.value)
    with pytest.raises(ValueError, match="q, k and v must have one batch"):
        attention(q, k[:, :1], v[:, :1], scale=0.1, mask=mask)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@ATTENTION
def test_every_head_puts_its_rows_where_its_order_says(attention, dense, device):
    q, k, v = inputs.make(2, 2, 200, 200, 64, torch.bfloat16, device)
    mask = None if dense else inputs.random_mask(2, 2, 200, 200, 64, 64, device)
    plain, plain_lse = attention(q, k, v, scale=0.1, mask=mask)
    order = inputs.random_orders(2, 2, 200, device)
    for some in (order, order[:, :1], order[:1], torch.cat([order, order], -1)[..., 200:]):
        shared = some.expand(2, 2, 200)
        out, lse = attention(q, k, v, scale=0.1, mask=mask, order=shared)
        assert torch.equal(out.gather(2, shared.long()[..., None].expand_as(out)), plain)
        assert lse is None or torch.equal(lse, plain_lse)


# B, H, Lq, Lk, block_q, block_k, D
TAILS = [
    (2, 2, 330, 330, 64, 64, 64),  # a ragged block and one tile of means
    (2, 2, 330, 330, 128, 64, 128),
    (2, 2, 330, 330, 128, 128, 128),
    (1, 1, 200, 64 * 66, 64, 64, 64),  # two tiles of means, the second one short
    (1, 1, 200, 64 * 129 + 3, 128, 64, 64),  # three, and a ragged block
    (1, 1, 200, 128 * 65 + 70, 128, 128, 64),
]


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("case", TAILS, ids=lambda c: "B{}-H{}-Lq{}-Lk{}-{}x{}-D{}".format(*c))
@ATTENTION
def test_means_stand_for_what_a_row_does_not_keep(attention, case, biased, device):
    B, H, Lq, Lk, block_q, block_k, D = case
    q, k, v = inputs.make(B, H, Lq, Lk, D, torch.bfloat16, device, "BLHD")
    order, key_order = (inputs.random_orders(B, H, L, device) for L in (Lq, Lk))
    bias = None
    if biased:
        # heads that share a bias share an order
        key_order = key_order[:, :1].expand(B, H, Lk)
        bias = torch.zeros(B, Lk, device=device)
        bias[0, 70:80] = -2.0
        bias[0, -3:] = float("-inf")
    moved = reference.permute(None, k, v, key_order, bias)
    check(
        attention, q, moved.k, moved.v, D**-0.5, moved.key_bias, order=order,
        pooled=moved.pooled.of_blocks(Lk, block_k),
        mask=inputs.random_mask(B, H, Lq, Lk, block_q, block_k, device),
    )  # fmt: skip


@pytest.mark.parametrize("kept", [True, False], ids=["all", "none"])
@ATTENTION
def test_means_of_rows_that_keep_all_or_none(attention, kept, device):
    q, k, v = inputs.make(1, 1, 100, 600, 64, torch.bfloat16, device)
    order = inputs.random_orders(1, 1, 600, device)
    moved = reference.permute(None, k, v, order)
    mask = inputs.mask_of(torch.full((1, 1, 2, 10), kept), device)
    check(attention, q, moved.k, moved.v, mask=mask, pooled=moved.pooled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="4 GiB and a long walk on a CPU")
@KERNELS
def test_offsets_past_two_to_the_31(attention, device):
    q, k, v = inputs.make(1, 32, 180_000, 180_000, 128, torch.float16, device, "packed")
    assert q.stride(2) * q.shape[2] > 2**31
    rows = inputs.blocks(180_000, 64)
    # every row reads the last block, which lies past 2^31 elements, and its own
    keep = torch.eye(rows, dtype=torch.bool)
    keep[-1, -2] = keep[:, -1] = True
    mask = inputs.mask_of(keep.expand(1, 32, rows, rows), device)
    out, _ = attention(q, k, v, scale=0.09, mask=mask)
    ends = [slice(64 * (rows - 2), 64 * (rows - 1)), slice(64 * (rows - 1), 180_000)]
    keys = torch.cat([k[:, -1:, end] for end in ends], 2)
    values = torch.cat([v[:, -1:, end] for end in ends], 2)
    query = q[:, -1:, ends[0]]
    exact, _ = inputs.exact_attention(query, keys, values, 0.09)
    same_dtype = inputs.torch_attention(query, keys, values, 0.09)
    assert_as_accurate_as("out", out[:, -1:, ends[0]], same_dtype, exact)
