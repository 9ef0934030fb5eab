import pytest
import torch

pytest.importorskip("triton")

from close import assert_as_accurate_as, assert_within

from sparse_attn.backends.reference import expand_blocks
from sparse_attn.backends.tiles import Tile
from sparse_attn.backends.triton.attention import sparse_attention
from sparse_attn.backends.triton.permute import arrange
from sparse_attn.backends.triton.unpack_mask import unpack_mask
from sparse_attn.block_mask import BlockMask
from tests.backends import kernel_reference as reference

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


def blocks(length, block):
    return -(-length // block)


def run(q, k, v, keep, block_q, block_k, scale, key_bias=None):
    indices, counts = reference.lists(keep)
    return sparse_attention(
        q, k, v, indices, counts, block_q=block_q, block_k=block_k, scale=scale, key_bias=key_bias
    )


def check(q, k, v, keep, block_q, block_k, key_bias=None):
    scale = q.shape[-1] ** -0.5
    tokens = expand_blocks(keep, block_q, block_k, q.shape[2], k.shape[2])
    exact, exact_lse = reference.attention(q, k, v, scale, key_bias, tokens)
    same_dtype = reference.torch_attention(q, k, v, scale, key_bias, tokens)
    out, lse = run(q, k, v, keep, block_q, block_k, scale, key_bias)
    assert_as_accurate_as("out", out, same_dtype, exact)
    assert_within("lse", lse, exact_lse, LSE_TOLERANCE)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_matches_reference(case, dtype, device):
    B, H, Lq, Lk, D, block_q, block_k = case
    q, k, v = reference.make(B, H, Lq, Lk, D, dtype, device)
    keep = reference.random_keep(B, H, blocks(Lq, block_q), blocks(Lk, block_k), 0.4, device)
    out, _ = check(q, k, v, keep, block_q, block_k)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", ["BLHD", "packed"])
def test_reads_strided_inputs_in_place(layout, device):
    q, k, v = reference.make(2, 2, 130, 130, 64, torch.bfloat16, device, layout)
    keep = reference.random_keep(2, 2, 3, 3, 0.5, device)
    check(q, k, v, keep, 64, 64)


def test_copies_rows_that_start_off_16_bytes(device):
    q, k, v = reference.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    q = torch.nn.functional.pad(q, (3, 2))[..., 3:67]
    keep = reference.random_keep(1, 1, 2, 2, 0.5, device)
    check(q, k, v, keep, 64, 64)


@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
def test_key_bias_hides_padding(value, device):
    B, H, Lq, Lk = 2, 1, 192, 200
    q, k, v = reference.make(B, H, Lq, Lk, 64, torch.bfloat16, device)
    bias = torch.randn(B, Lk, device=device)
    bias[0, 150:] = value
    bias[1, 10:140] = value
    keep = reference.random_keep(B, H, 3, 4, 0.5, device)
    # torch knows nothing of rows that see only finfo.min, so each row keeps a free block
    keep[..., 0] = True
    keep[0, :, 2] = False
    hidden = bias.clamp_min(torch.finfo(torch.bfloat16).min) if value != float("-inf") else bias
    check(q, k, v, keep, 64, 64, hidden)


@pytest.mark.parametrize("block_q", [64, 128])
def test_a_bias_of_a_few_keys_reaches_those_alone(block_q, device):
    B, H, Lq, Lk = 2, 2, 200, 650
    q, k, v = reference.make(B, H, Lq, Lk, 64, torch.bfloat16, device)
    bias = reference.few_biased_keys(B, Lk, device)
    keep = reference.random_keep(B, H, -(-Lq // block_q), -(-Lk // 64), 0.5, device)
    check(q, k, v, keep, block_q, 64, bias)


def test_rows_without_a_visible_key_are_zero_and_harm_no_other(device):
    q, k, v = reference.make(1, 1, 128, 192, 64, torch.bfloat16, device)
    bias = torch.zeros(1, 192, device=device)
    bias[:, 64:128] = float("-inf")
    keep = torch.tensor([[[[False, True, False], [True, True, False]]]], device=device)
    out, lse = check(q, k, v, keep, 64, 64, bias)
    assert (out[:, :, :64] == 0).all() and (lse[:, :, :64] == float("-inf")).all()


def test_query_block_with_no_key_blocks_is_zero(device):
    q, k, v = reference.make(1, 2, 192, 192, 64, torch.bfloat16, device)
    keep = torch.zeros(1, 2, 3, 3, dtype=torch.bool, device=device)
    out, lse = run(q, k, v, keep, 64, 64, 0.1)
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("block_k", [64, 128])
def test_reads_only_listed_blocks(block_k, device):
    q, k, v = reference.make(1, 1, 192, 470, 64, torch.bfloat16, device)
    keep = reference.random_keep(1, 1, 3, blocks(470, block_k), 0.5, device)
    keep[:, :, 1] = keep[:, :, 0]
    scale = 0.125
    out, lse = run(q, k, v, keep, 64, block_k, scale)
    unread = ~keep.any(2)[0, 0].repeat_interleave(block_k)[:470]
    assert unread.any()
    k[:, :, unread] = float("nan")
    v[:, :, unread] = float("nan")
    poisoned_out, poisoned_lse = run(q, k, v, keep, 64, block_k, scale)
    assert torch.equal(out, poisoned_out) and torch.equal(lse, poisoned_lse)


def test_reads_nothing_beside_its_tensors(device):
    whole = [torch.full((1, 2, 400, 64), float("nan"), device=device) for _ in range(3)]
    q, k, v = (x.half()[:, :1, 100:230] for x in whole)
    for x, y in zip((q, k, v), reference.make(1, 1, 130, 130, 64, q.dtype, device), strict=True):
        x.copy_(y)
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device)
    check(q, k, v, keep, 64, 64)


def test_nan_in_a_query_stays_in_its_row(device):
    q, k, v = reference.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
    clean, _ = run(q, k, v, keep, 64, 64, 0.125)
    q[0, 0, 7, 3] = float("nan")
    out, lse = run(q, k, v, keep, 64, 64, 0.125)
    assert out[0, 0, 7].isnan().all() and lse[0, 0, 7].isnan()
    out[0, 0, 7] = clean[0, 0, 7]
    assert torch.equal(out, clean)


def test_two_runs_are_bit_equal(device):
    q, k, v = reference.make(1, 2, 256, 256, 128, torch.bfloat16, device)
    keep = reference.random_keep(1, 2, 4, 4, 0.5, device)
    first, second = (run(q, k, v, keep, 64, 64, 0.1) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_keeping_every_block_is_dense(device):
    q, k, v = reference.make(1, 1, 150, 150, 128, torch.float16, device)
    keep = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device)
    exact, _ = reference.attention(q, k, v, 0.1)
    out, _ = run(q, k, v, keep, 64, 64, 0.1)
    assert_as_accurate_as("out", out, reference.torch_attention(q, k, v, 0.1), exact)


def test_large_scores_do_not_overflow(device):
    q, k, v = reference.make(1, 1, 128, 128, 64, torch.bfloat16, device)
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
    exact, exact_lse = reference.attention(q * 30, k, v, 1.0)
    out, lse = run(q * 30, k, v, keep, 64, 64, 1.0)
    same_dtype = reference.torch_attention(q * 30, k, v, 1.0)
    assert_as_accurate_as("out", out, same_dtype, exact)
    assert_within("lse", lse / exact_lse, torch.ones_like(exact_lse), 1e-5)


def test_refuses_what_it_cannot_serve(device):
    q, k, v = reference.make(1, 1, 64, 64, 64, torch.float32, device)
    keep = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="needs float16 or bfloat16, got float32"):
        run(q, k, v, keep, 64, 64, 0.1)
    q, k, v = (x.half() for x in (q, k, v))
    with pytest.raises(ValueError, match="needs blocks of 64 or 128 tokens, got 32 x 64"):
        run(q, k, v, keep, 32, 64, 0.1)
    with pytest.raises(ValueError, match="`kv_num_blocks` must be"):
        run(q, k, v, keep.expand(1, 1, 2, 1), 64, 64, 0.1)
    with pytest.raises(ValueError, match="head_dim 64 or 128, got 32"):
        run(q[..., :32], k[..., :32], v[..., :32], keep, 64, 64, 0.1)


TILES = [
    Tile(64, 32, 4, 2),  # pointers, four tiles to a block of 128 keys
    Tile(64, 64, 4, 2),  # pointers, a pair of tiles to a block of 128 keys
    Tile(64, 32, 4, 3, tma=True),
    Tile(64, 64, 4, 3, tma=True, hopper=True),
    Tile(128, 64, 4, 6, tma=True, hopper=True),
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="interpreted kernels have one tile")
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
@pytest.mark.parametrize("biased", [False, True])
def test_every_tile_gives_the_same(tile, layout, biased, device):
    if tile.tma and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs TMA")
    if tile.hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    q, k, v = reference.make(2, 3, 1000, 1111, 128, torch.bfloat16, device, layout)
    bias = torch.randn(2, 1111, device=device) if biased else None
    keep = reference.random_keep(2, 3, blocks(1000, tile.tile_q), 9, 0.3, device)
    tokens = expand_blocks(keep, tile.tile_q, 128, 1000, 1111)
    exact, exact_lse = reference.attention(q, k, v, 0.09, bias, tokens)
    indices, counts = reference.lists(keep)
    out, lse = sparse_attention(
        q, k, v, indices, counts,
        block_q=tile.tile_q, block_k=128, scale=0.09, key_bias=bias, tile=tile,
    )  # fmt: skip
    same_dtype = reference.torch_attention(q, k, v, 0.09, bias, tokens)
    assert_as_accurate_as("out", out, same_dtype, exact)
    assert_within("lse", lse, exact_lse, LSE_TOLERANCE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="4 GiB and a long walk on a CPU")
def test_offsets_past_two_to_the_31(device):
    q, k, v = reference.make(1, 32, 180_000, 180_000, 128, torch.float16, device, "packed")
    assert q.stride(2) * q.shape[2] > 2**31
    rows = blocks(180_000, 64)
    # every row reads the last block, which lies past 2^31 elements, and its own
    own = torch.arange(rows, device=device).clamp_max(rows - 2)
    indices = torch.stack([own, torch.full_like(own, rows - 1)], -1).int()
    indices = indices.expand(1, 32, rows, 2)
    counts = torch.full((1, 32, rows), 2, dtype=torch.int32, device=device)
    out, _ = sparse_attention(q, k, v, indices, counts, block_q=64, block_k=64, scale=0.09)
    ends = [slice(64 * (rows - 2), 64 * (rows - 1)), slice(64 * (rows - 1), 180_000)]
    keys = torch.cat([k[:, -1:, end] for end in ends], 2)
    values = torch.cat([v[:, -1:, end] for end in ends], 2)
    query = q[:, -1:, ends[0]]
    exact, _ = reference.attention(query, keys, values, 0.09)
    same_dtype = reference.torch_attention(query, keys, values, 0.09)
    assert_as_accurate_as("out", out[:, -1:, ends[0]], same_dtype, exact)


def test_every_head_puts_its_rows_where_its_order_says(device):
    q, k, v = reference.make(2, 2, 200, 200, 64, torch.bfloat16, device)
    keep = reference.random_keep(2, 2, 4, 4, 0.5, device)
    indices, counts = reference.lists(keep)
    options = {"block_q": 64, "block_k": 64, "scale": 0.1}
    plain, plain_lse = sparse_attention(q, k, v, indices, counts, **options)
    order = reference.random_orders(2, 2, 200, device)
    for some in (order, order[:, :1], order[:1]):
        shared = some.expand(2, 2, 200)
        out, lse = sparse_attention(q, k, v, indices, counts, order=shared, **options)
        assert torch.equal(out.gather(2, shared.long()[..., None].expand_as(out)), plain)
        assert torch.equal(lse, plain_lse)
    with pytest.raises(ValueError, match=r"`order` must be \[2, 2, 200\] int32, got \[200\]"):
        sparse_attention(q, k, v, indices, counts, order=order[0, 0], **options)


# B, H, Lq, Lk, block_q, D
TAILS = [
    (2, 2, 330, 330, 64, 64),  # a ragged block and one tile of means
    (2, 2, 330, 330, 128, 128),
    (1, 1, 200, 64 * 66, 64, 64),  # two tiles of means, the second one short
    (1, 1, 200, 64 * 129 + 3, 128, 64),  # three, and a ragged block
]


@pytest.mark.parametrize("case", TAILS, ids=lambda c: "B{}-H{}-Lq{}-Lk{}-q{}-D{}".format(*c))
def test_pooled_tail_matches_reference(case, device):
    B, H, Lq, Lk, block_q, D = case
    q, k, v = reference.make(B, H, Lq, Lk, D, torch.bfloat16, device, "BLHD")
    order, key_order = (reference.random_orders(B, H, L, device) for L in (Lq, Lk))
    N = blocks(Lk, 64)
    more = blocks(N, 64)
    keep = reference.random_keep(B, H, blocks(Lq, block_q), N, 0.4, device)
    bits = BlockMask.from_dense(keep, block_q=block_q, block_k=64).bits
    bias = torch.full((B, (N + more) * 64), float("-inf"), device=device)
    bias[:, :Lk] = 0.0
    sizes = (Lk - torch.arange(0, Lk, 64, device=device)).clamp(max=64)
    bias[:, N * 64 : N * 64 + N] = sizes.log()
    # a key bias of the caller's own, and a block without a stand-in
    bias[0, 70:80] = -2.0
    bias[0, N * 64 + 1] = float("-inf")
    q_ = arrange(q, order)
    k_, v_ = arrange(k, key_order, means=True), arrange(v, key_order, means=True)
    indices, counts = unpack_mask(bits, N, more=more)
    scale = D**-0.5
    out, lse = sparse_attention(
        q_, k_, v_, indices, counts, block_q=block_q, block_k=64, scale=scale, key_bias=bias,
        tail=bits, order=order,
    )  # fmt: skip

    tokens = expand_blocks(keep, block_q, 64, Lq, N * 64)
    stand_ins = expand_blocks(~keep, block_q, 1, Lq, N)
    none = torch.zeros(B, H, Lq, more * 64 - N, dtype=torch.bool, device=device)
    read = torch.cat([tokens, stand_ins, none], -1)
    exact, exact_lse = reference.attention(q_, k_, v_, scale, bias, read)
    same_dtype = reference.torch_attention(q_, k_, v_, scale, bias, read)
    assert out.transpose(1, 2).is_contiguous()
    out = out.gather(2, order.long()[..., None].expand_as(out))
    assert_as_accurate_as("out", out, same_dtype, exact)
    assert_within("lse", lse, exact_lse, LSE_TOLERANCE)


def test_refuses_a_tail_that_does_not_fit(device):
    q = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    k = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=device)
    indices = torch.zeros(1, 1, 1, 2, dtype=torch.int32, device=device)
    counts = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    bits = torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=device)
    options = {"block_q": 64, "scale": 0.1, "tail": bits}
    with pytest.raises(ValueError, match="A tail needs"):
        sparse_attention(q, k, k, indices, counts, block_k=64, **options)
    options["key_bias"] = torch.zeros(1, 128, device=device)
    with pytest.raises(ValueError, match="A tail needs"):
        sparse_attention(q, k, k, indices, counts, block_k=128, **options)
    options["tail"] = bits.expand(1, 1, 1, 2)
    with pytest.raises(ValueError, match="`tail` must be"):
        sparse_attention(q, k, k, indices, counts, block_k=64, **options)
