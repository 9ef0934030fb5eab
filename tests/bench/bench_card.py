"""One line of JSON about this card, for its owner to paste into an issue.

Runs with the Python of ComfyUI, installs nothing and takes less than four minutes: heads are left
out until dense attention takes about 100 ms a call, and the line says how many are left.

    python run.py bench
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sparse_attn.backends import choice, tiles, tuned  # noqa: E402
from sparse_attn.call import Call  # noqa: E402
from sparse_attn.config import AdaSpaConfig  # noqa: E402
from sparse_attn.method.fused_online_search import fused_online_search  # noqa: E402
from sparse_attn.method.lse_cached_search import lse_cached_search  # noqa: E402
from sparse_attn.method.sparse_step import sparse_step  # noqa: E402
from sparse_attn.orders.position import serpentine_order  # noqa: E402
from sparse_attn.token_layout import TokenLayout  # noqa: E402
from tests.bench.contest import (  # noqa: E402
    Contest,
    error_of,
    mask_of,
    random_lists,
    stand_in,
)
from tests.tools import comfyui_source  # noqa: E402

# a sequence of the model's length, its heads and head_dim; the most telling first
SHAPES = {
    "wan-33k": (TokenLayout(0, 21, 32, 50), 40, 128),
    "h3-38k": (TokenLayout(0, 21, 34, 52, 572), 56, 128),
    "wan-76k": (TokenLayout(0, 21, 45, 80), 40, 128),
    "h3-73k": (TokenLayout(0, 31, 43, 54, 1018), 56, 128),
    "cogvideox-18k": (TokenLayout(226, 13, 30, 45), 48, 64),
}
CALL_MS = 100
# no shape begins later; the last begun may take half a minute
BEGIN_WITHIN = 180.0
LONGEST_LINE = 4000
FLOAT, EIGHT_BITS = 0.01, 0.15
SMI = "driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu"
PACKAGES = ("torch", "triton", "triton-windows", "comfy-kitchen", "sageattention")


def smi() -> list[str]:
    """What nvidia-smi says to `SMI` of the first GPU, or nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "-i", "0", f"--query-gpu={SMI}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [word.strip() for word in run.stdout.split(",")] if run.returncode == 0 else []


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def heads_for(layout, heads: int, dim: int) -> int:
    """How many heads dense attention computes in about `CALL_MS`."""
    q = torch.randn(1, 1, layout.tokens, dim, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return max(1, min(heads, round(CALL_MS / 1000 / min(seconds))))


def enter_others(contest: Contest) -> None:
    """What a ComfyUI may run beside ours."""
    q, k, v = contest.q, contest.k, contest.v
    check = partial(error_of, q=q, k=k, v=v, block_q=128, block_k=64)
    attend = torch.nn.functional.scaled_dot_product_attention
    contest.enter("sdpa", lambda: attend(q, k, v), 1.0, check, FLOAT)

    def cudnn():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return attend(q, k, v)

    contest.enter("cudnn", cudnn, 1.0, check, FLOAT)
    lengthwise = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    try:
        import comfy_kitchen as kitchen
    except ImportError as reason:
        contest.leave_out("kitchen", reason)
    else:
        contest.enter(
            "kitchen8", lambda: kitchen.int8_attention(*lengthwise), 1.0,
            lambda out: check(out.transpose(1, 2)), EIGHT_BITS,
        )  # fmt: skip
        for density in (0.2, 0.1):
            # it chooses its own blocks, so there is no reference to check it against
            contest.enter(
                f"sol{density:.0%}"[:-1],
                lambda density=density: kitchen.sol_attn(*lengthwise, topk_ratio=density),
                density,
            )
    try:
        from sageattention import sageattn
    except ImportError as reason:
        contest.leave_out("sage", reason)
    else:
        contest.enter("sage", lambda: sageattn(q, k, v), 1.0, check, EIGHT_BITS)


def enter_ours(contest: Contest, backend: choice.Backend) -> None:
    """The kernels, dense and over random blocks."""
    q, k, v = contest.q, contest.k, contest.v
    runs = [("", backend.attention, FLOAT)]
    if backend.quantised_attention is not None:
        runs.append(("_8", backend.quantised_attention, EIGHT_BITS))
    for suffix, attend, tolerance in runs:
        check = partial(error_of, q=q, k=k, v=v, block_q=128, block_k=64)
        contest.enter(
            f"dense{suffix}", partial(attend, q, k, v, scale=contest.scale), 1.0,
            lambda found, check=check: check(found[0]), tolerance,
        )  # fmt: skip
        for density, block_q in ((0.2, 64), (0.1, 64), (0.2, 128)):
            rows, columns = -(-q.shape[2] // block_q), -(-q.shape[2] // 64)
            indices, _ = random_lists(q.shape[1], rows, columns, density, contest.device)
            mask = mask_of(indices, columns, block_q)
            check = partial(error_of, q=q, k=k, v=v, block_q=block_q, block_k=64, indices=indices)
            contest.enter(
                f"{block_q}x64@{density}{suffix}",
                partial(attend, q, k, v, scale=contest.scale, mask=mask),
                density,
                lambda found, check=check: check(found[0]),
                tolerance,
            )


def enter_steps(contest: Contest, backend: choice.Backend, layout: TokenLayout) -> None:
    """Whole steps as the node's defaults take them: orders, selection and tail included."""
    config = AdaSpaConfig()
    call = Call(
        contest.q, contest.k, contest.v, contest.scale, layout, step=0, dense=lambda: None,
        by_position=serpentine_order(layout, contest.q.device),
    )  # fmt: skip
    _, lse = backend.attention(call.q, call.k, call.v, scale=call.scale)
    found = lse_cached_search(backend, call, config, lse, int8=False)
    contest.enter("search", lambda: fused_online_search(backend, call, config, lse, lambda _: None))
    contest.enter("again", lambda: lse_cached_search(backend, call, config, lse, int8=False))
    contest.enter("step", lambda: sparse_step(backend, call, found.mask, found.order, False))
    if backend.quantised_attention is not None:
        contest.enter("again_8", lambda: lse_cached_search(backend, call, config, lse, int8=True))
        contest.enter("step_8", lambda: sparse_step(backend, call, found.mask, found.order, True))


def measure(name: str, line: dict) -> None:
    """Time one shape, and put what it gave into the line."""
    layout, heads, dim = SHAPES[name]
    some = heads_for(layout, heads, dim)
    print(f"{name}: {some} of {heads} heads x {layout.tokens:,} tokens x {dim}", flush=True)
    contest = Contest(some, layout.tokens, dim, "cuda")
    held = torch.cuda.memory_allocated()
    enter_others(contest)
    backend, why = choice.choose(contest.q, contest.k, contest.v, 64, 64)
    compiling = peak = None
    if backend is None or backend.attention_with_masses is None:
        contest.leave_out("ours", why)
    else:
        start = time.perf_counter()
        enter_ours(contest, backend)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        enter_steps(contest, backend, layout)
        peak = round((torch.cuda.max_memory_allocated() - held) / 2**20)
        compiling = round(time.perf_counter() - start, 1)
    rows = contest.rows(contest.time(1))
    for row in rows:
        said = "" if row["error"] is None else f"  error {row['error']:.4f}"
        flops = f"{row['tflops']:7.0f} TFLOP/s" if row["tflops"] else ""
        print(f"  {row['name']:12}{row['ms']:9.2f} ms{flops:>16}{said}", flush=True)
    line["shapes"][name] = {
        "size": [some, heads, layout.tokens, dim],
        "first_s": compiling,
        "peak_mib": peak,
        "ms": {row["name"]: float(f"{row['ms']:.4g}") for row in rows},
        "error": {r["name"]: float(f"{r['error']:.2g}") for r in rows if r["error"] is not None},
    }
    line["absent"].update({key: reason[:60] for key, reason in contest.absent.items()})


def registers() -> dict[str, list[int]]:
    """Registers that spill and shared memory of every kernel of ours that has run, by name."""
    found = {}
    for module in [m for n, m in sys.modules.items() if n.startswith("sparse_attn.backends.")]:
        for name, kernel in vars(module).items():
            for caches in dict(getattr(kernel, "device_caches", {})).values():
                for compiled in dict(caches[0]).values():
                    spills, shared = getattr(compiled, "n_spills", None), compiled.metadata.shared
                    if spills is not None:
                        before = found.get(name.strip("_"), [0, 0])
                        found[name.strip("_")] = [max(before[0], spills), max(before[1], shared)]
    return {name: most for name, most in found.items() if any(most)}


def as_line(line: dict) -> str:
    """The line, without what it has no room for."""
    for spare in (None, "kernels", "absent"):
        line = {key: value for key, value in line.items() if key != spare}
        text = json.dumps(line, separators=(",", ":"))
        if len(text) < LONGEST_LINE:
            return text
    raise ValueError(f"The line would be {len(text)} characters long.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="where the line goes too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This needs a GPU that torch can use; `python run.py doctor` says what there is.")
        return 1
    stand_in()
    start, comfyui = time.monotonic(), comfyui_source.locate(ROOT, os.environ)
    said = tuned.use(comfyui / "user" / tuned.FILE, tiles.card_of()) if comfyui else ""
    line = {
        "v": 1,
        "gpu": torch.cuda.get_device_name(),
        "card": tiles.card_of(),
        "gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "smi": SMI,
        "before": smi(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
        "tiles": said or "of the table",
        "shapes": {},
        "absent": {},
    }
    for name in args.shapes:
        if time.monotonic() - start > BEGIN_WITHIN:
            line["absent"][name] = "no time left"
            continue
        try:
            measure(name, line)
        except torch.OutOfMemoryError:
            line["absent"][name] = "out of memory"
        torch.cuda.empty_cache()
    line["after"], line["kernels"] = smi(), registers()
    line["seconds"] = round(time.monotonic() - start)
    text = as_line(line)
    print(f"\nThank you. Paste this line into a new issue, form 'Figures of a card':\n\n{text}")
    if args.out:
        args.out.write_text(text + os.linesep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
