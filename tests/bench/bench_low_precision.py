"""Time and check attention and block masses in eight bits, quantisation included, on HunyuanVideo's
720p shape.

    python tests/bench/bench_low_precision.py --out results.json

Random bfloat16 tensors; medians of `triton.testing.do_bench`. Errors are relative L2 against float64
on a few query blocks, beside those of an emulated SageAttention 2: INT8 with a scale per block (q in
groups of 32 rows, keys less their mean in blocks of 64), weights and values e4m3, a scale per channel.
Masses: the share of exact mass that the blocks hold which they choose, beside those of bfloat16 masses.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from sparse_attn.backends.choice import triton_kernels  # noqa: E402
from sparse_attn.backends.triton import quantise  # noqa: E402
from sparse_attn.orders.position import serpentine_order  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.bench.bench_tail import DIM, HEADS, LAYOUT, median_ms, random_mask  # noqa: E402
from tests.bench.contest import mask_of, random_lists  # noqa: E402
from tests.bench.record import facts  # noqa: E402

SCALE = DIM**-0.5
DEVICE = torch.device("cuda")
OURS = triton_kernels()
# heads, tokens of the checks
CHECKED = (4, 32768)


def tensors(heads, tokens, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(3, 1, heads, tokens, DIM, device=DEVICE, generator=generator).unbind(0)


def times():
    q, k, v = (x.bfloat16() for x in tensors(HEADS, LAYOUT.tokens))
    order = serpentine_order(LAYOUT, DEVICE).expand(1, HEADS, LAYOUT.tokens)
    moved = OURS.permute(q, k, v, order)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        cudnn = median_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    options = {"scale": SCALE, "values": True, "ordered": True}

    def attend(*qkv, **options):
        return OURS.quantised_attention(*qkv, scale=SCALE, **options)

    found = {
        "cudnn_ms": cudnn,
        "quantise_ms": median_ms(lambda: quantise.quantise(q, k, v, **options)),
        "int8_dense_ms": median_ms(lambda: attend(q, k, v)),
        **masses_ms(q, k),
        "rows": [],
    }
    for density in (0.2, 0.1, 0.05):
        for block_q in (128, 64):
            mask = random_mask(LAYOUT, density, HEADS, DEVICE, block_q=block_q, block_k=64)
            tail = {"mask": mask, "pooled": moved.pooled, "order": order}
            row = {
                "density": density,
                "blocks": f"{block_q}x64",
                "int8_ms": median_ms(lambda: attend(q, k, v, mask=mask)),
                "int8_tail_ms": median_ms(lambda: attend(moved.q, moved.k, moved.v, **tail)),
            }
            found["rows"].append(row)
            print(row, flush=True)
    return found


def masses_ms(q, k):
    # about what the rows of such data have
    lse = torch.full(q.shape[:3], 12.2, device=DEVICE)
    options = {"block_q": 64, "block_k": 64, "scale": SCALE}
    return {
        f"{name}_masses_ms": median_ms(
            lambda int8=int8: OURS.block_masses(q, k, lse, int8=int8, **options)
        )
        for name, int8 in (("bf16", False), ("int8", True))
    }


DATA = ("plain", "offset, 3 channels x4", "offset, x10 in different channels",
        "offset, x10 in the same channels", "offset, 3 channels x4, v with an offset")  # fmt: skip


def data(kind, heads, tokens):
    """q, k, v with what real models have: outlying channels, and an offset that keys share."""
    q, k, v = tensors(heads, tokens, seed=3)
    if kind != "plain":
        offset, spread = tensors(heads, 1, seed=4)[:2]
        k += 4 * offset
        v *= spread.exp()
        channels = {"x10 in d": ([5, 40, 77], [17, 60, 99], 10), "x10 in t": ([5, 40],) * 2 + (10,)}
        for_q, for_k, factor = channels.get(kind[8:16], ([5, 40, 77], [5, 40, 99], 4))
        q[..., for_q] *= factor
        k[..., for_k] *= factor
        if kind.endswith("v with an offset"):
            v += tensors(heads, 1, seed=5)[0]
    return [x.bfloat16() for x in (q, k, v)]


def e4m3(x):
    return x.to(torch.float8_e4m3fn).double()


def emulated(q, k, v, rows, keys):
    """What SageAttention 2 rounds, of one head, in float64 otherwise."""

    def blockwise(x, size):
        x = x.unflatten(0, (-1, size))
        step = x.abs().amax((1, 2), keepdim=True) / 127
        return ((x / step).round() * step).flatten(0, 1).double()

    q8 = blockwise(q[rows].float(), 32)
    k8 = blockwise(k.float() - k.float().mean(0), 64)[keys]
    step = v.float().abs().amax(0) / 448
    s = q8 @ k8.T * SCALE
    p = (s - s.amax(-1, keepdim=True)).exp()
    weighted = e4m3(p.float() * 448) @ (e4m3(v.float() / step) * step.double())[keys]
    return weighted / (p.sum(-1, keepdim=True) * 448)


def relative(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def errors(kind, heads, tokens, density):
    """{who: relative error}, the mean over three query blocks of 128."""
    q, k, v = data(kind, heads, tokens)
    options, indices = {}, None
    if density is not None:
        indices, _ = random_lists(heads, tokens // 128, tokens // 64, density, DEVICE)
        options = {"mask": mask_of(indices, tokens // 64, 128)}
    out = OURS.quantised_attention(q, k, v, scale=SCALE, **options)[0]
    sums = dict.fromkeys(("emulated", "int8"), 0.0)
    for head, block in ((0, 3), (1, 77), (heads - 1, tokens // 128 - 1)):
        rows = slice(128 * block, 128 * block + 128)
        keys = torch.arange(tokens, device=DEVICE)
        if indices is not None:
            listed = indices[0, head, block].long()[:, None]
            keys = (64 * listed + keys[:64]).flatten()
        s = q[0, head, rows].double() @ k[0, head, keys].double().T * SCALE
        exact = s.softmax(-1) @ v[0, head, keys].double()
        of_head = (x[0, head] for x in (q, k, v))
        sums["emulated"] += relative(emulated(*of_head, rows, keys), exact) / 3
        sums["int8"] += relative(out[0, head, rows], exact) / 3
    return {name: round(value, 4) for name, value in sums.items()}


def like_a_video(kind, tokens, share=1):
    """`data` with a part that neighbours share, as tokens of a video do."""
    q, k, v = data(kind, CHECKED[0], tokens)
    smooth = tensors(CHECKED[0], tokens // 512, seed=6)
    for x, y in zip((q, k, v), smooth, strict=True):
        x += share * y.repeat_interleave(512, 2).bfloat16()
    return q, k, v


def exact_masses(q, k):
    """Block masses and LSE in float32."""
    B, H, L, _ = q.shape
    masses = torch.empty(B, H, L // 64, L // 64, device=DEVICE)
    lse = torch.empty(B, H, L, device=DEVICE)
    for head in range(H):
        for first in range(0, L, 4096):
            rows = slice(first, first + 4096)
            s = q[0, head, rows].float() @ k[0, head].float().T * SCALE
            lse[0, head, rows] = s.logsumexp(-1)
            p = s.sub_(lse[0, head, rows, None]).exp_().view(64, 64, L // 64, 64)
            masses[0, head, first // 64 : first // 64 + 64] = p.sum((1, 3))
    return masses, lse


def recalls(kind, share):
    """Recall of the blocks that either kind of masses chooses, by density, and the worst head's loss."""
    q, k, _ = like_a_video(kind, CHECKED[1], share)
    exact, lse = exact_masses(q, k)
    options = {"block_q": 64, "block_k": 64, "scale": SCALE}
    found = {"data": kind, "shared_by_neighbours": share}
    masses = [OURS.block_masses(q, k, lse, int8=x, **options) for x in (False, True)]
    for density in (0.2, 0.1):
        count = round(density * exact.shape[-1])
        bf16, int8 = (
            exact.gather(-1, x.topk(count, -1).indices).sum((0, 2, 3)) / exact.sum((0, 2, 3))
            for x in masses
        )
        found[f"bf16_{density}"] = round(bf16.mean().item(), 5)
        found[f"int8_{density}"] = round(int8.mean().item(), 5)
        found[f"worst_{density}"] = round((bf16 - int8).max().item(), 5)
    return found


