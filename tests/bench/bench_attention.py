"""Time one attention call of real video shapes: ours, torch's, FlexAttention, comfy-kitchen.

All contestants run in one process on the same random bfloat16 tensors; one that answers wrongly
gets no time. `ideal` is the share of the 1/density speed-up over the faster of cuDNN and our own
dense kernel, `dense ms`.

    python tests/bench/bench_attention.py --shapes hunyuan-720p-129f wan-720p-81f --out results.json
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

from sparse_attn.backends.choice import triton_kernels  # noqa: E402
from tests.bench.bookkeeping_contestants import enter_bookkeeping, python_ms  # noqa: E402
from tests.bench.contest import (  # noqa: E402
    CUDNN,
    DENSE,
    Contest,
    error_of,
    mask_of,
    print_head,
    print_rows,
    random_lists,
)
from tests.bench.low_precision_contestants import enter_low_precision  # noqa: E402
from tests.bench.record import facts  # noqa: E402

# heads, tokens, head_dim
SHAPES = {
    "hunyuan-720p-129f": (24, 119040, 128),
    "wan-720p-81f": (40, 75600, 128),
    "minimax-h3": (56, 61000, 128),
    "cogvideox1.5-161f": (48, 85000, 64),
}
DENSITIES = (0.2, 0.1, 0.05)


def enter_dense(contest):
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale
    ours, blocks = triton_kernels(), {"block_q": 64, "block_k": 64}

    def torch_dense(backend):
        def run():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return run

    def check(out):
        return error_of(out, q, k, v, 128, 128)

    contest.enter(CUDNN, torch_dense(SDPBackend.CUDNN_ATTENTION), 1.0, check)
    contest.enter("torch flash", torch_dense(SDPBackend.FLASH_ATTENTION), 1.0, check)
    contest.enter(
        DENSE,
        lambda: ours.attention(q, k, v, scale=scale),
        1.0,
        lambda result: check(result[0]),
    )
    lse = ours.attention(q, k, v, scale=scale)[1]

    def masses_error(masses):
        head, block = q.shape[1] - 1, 7
        s = q[0, head, block * 64 : block * 64 + 64].float() @ k[0, head].float().T * scale
        exact = torch.nn.functional.pad(s.softmax(-1).sum(0), (0, -k.shape[2] % 64))
        exact = exact.view(-1, 64).sum(1)
        return ((masses[0, head, block] - exact).norm() / exact.norm()).item()

    contest.enter(
        "ours, dense, with LSE and masses",
        lambda: ours.attention_with_masses(q, k, v, scale=scale, previous_lse=lse, **blocks),
        1.0,
        lambda result: max(check(result[0]), masses_error(result[2])),
    )
    contest.enter(
        "ours, masses from cached LSE",
        lambda: ours.block_masses(q, k, lse, scale=scale, **blocks),
        None,
        masses_error,
    )


def enter_sparse(contest, block_q, density):
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale
    heads, length = q.shape[1:3]
    rows, columns = math.ceil(length / block_q), length // 64
    indices, _ = random_lists(heads, rows, columns, density, contest.device)
    ours, options = triton_kernels(), {"scale": scale, "mask": mask_of(indices, columns, block_q)}
    contest.enter(
        f"ours, sparse {block_q}x64 at {density}",
        lambda: ours.attention(q, k, v, **options),
        density,
        lambda result: error_of(result[0], q, k, v, block_q, 64, indices),
    )
    if block_q == 128 and density == 0.2:
        # padded text behind the video
        bias = torch.zeros(1, length, device=contest.device)
        bias[:, -200:] = float("-inf")
        contest.enter(
            f"ours, sparse {block_q}x64 at {density}, key bias",
            lambda: ours.attention(q, k, v, key_bias=bias, **options),
            density,
            lambda result: error_of(result[0], q, k, v, block_q, 64, indices, bias[0]),
        )


def enter_flex(contest, density):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = contest.q, contest.k, contest.v
    heads, length = q.shape[1:3]
    blocks = length // 128
    if length % 128:
        contest.leave_out("FlexAttention", "the shape is no multiple of 128")
        return
    indices, counts = random_lists(heads, blocks, blocks, density, contest.device)
    full = torch.zeros(1, heads, blocks, blocks, dtype=torch.int32, device=contest.device)
    full[..., : indices.shape[-1]] = indices
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(full), counts, full, BLOCK_SIZE=128
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    contest.enter(
        f"FlexAttention 128x128 at {density}",
        lambda: compiled(q, k, v, block_mask=mask),
        density,
        lambda out: error_of(out, q, k, v, 128, 128, indices),
    )


def enter_kitchen(contest):
    try:
        import comfy_kitchen
    except ImportError as reason:
        contest.leave_out("comfy-kitchen", reason)
        return
    q, k, v = (x.transpose(1, 2).contiguous() for x in (contest.q, contest.k, contest.v))
    for density in DENSITIES:
        # it chooses its own blocks, so there is no reference to check it against
        contest.enter(
            f"comfy-kitchen sol_attn top-k at {density}",
            lambda density=density: comfy_kitchen.sol_attn(q, k, v, topk_ratio=density),
            density,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", action="store_true", help="one run of each in turn")
    parser.add_argument("--no-peers", action="store_true", help="leave out flex and comfy-kitchen")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    args = parser.parse_args()

    report = {**facts(), "rounds": args.rounds, "shapes": {}}
    out = args.out
    if out is None:
        card = report["hardware"].lower().split()[-1]
        out = ROOT / "tests" / "bench" / "results" / f"attention_{card}.json"
    print(report["hardware"], report["versions"], flush=True)
    for shape in args.shapes:
        contest = Contest(*SHAPES[shape], torch.device("cuda"))
        enter_dense(contest)
        enter_low_precision(contest)
        for density in DENSITIES:
            for block_q in (128, 64):
                enter_sparse(contest, block_q, density)
                enter_low_precision(contest, density, block_q)
        enter_bookkeeping(contest)
        if not args.no_peers:
            enter_flex(contest, 0.2)
            enter_kitchen(contest)
        rows = contest.rows(contest.time(args.rounds, args.turns))
        if not report["shapes"]:
            print_head()
        print_rows(shape, SHAPES[shape], rows)
        report["shapes"][shape] = {
            "size": SHAPES[shape], "rows": rows, "absent": contest.absent
        }  # fmt: skip
        out.write_text(json.dumps(report, indent=1) + "\n")
        del contest
        torch.cuda.empty_cache()
    report["python_ms_per_sparse_call"] = round(python_ms(torch.device("cuda")), 3)
    print(f"Python and launches of one sparse call: {report['python_ms_per_sparse_call']} ms")
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
