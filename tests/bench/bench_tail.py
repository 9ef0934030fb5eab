"""Time a sparse call with its pooled tail and without: whole steps of long videos, and the tail's parts.

    python tests/bench/bench_tail.py --out results.json

Random bfloat16 tensors in the host's layout, a random order for every head and random blocks, beside
the text's, which are always kept. Steps are those of a run, of some heads of HunyuanVideo at 720p, from
permuting to the output, in the blocks that a mask of that length has. Parts are of all heads at 5 s,
medians of `triton.testing.do_bench`: `whole` is to permute q, k and v, to unpack the mask and to attend.
"""

import argparse
import json
import math
import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from sparse_attn.backends.choice import triton_kernels  # noqa: E402
from sparse_attn.block_mask import BlockMask, mask_blocks  # noqa: E402
from sparse_attn.call import Call  # noqa: E402
from sparse_attn.method.sparse_step import sparse_step  # noqa: E402
from sparse_attn.method.text_sink import sink_blocks  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.bench.record import facts  # noqa: E402

HEADS, DIM = 24, 128
LAYOUT = TokenLayout(0, 31, 60, 64)  # 119,040 tokens
# latent frames of 45 x 80 tokens, and the tokens of the text
LENGTHS, TEXT = {"5 s": 33, "10 s": 63, "16 s": 97, "24 s": 145}, 256


def median_ms(run) -> float:
    return round(do_bench(run, warmup=30, rep=300, return_mode="median"), 2)


def step_ms(run, repeats=3) -> float:
    """Median of a few long calls, each by events of its own."""
    run()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return round(statistics.median(found), 2)


def inputs(layout, heads: int, device):
    """q, k, v [1, heads, L, D] and an order [1, heads, L]."""
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, layout.tokens, heads, DIM
    qkv = [
        torch.randn(shape, device=device, generator=generator).bfloat16().transpose(1, 2)
        for _ in range(3)
    ]
    noise = torch.rand(1, heads, layout.tokens, device=device, generator=generator)
    return *qkv, noise.argsort(-1).int()


def random_mask(layout, density: float, heads: int, device, *, block_q, block_k) -> BlockMask:
    rows, columns = layout.num_blocks(block_q), layout.num_blocks(block_k)
    generator = torch.Generator(device).manual_seed(0)
    keep = torch.zeros(1, heads, rows, columns, dtype=torch.bool, device=device)
    for head in range(heads):
        order = torch.rand(rows, columns, device=device, generator=generator)
        keep[0, head].scatter_(1, order.topk(round(columns * density), 1).indices, True)
    keep |= sink_blocks(layout, block_q, device)[:, None] | sink_blocks(layout, block_k, device)
    return BlockMask.from_dense(keep, block_q=block_q, block_k=block_k)


def steps(names, densities, heads: int, device):
    """Rows: milliseconds of sparse steps with a tail and without, in either precision."""
    ours = triton_kernels()
    for name, density in product(names, densities):
        layout = TokenLayout(0, LENGTHS[name], 45, 80, TEXT)
        *qkv, order = inputs(layout, heads, device)
        call = Call(*qkv, DIM**-0.5, layout, step=0, dense=lambda heads=None: 1 / 0, key="layer")
        mask = random_mask(layout, density, heads, device, **mask_blocks(layout.tokens, 64, 64))
        row = {"length": name, "tokens": layout.tokens, "density": density}
        row["blocks"] = f"{mask.block_q}x{mask.block_k}"
        for precision, tail in product(("bf16", "int8"), ("tail", "none")):
            given = ours, call, mask, order if tail == "tail" else None, precision == "int8"
            row[f"{precision}_{tail}_ms"] = step_ms(partial(sparse_step, *given))
        print(row, flush=True)
        yield row
        del qkv, order, call, mask, given


def parts(device) -> dict:
    """A call of all heads at 5 s, part by part."""
    scale, ours = DIM**-0.5, triton_kernels()
    q, k, v, order = inputs(LAYOUT, HEADS, device)
    moved = ours.permute(q, k, v, order)
    k_mean, log_sizes = moved.pooled.k_mean, moved.pooled.log_sizes
    lse = torch.full(q.shape[:3], math.log(LAYOUT.tokens), device=device)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        dense = median_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    result = {
        "heads": HEADS, "tokens": LAYOUT.tokens, "head_dim": DIM, "cudnn_ms": dense,
        "permute_ms": median_ms(lambda: ours.permute(q, k, v, order)),
        "pooled_masses_ms": median_ms(
            lambda: ours.pooled_masses(moved.q, k_mean, log_sizes, lse, block_q=64, scale=scale)
        ),
        "rows": [],
    }  # fmt: skip
    for density, block_q in product((0.2, 0.1, 0.05), (64, 128)):
        mask = random_mask(LAYOUT, density, HEADS, device, block_q=block_q, block_k=64)

        def attend(moved, mask=mask):
            return ours.attention(
                moved.q, moved.k, moved.v, scale=scale, mask=mask, pooled=moved.pooled, order=order
            )

        row = {
            "density": density,
            "blocks": f"{block_q}x64",
            "plain_ms": median_ms(
                lambda mask=mask: ours.attention(q, k, v, scale=scale, mask=mask)
            ),
            "tail_ms": median_ms(lambda attend=attend: attend(moved)),
            "whole_ms": median_ms(lambda attend=attend: attend(ours.permute(q, k, v, order))),
        }
        result["rows"].append(row)
        print(row, flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="*", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.1, 0.2])
    parser.add_argument("--heads", type=int, default=4, help="of the steps")
    parser.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda")
    result = {"steps": [], "heads_of_steps": options.heads, **facts()}
    for row in steps(options.lengths, options.densities, options.heads, device):
        result["steps"].append(row)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.parts:
        result |= parts(device)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