def tail_errors(kind):
    """Relative errors of a call with a pooled tail, of a video whose neighbours are alike."""
    layout = TokenLayout(0, 8, 64, 64)
    q, k, v = like_a_video(kind, layout.tokens)
    order = torch.arange(layout.tokens, device=DEVICE, dtype=torch.int32).expand(q.shape[:3])
    moved = OURS.permute(q, k, v, order)
    pooled, N = moved.pooled, layout.tokens // 64
    indices, _ = random_lists(CHECKED[0], layout.tokens // 128, N, 0.2, DEVICE)
    mask = mask_of(indices, N, 128)
    options = {"scale": SCALE, "mask": mask, "pooled": pooled, "order": order}
    outs = {
        "bf16": OURS.attention(moved.q, moved.k, moved.v, **options)[0],
        "int8": OURS.quantised_attention(moved.q, moved.k, moved.v, **options)[0],
    }
    keep = mask.to_dense()
    sums = dict.fromkeys(outs, 0.0)
    for head, block in ((0, 3), (1, 77), (CHECKED[0] - 1, len(keep[0, 0]) - 1)):
        rows = slice(128 * block, 128 * block + 128)
        listed = keep[0, head, block]
        seen = listed.repeat_interleave(64)
        keys = torch.cat([moved.k[0, head, seen], pooled.k_mean[0, head, ~listed]]).double()
        values = torch.cat([moved.v[0, head, seen], pooled.v_mean[0, head, ~listed]]).double()
        s = q[0, head, rows].double() @ keys.T * SCALE
        s[:, int(seen.sum()) :] += pooled.log_sizes[0, ~listed].double()
        exact = s.softmax(-1) @ values
        for name, out in outs.items():
            sums[name] += relative(out[0, head, rows], exact) / 3
    return {name: round(value, 4) for name, value in sums.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    heads, tokens = CHECKED
    checks = [
        {"data": kind, "tokens": tokens, "density": density, **errors(kind, heads, tokens, density)}
        for kind in DATA
        for density in (0.2, None)
    ]
    checks.append({"data": "plain", "tokens": 118784, **errors("plain", 4, 118784, None)})
    with_tail = [{"data": kind, **tail_errors(kind)} for kind in DATA]
    of_masses = [recalls(kind, share) for kind in DATA[:4] for share in (0, 1, 2)]
    for check in (*checks, *with_tail, *of_masses):
        print(check, flush=True)
    result = {
        "what": f"low-precision attention, {HEADS} heads x {LAYOUT.tokens:,} tokens x {DIM}; "
        "times with quantisation; `tail`: pooled, of tokens that are permuted already",
        **times(),
        "errors": checks,
        "errors_with_tail": with_tail,
        "recall_of_masses": of_masses,
        **facts(),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
