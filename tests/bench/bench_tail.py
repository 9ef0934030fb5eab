"""Time a sparse call with its pooled tail, part by part, on HunyuanVideo's 720p shape.

    python tests/bench/bench_tail.py --out results.json

Random bfloat16 tensors in the host's layout, a random order for every head, medians of
`triton.testing.do_bench`. `whole` is what a sparse step does per layer: permute q, k and v, unpack
the mask, attend.
"""

import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from sparse_attn.backends.choice import triton_kernels  # noqa: E402
from sparse_attn.block_mask import BlockMask  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.bench.record import facts  # noqa: E402

HEADS, DIM = 24, 128
LAYOUT = TokenLayout(0, 31, 60, 64)  # 119,040 tokens


def median_ms(run) -> float:
    return round(do_bench(run, warmup=30, rep=300, return_mode="median"), 2)


def random_mask(density: float, block_q: int, device) -> BlockMask:
    rows, columns = LAYOUT.num_blocks(block_q), LAYOUT.num_blocks(64)
    generator = torch.Generator(device).manual_seed(0)
    keep = torch.zeros(1, HEADS, rows, columns, dtype=torch.bool, device=device)
    for head in range(HEADS):
        order = torch.rand(rows, columns, device=device, generator=generator)
        keep[0, head].scatter_(1, order.topk(round(columns * density), 1).indices, True)
    return BlockMask.from_dense(keep, block_q=block_q, block_k=64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device, scale = torch.device("cuda"), DIM**-0.5
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, LAYOUT.tokens, HEADS, DIM, device=device, generator=generator)
        .bfloat16()
        .transpose(1, 2)
        for _ in range(3)
    )
    noise = torch.rand(1, HEADS, LAYOUT.tokens, device=device, generator=generator)
    order = noise.argsort(-1).int()
    ours = triton_kernels()
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
        "rows": [], **facts(),
    }  # fmt: skip
    for density in (0.2, 0.1, 0.05):
        for block_q in (64, 128):
            mask = random_mask(density, block_q, device)

            def attend(moved, mask=mask):
                return ours.attention(
                    moved.q, moved.k, moved.v, scale=scale, mask=mask, pooled=moved.pooled,
                    order=order,
                )  # fmt: skip

            def whole(attend=attend):
                return attend(ours.permute(q, k, v, order))

            row = {
                "density": density,
                "blocks": f"{block_q}x64",
                "plain_ms": median_ms(lambda: ours.attention(q, k, v, scale=scale, mask=mask)),
                "tail_ms": median_ms(lambda: attend(moved)),
                "whole_ms": median_ms(whole),
            }
            result["rows"].append(row)
            print(row, flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
