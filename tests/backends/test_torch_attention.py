import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from close import assert_as_accurate_as, assert_within

from sparse_attn.backends import reference
from sparse_attn.backends.torch import attention as module
from sparse_attn.backends.torch import block_masses as masses_module
from sparse_attn.backends.torch.attention import attention
from sparse_attn.backends.torch.block_masses import block_masses
from sparse_attn.backends.torch.permute import permute
from sparse_attn.backends.torch.unpack_mask import unpack_mask
from sparse_attn.block_mask import BlockMask

BENCH = Path(__file__).parents[1] / "bench" / "bench_eager.py"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(B, H, L, D, dtype=torch.float32, device="cpu", packed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if packed:
        # q, k and v side by side, as a fused projection leaves them
        x = torch.randn(B, L, 3, H, D, generator=generator).to(device, dtype)
        return x.permute(2, 0, 3, 1, 4).unbind(0)
    return torch.randn(3, B, H, L, D, generator=generator).to(device, dtype).unbind(0)


def random_keep(B, H, N, density=0.4, seed=0):
    """Random blocks; every row keeps the first, the first row all, the last row the last."""
    keep = torch.rand(B, H, N, N, generator=torch.Generator().manual_seed(seed)) < density
    keep[..., 0] = True
    keep[:, :, 0] = True
    keep[:, :, -1, -1] = True
    return keep


def run_sparse(q, k, v, keep, block, scale, key_bias=None, block_k=None):
    blocks = {"block_q": block, "block_k": block_k or block}
    mask = BlockMask.from_dense(keep.to(q.device), **blocks)
    out, lse = attention(q, k, v, scale=scale, key_bias=key_bias, mask=mask)
    assert lse is None
    return out


def some_bias(B, L, device):
    """Padding at the end of every video but the first, and a bias on some of the rest."""
    bias = torch.zeros(B, L, device=device)
    bias[:, 5:15] = torch.linspace(-3, 2, 10, device=device)
    bias[1:, L - L // 6 :] = -1e30
    return bias


CASES = [
    # B, H, L, D, block, packed, biased
    (1, 1, 64, 64, 64, False, False),  # one block
    (1, 2, 512, 64, 64, False, False),
    (2, 3, 333, 64, 64, True, False),  # batch, ragged, strided
    (1, 2, 450, 128, 64, True, True),  # head_dim 128, a key bias
    (2, 1, 400, 64, 128, False, True),  # blocks of 128, batch of biases
    (1, 2, 513, 128, 128, True, False),  # the last block holds one token
    (1, 1, 20, 64, 64, False, False),  # less than one block
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "B{}-H{}-L{}-D{}-b{}-packed{}-bias{}".format(*c)
)
def test_sparse_attention_matches_float64(case, dtype, device):
    B, H, L, D, block, packed, biased = case
    q, k, v = make(B, H, L, D, dtype, device, packed)
    keep = random_keep(B, H, -(-L // block)).to(device)
    bias = some_bias(B, L, device) if biased else None
    scale = D**-0.5
    out = run_sparse(q, k, v, keep, block, scale, bias)
    options = {"block_q": block, "block_k": block, "scale": scale}
    exact, _ = reference.sparse_attention(
        q.double(), k.double(), v.double(), keep, **options,
        key_bias=None if bias is None else bias.double(),
    )  # fmt: skip
    same, _ = reference.sparse_attention(q, k, v, keep, **options, key_bias=bias)
    assert out.dtype == dtype
    # no truncation here, unlike in the interpreter that the shared helper makes room for
    assert_as_accurate_as("out", out, same, exact, factor=1.0)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_tall_blocks_match_float64(biased, device):
    q, k, v = make(2, 2, 450, 64, torch.float32, device)
    keep = random_keep(2, 2, 8)[:, :, ::2].to(device)
    bias = some_bias(2, 450, device) if biased else None
    options = {"block_q": 128, "block_k": 64, "scale": 0.125}
    exact, _ = reference.sparse_attention(
        q.double(), k.double(), v.double(), keep, **options,
        key_bias=None if bias is None else bias.double(),
    )  # fmt: skip
    assert_within("out", run_sparse(q, k, v, keep, 128, 0.125, bias, block_k=64), exact, 1e-6)


def test_keeping_everything_is_dense_attention():
    q, k, v = make(1, 2, 333, 64)
    keep = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    exact, _ = reference.dense_attention(q.double(), k.double(), v.double(), scale=0.125)
    assert_within("out", run_sparse(q, k, v, keep, 64, 0.125), exact, 1e-6)


def test_reads_only_the_listed_blocks():
    q, k, v = make(1, 2, 256, 64)
    keep = torch.eye(4, dtype=torch.bool).repeat(1, 2, 1, 1)
    keep[..., 0] = True
    keep[:, :, :, 3] = False
    clean = run_sparse(q, k, v, keep, 64, 0.125)
    k[..., 192:, :] = float("nan")
    v[..., 192:, :] = float("nan")
    assert torch.equal(run_sparse(q, k, v, keep, 64, 0.125), clean)


@pytest.mark.parametrize("attend", [module._attend_rows, module._attend_batches])
@pytest.mark.parametrize("block_q", [64, 128])
def test_averages_stand_for_what_is_not_listed(attend, block_q, monkeypatch):
    monkeypatch.setattr(module, "_attend_rows", attend)
    q, k, v = make(2, 2, 500, 64, packed=True)
    # the bias goes with the first head, so it is on tokens that have the same place in both
    order = torch.stack([torch.randperm(300) for _ in range(4)]).view(2, 2, 300)
    order = torch.cat([order, torch.arange(300, 500).expand(2, 2, -1)], -1).int()
    keep, bias = random_keep(2, 2, 8), some_bias(2, 500, "cpu")
    bias[:, :300] = 0
    keep = keep[:, :, :: block_q // 64].contiguous()
    # this row reads averages alone
    keep[0, 1, 2] = False
    found = permute(q, k, v, order, bias)
    out, _ = attention(
        found.q, found.k, found.v, scale=0.125, key_bias=found.key_bias, pooled=found.pooled,
        mask=BlockMask.from_dense(keep, block_q=block_q, block_k=64), order=order,
    )  # fmt: skip
    blocks = {"block_q": block_q, "block_k": 64, "scale": 0.125}
    exact, _ = reference.sparse_attention_with_tail(
        q.double(), k.double(), v.double(), keep, order, key_bias=bias.double(), **blocks
    )
    assert_within("out", out, exact, 2e-6)
    flat = out.transpose(1, 2).flatten(2)
    assert flat.data_ptr() == out.data_ptr(), "a view in the host's layout"


@pytest.mark.parametrize("num_k", [9, 64])
@pytest.mark.parametrize("pooled", [0, 2])
def test_lists_are_ascending_packed_left_and_end_with_pooled_blocks(num_k, pooled):
    keep = torch.rand(1, 2, 5, num_k) < 0.4
    keep[0, 0, 0], keep[0, 0, 1] = False, True
    mask = BlockMask.from_dense(keep, block_q=64, block_k=64)
    indices, counts = unpack_mask(mask, pooled)
    assert indices.dtype == counts.dtype == torch.int32
    rows = (x.flatten(0, 2) for x in (keep, indices))
    for row, listed, count in zip(*rows, counts.flatten().tolist(), strict=True):
        last = range(num_k, num_k + pooled)
        assert listed[:count].tolist() == [*row.nonzero()[:, 0].tolist(), *last]


def test_a_row_that_lists_no_block_is_zero():
    q, k, v = make(1, 2, 200, 64)
    keep = random_keep(1, 2, 4)
    keep[0, 1, 2] = False
    out = run_sparse(q, k, v, keep, 64, 0.125)
    assert (out[0, 1, 128:192] == 0).all()
    exact, _ = reference.sparse_attention(
        q.double(), k.double(), v.double(), keep, block_q=64, block_k=64, scale=0.125
    )
    assert_within("out", out, exact, 1e-6)


@pytest.mark.parametrize("room", [1, 2 * 64 * 4 * 512, module.BATCH_BYTES])
def test_batches_of_rows_agree_with_single_rows(room, monkeypatch):
    """Other devices attend many rows at once."""
    q, k, v = make(2, 2, 500, 64)
    keep, bias = random_keep(2, 2, 8), some_bias(2, 500, "cpu")
    keep[0, 1, 3] = False
    single = run_sparse(q, k, v, keep, 64, 0.125, bias)
    monkeypatch.setattr(module, "_attend_rows", module._attend_batches)
    monkeypatch.setattr(module, "BATCH_BYTES", room)
    assert_within("out", run_sparse(q, k, v, keep, 64, 0.125, bias), single.double(), 2e-6)


def test_nan_stays_visible():
    q, k, v = make(1, 2, 256, 64)
    q[0, 1, 70, 3] = float("nan")
    out = run_sparse(q, k, v, random_keep(1, 2, 4), 64, 0.125)
    assert out[0, 1, 70].isnan().all() and torch.isfinite(out[0, 0]).all()


def test_the_hosts_layout_is_a_view_of_the_output():
    q, k, v = make(2, 3, 200, 64)
    out = run_sparse(q, k, v, random_keep(2, 3, 4), 64, 0.125)
    flat = out.transpose(1, 2).flatten(2)
    assert flat.shape == (2, 200, 192) and flat.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_dense_attention_and_its_lse_match_float64(dtype, biased, device):
    B, H, L, D = 2, 3, 333, 64
    q, k, v = make(B, H, L, D, dtype, device, packed=True)
    bias = some_bias(B, L, device) if biased else None
    out, lse = attention(q, k, v, scale=0.125, key_bias=bias)
    exact, exact_lse = reference.dense_attention(
        q.double(), k.double(), v.double(),
        scale=0.125, key_bias=None if bias is None else bias.double(),
    )  # fmt: skip
    same, _ = reference.dense_attention(q, k, v, scale=0.125, key_bias=bias)
    assert lse.dtype == torch.float32
    # torch's own fused attention rounds its weights to the dtype once more than the reference
    assert_as_accurate_as("out", out, same, exact, factor=3.0)
    # a bias passes through the dtype of q on its way into torch's attention
    assert_within("lse", lse, exact_lse, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("room", [1, module.BATCH_BYTES])
def test_other_devices_multiply_in_float32(dtype, biased, room, monkeypatch):
    """Scores of a spread at which a product in half precision errs by tenths, or overflows."""
    monkeypatch.setattr(module, "BATCH_BYTES", room)
    q, k, v = make(2, 2, 70, 64, torch.float32, packed=True)
    q, k, v = (q * 40).to(dtype), (k * 40).to(dtype), v.to(dtype)
    bias = some_bias(2, 70, "cpu") if biased else None
    out, lse = module._dense_by_products(q, k, v, 0.01, bias)
    exact, exact_lse = reference.dense_attention(
        q.double(), k.double(), v.double(),
        scale=0.01, key_bias=None if bias is None else bias.double(),
    )  # fmt: skip
    # half a step of the output's dtype, and what float32 leaves of scores up to 600
    step = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
    assert_within("out", out, exact, 4 * step + 5e-4)
    assert_within("lse", lse, exact_lse, 1e-3)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()


def test_only_a_cpu_takes_torch_s_operator(monkeypatch):
    monkeypatch.setattr(module, "_dense_by_products", lambda *args: ("out", "lse"))
    assert attention(*make(1, 1, 8, 64, device="meta"), scale=1.0) == ("out", "lse")


@pytest.mark.parametrize("which", ["q", "k", "v", "key_bias"])
@pytest.mark.parametrize("kept", [0.5, None], ids=["sparse", "dense"])
def test_numbers_need_not_lie_side_by_side(which, kept):
    """Torch's operator for CPUs takes them to, and reads what is not theirs."""
    given = dict(zip("qkv", make(1, 2, 200, 64), strict=True))
    given["key_bias"] = some_bias(1, 200, "cpu")
    mask = None
    if kept is not None:
        mask = BlockMask.from_dense(random_keep(1, 2, 4, kept), block_q=64, block_k=64)
    plain = attention(**given, scale=0.125, mask=mask)[0]
    x = given[which]
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    given[which] = wide[..., ::2]
    assert not given[which].is_contiguous()
    strided = attention(**given, scale=0.125, mask=mask)[0]
    assert_within("out", strided, plain.double(), 1e-6)


@pytest.mark.parametrize(
    "L, block_q, block_k",
    [(512, 64, 64), (333, 64, 64), (333, 128, 128), (20, 64, 64), (450, 128, 64)],
)
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_block_masses_match_float64(L, block_q, block_k, biased, device):
    B, H, D = 2, 2, 64
    q, k, _ = make(B, H, L, D, device=device, packed=True)
    bias = some_bias(B, L, device) if biased else None
    logits = reference.scaled_logits(q.double(), k.double(), 0.125, bias)
    lse = logits.logsumexp(-1)
    options = {"block_q": block_q, "block_k": block_k, "scale": 0.125}
    exact = reference.block_masses(q.double(), k.double(), lse, key_bias=bias, **options)
    for renormalise in (False, True):
        masses = block_masses(q, k, lse.float(), key_bias=bias, renormalise=renormalise, **options)
        assert_within("masses", masses, exact, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_stale_lse_is_renormalised_to_the_rows_of_each_block(dtype):
    q, k, _ = make(2, 2, 333, 64, dtype)
    lse = reference.scaled_logits(q.double(), k.double(), 0.125).logsumexp(-1)
    stale = (lse + 0.65 * torch.rand(lse.shape)).float()
    options = {"block_q": 64, "block_k": 64, "scale": 0.125}
    masses = block_masses(q, k, stale, **options)
    assert_within(
        "rows", masses.sum(-1), torch.tensor([64, 64, 64, 64, 64, 13.0]).expand(2, 2, 6), 1e-3
    )
    raw = reference.block_masses(q.double(), k.double(), stale.double(), **options)
    assert_within("masses", masses, reference.renormalised(raw, 333, 64), 1e-3)
    untouched = block_masses(q, k, stale, renormalise=False, **options)
    assert_within("untouched", untouched, raw, 1e-3)


def test_a_useless_lse_gives_finite_masses():
    q, k, _ = make(1, 1, 128, 64)
    masses = block_masses(
        q, k, torch.full((1, 1, 128), -500.0), block_q=64, block_k=64, scale=0.125
    )
    assert torch.isfinite(masses).all()


def test_masses_in_small_tiles_are_the_same(monkeypatch):
    q, k, _ = make(1, 2, 500, 64)
    lse = reference.scaled_logits(q, k, 0.125).logsumexp(-1)
    options = {"block_q": 64, "block_k": 64, "scale": 0.125}
    whole = block_masses(q, k, lse, **options)
    monkeypatch.setattr(masses_module, "TILE_BYTES", 1)
    assert_within("masses", block_masses(q, k, lse, **options), whole.double(), 1e-4)


def test_works_in_the_hosts_inference_mode_and_out_of_it():
    keep = random_keep(1, 2, 4)
    outside = run_sparse(*make(1, 2, 256, 64), keep, 64, 0.125)
    with torch.inference_mode():
        q, k, v = make(1, 2, 256, 64)
        inside = run_sparse(q, k, v, keep, 64, 0.125)
        lse = attention(q, k, v, scale=0.125)[1]
        masses = block_masses(q, k, lse, block_q=64, block_k=64, scale=0.125)
        inside += 0
    assert inside.is_inference() and not outside.is_inference()
    assert torch.equal(inside, outside)
    assert_within("rows", masses.sum(-1), torch.full((1, 2, 4), 64.0), 1e-3)


def threads_of_a_new_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: (torch.ones(2).sum(), torch.get_num_threads())[1]).result()


def test_leaves_torchs_threads_as_they_were(monkeypatch):
    q, k, v = make(1, 2, 256, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_sparse(q, k, v, random_keep(1, 2, 4), 64, 0.125)
        assert threads_of_a_new_thread() == torch.get_num_threads() == 2
        monkeypatch.setattr(torch, "softmax", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_sparse(q, k, v, random_keep(1, 2, 4), 64, 0.125)
        assert threads_of_a_new_thread() == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads, monkeypatch):
    monkeypatch.setattr(masses_module, "TILE_BYTES", 1)
    q, k, v = make(1, 2, 500, 64)
    keep = random_keep(1, 2, 8)
    exact, _ = reference.sparse_attention(
        q.double(), k.double(), v.double(), keep, block_q=64, block_k=64, scale=0.125
    )
    dense_lse = reference.scaled_logits(q.double(), k.double(), 0.125).logsumexp(-1)
    masses = reference.block_masses(
        q.double(), k.double(), dense_lse, block_q=64, block_k=64, scale=0.125
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = run_sparse(q, k, v, keep, 64, 0.125)
        found = block_masses(q, k, dense_lse.float(), block_q=64, block_k=64, scale=0.125)
    finally:
        torch.set_num_threads(before)
    assert_within("out", out, exact, 5e-6)
    assert_within("masses", found, masses, 1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
def test_skips_work_for_real():
    """The goal is 2.5x in quiet; a machine shared with others must still see most of it."""
    best = {}
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, BENCH, "--rounds", "3", "--threads", "2", "--json"],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        for row in json.loads(run.stdout)["rows"]:
            best[row["dtype"]] = max(best.get(row["dtype"], 0), row["best_speedup"])
        if min(best.values()) >= 1.8:
            break
    assert min(best.values()) >= 1.8, best
