"""What every kind of call takes on a GPU above q, k and v, and what groups of heads cost in time.

HunyuanVideo's attention, 24 heads of 128 in bfloat16, at 5 to 24 s of 720p, or Wan's. "above" is the peak above
q, k, v and what the run holds already; "work" is that without the answer and what the call adds to
what is held. "all heads" lifts the limit on the workspace.

    python tests/bench/bench_memory.py --out results/memory.json
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sparse_attn import head_groups  # noqa: E402
from sparse_attn.backends import reference  # noqa: E402
from sparse_attn.config import AdaSpaConfig  # noqa: E402
from sparse_attn.method.recall import sample_rows, sampled_recall  # noqa: E402
from sparse_attn.orders import similarity  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.bench.layer_calls import DIM, HEADS, LENGTHS, TEXT, LayerRun, inputs  # noqa: E402
from tests.bench.record import facts, keep  # noqa: E402

GIB = 2**30
NAMES = {"D": "dense, keeps an LSE", "S": "search", "s": "sparse"}
SETTINGS = {
    "tail 64x64": {},
    "tail 64x64 int8": {"precision": "int8"},
    "none 64x64": {"tail": "none"},
    "tail 128x64": {"block_size": "128x64"},
    "none 128x64": {"tail": "none", "block_size": "128x64"},
    "Paper": {"tail": "none", "head_adaptive": True},
}
ALL_HEADS = 1 << 42
# tokens and heads of one layer
SHAPES = {
    **{name: (TokenLayout(0, frames, 45, 80, TEXT), HEADS) for name, frames in LENGTHS.items()},
    "Wan 14B": (TokenLayout(0, 21, 45, 80), 40), "Wan 5B": (TokenLayout(0, 31, 22, 40), 24),
}  # fmt: skip
ROWS = 4
# the largest errors of kernels in bf16 and with INT8 scores, beyond which the exit code is 1
FLOAT, EIGHT_BITS = 0.01, 0.15


def error_of(run: LayerRun, out, dense: bool) -> float:
    """The largest relative error of an answer [1, H, L, D] on a few rows of some heads."""
    tokens, worst = run.layout.tokens, 0.0
    places = torch.tensor(sample_rows(tokens, ROWS), device=out.device)
    mask = order = None
    if not dense:
        state = run.state
        mask, order = state.layers.fetch(state.layers["layer"], out.device)
        mask = mask.as_walked(tokens)
    for head in (0, out.shape[1] // 2, out.shape[1] - 1):
        some, rows, pooled = slice(head, head + 1), places, None
        q, k, v = (x[:, some].double() for x in run.qkv)
        if order is not None:
            rows = order[0, head, places].long()
            moved = reference.permute(None, k, v, order[:, some])
            k, v, pooled = moved.k, moved.v, moved.pooled.of_blocks(tokens, mask.block_k)
        chosen = None
        if mask is not None:
            bits = mask.bits[:, some, places // mask.block_q]
            chosen = dataclasses.replace(mask, bits=bits, block_q=1)
        exact, _ = reference.attention(
            q[:, :, rows], k, v, scale=DIM**-0.5, mask=chosen, pooled=pooled
        )
        error = (out[:, some, rows].double() - exact).norm() / exact.norm()
        worst = max(worst, error.item())
    return worst


def digest_of(out) -> int:
    """The same number for the same answer, and hardly for another one."""
    return sum(head.contiguous().view(torch.int64).sum().item() for head in out.unbind(1))


def recall_of(run: LayerRun) -> dict:
    """The recall that the layer's search told, and that of a sample of rows, means over heads."""
    state, call = run.state, run.call
    mask, order = state.layers.fetch(state.layers["layer"], call.q.device)
    sampled = sampled_recall(call, mask, sample_rows(run.layout.tokens, 4 * ROWS), order)
    told = state.layers["layer"].pattern.recall.mean().item()
    return {"recall_told": round(told, 4), "recall_sampled": round(sampled.mean().item(), 4)}


def steps_of(qkv, layout, steps: str, repeats: int, density: float, fields: dict) -> list[dict]:
    """What every step of a run took; sparse steps are repeated."""
    config = AdaSpaConfig(sparsity=1 - density, cache="gpu", min_tokens=0, **fields)
    run, rows = LayerRun(config, steps, qkv, layout), []
    for step, kind in enumerate(steps):
        call = run.enter(step)
        seconds, answers = [], []
        for _ in range(repeats if kind == "s" else 1):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            out = call()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            answers.append(digest_of(out))
            if len(answers) == 1:
                dense = kind == "D" or (kind == "S" and "S" not in steps[:step])
                error = error_of(run, out, dense)
            del out
        name = "search again, and sparse" if kind == "S" and "S" in steps[:step] else NAMES[kind]
        rows.append(
            {
                "step": name,
                "ms": round(1000 * statistics.median(seconds), 1),
                "above_gib": round((peak - before) / GIB, 3),
                "work_gib": round((peak - max(after, before)) / GIB, 3),
                "error": round(error, 5),
                "digest": answers[0],
                "repeats_equal": len(set(answers)) == 1,
            }
        )
    found = recall_of(run)
    held = round(run.end() / GIB, 4)
    return [*rows, {"step": "held between steps, one layer", "gib": held, **found}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", choices=SHAPES, default=list(LENGTHS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--workspaces", nargs="+", type=int, default=[], help="MiB; 0 is all heads")
    parser.add_argument("--steps", default="DSsSs", help="D dense, S search, s sparse")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go as JSON")
    args = parser.parse_args()
    report = {**facts(), "density": args.density, "dim": DIM, "runs": []}
    own, bad = head_groups.WORKSPACE_BYTES >> 20, False
    for length in args.lengths:
        layout, heads = SHAPES[length]
        qkv = inputs(layout.tokens, heads, torch.device("cuda"))
        for setting in args.settings:
            for mib in args.workspaces or [own]:
                head_groups.WORKSPACE_BYTES = mib << 20 or ALL_HEADS
                similarity.WORKSPACE_BYTES = 512 << 20
                torch.cuda.empty_cache()
                rows = steps_of(
                    qkv, layout, args.steps, args.repeats, args.density, SETTINGS[setting]
                )
                entry = {
                    "length": length,
                    "tokens": layout.tokens,
                    "heads": heads,
                    "setting": setting,
                }
                entry |= {"workspace_mib": mib or "all heads", "steps": rows}
                report["runs"].append(entry)
                print(json.dumps(entry), flush=True)
                keep(args.out, report)
                worst = EIGHT_BITS if "int8" in setting else FLOAT
                bad |= any(step.get("error", 0) > worst for step in rows)
                bad |= not all(step.get("repeats_equal", True) for step in rows)
        del qkv
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
