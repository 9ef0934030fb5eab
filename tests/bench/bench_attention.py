"""Time one attention call of real video shapes: ours, torch's, FlexAttention, comfy-kitchen.

All contestants run in one process on the same random bfloat16 tensors; one that answers wrongly
gets no time. `ideal` is the share of the 1/density speed-up over the faster of
cuDNN and our own dense kernel.

    python tests/bench/bench_attention.py --shapes hunyuan-720p-129f wan-720p-81f --out results.json
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from sparse_attn.kernels.block_masses import block_masses  # noqa: E402
from sparse_attn.kernels.dense_attention import dense_attention  # noqa: E402
from sparse_attn.kernels.sparse_attention import sparse_attention  # noqa: E402
from sparse_attn.kernels.unpack_mask import unpack_mask  # noqa: E402
from tests.bench.record import facts  # noqa: E402

# heads, tokens, head_dim
SHAPES = {
    "hunyuan-720p-129f": (24, 119040, 128),
    "wan-720p-81f": (40, 75600, 128),
    "cogvideox1.5-161f": (48, 85000, 64),
}
DENSITIES = (0.2, 0.1, 0.05)
# how long a contestant runs in a round, milliseconds; the second half of its runs counts
RUN_MS = 300
DENSE = "ours, dense, with LSE"
# relative L2 error against float32 of the same bfloat16 inputs; all stay near 0.003
TOLERANCE = 0.006


def random_lists(heads, rows, columns, density, device):
    """The same number of random blocks in every row, ascending."""
    count = max(1, round(columns * density))
    generator = torch.Generator(device=device).manual_seed(0)
    indices = torch.empty(1, heads, rows, count, dtype=torch.int32, device=device)
    for head in range(heads):
        order = torch.rand(rows, columns, device=device, generator=generator).topk(count, 1)
        indices[0, head] = order.indices.sort(1).values.int()
    return indices, torch.full((1, heads, rows), count, dtype=torch.int32, device=device)


def exact_rows(q, k, v, head, first, block_q, block_k, listed=None):
    """Float32 attention of one query block of one head over its listed key blocks."""
    keys = torch.arange(k.shape[2], device=k.device)
    if listed is not None:
        keys = (listed.long()[:, None] * block_k + torch.arange(block_k, device=k.device)).flatten()
        keys = keys[keys < k.shape[2]]
    rows = q[0, head, first : first + block_q].float()
    s = rows @ k[0, head, keys].float().T * q.shape[-1] ** -0.5
    return s.softmax(-1) @ v[0, head, keys].float()


def error_of(out, q, k, v, block_q, block_k, indices=None):
    """Largest relative L2 error over a few query blocks."""
    worst = 0.0
    heads, length = q.shape[1:3]
    for head, share in ((0, 0.0), (heads // 2, 0.5), (heads - 1, 1.0)):
        block = int(share * (math.ceil(length / block_q) - 1))
        listed = None if indices is None else indices[0, head, block]
        exact = exact_rows(q, k, v, head, block * block_q, block_q, block_k, listed)
        got = out[0, head, block * block_q : (block + 1) * block_q].float()
        worst = max(worst, ((got - exact).norm() / exact.norm()).item())
    return worst if math.isfinite(worst) else math.inf


class Contest:
    """Contestants on one shape, checked when they enter and timed together."""

    def __init__(self, heads, length, dim, device):
        g = torch.Generator(device=device).manual_seed(1)
        self.q, self.k, self.v = (
            torch.randn(1, heads, length, dim, device=device, generator=g).bfloat16()
            for _ in range(3)
        )
        self.device, self.scale = device, dim**-0.5
        self.entries = []

    def enter(self, name, run, density=None, check=None):
        """Add a contestant; `check(result)` gives its error, None means nothing to check."""
        try:
            error = check(run()) if check else None
            run()
            torch.cuda.synchronize()
        except Exception as reason:  # a contestant that cannot run here must not end the contest
            print(f"  {name}: does not run ({type(reason).__name__}: {str(reason)[:120]})")
            torch.cuda.empty_cache()
            return
        if error is not None and error > TOLERANCE:
            print(f"  {name}: wrong, relative error {error:.3f}")
            return
        self.entries.append({"name": name, "density": density, "error": error, "run": run})

    def time(self, rounds, turns=False):
        """Every contestant runs back to back for a while in each round, or once with `turns`.

        Back to back each runs at its own clock; in turns it starts at the clock its predecessor
        left, which is lower after a hungry one where the GPU caps its power.
        """
        times = {entry["name"]: [] for entry in self.entries}
        for _ in range(rounds):
            for entry in self.entries:
                runs = []
                while len(runs) < (1 if turns else 4) or (sum(runs) < RUN_MS and not turns):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    entry["run"]()
                    end.record()
                    torch.cuda.synchronize()
                    runs.append(begin.elapsed_time(end))
                times[entry["name"]] += runs[len(runs) // 2 :]
        return times


def enter_dense(contest):
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale

    def torch_dense(backend):
        def run():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return run

    def check(out):
        return error_of(out, q, k, v, 128, 128)

    contest.enter("torch cuDNN", torch_dense(SDPBackend.CUDNN_ATTENTION), 1.0, check)
    contest.enter("torch flash", torch_dense(SDPBackend.FLASH_ATTENTION), 1.0, check)
    contest.enter(
        DENSE,
        lambda: dense_attention(q, k, v, scale=scale),
        1.0,
        lambda result: check(result[0]),
    )
    lse = dense_attention(q, k, v, scale=scale)[1]

    def masses_error(masses):
        head, block = q.shape[1] - 1, 7
        s = q[0, head, block * 64 : block * 64 + 64].float() @ k[0, head].float().T * scale
        exact = torch.nn.functional.pad(s.softmax(-1).sum(0), (0, -k.shape[2] % 64))
        exact = exact.view(-1, 64).sum(1)
        return ((masses[0, head, block] - exact).norm() / exact.norm()).item()

    contest.enter(
        "ours, dense, with LSE and masses",
        lambda: dense_attention(q, k, v, scale=scale, previous_lse=lse),
        1.0,
        lambda result: max(check(result[0]), masses_error(result[2])),
    )
    contest.enter(
        "ours, masses from cached LSE",
        lambda: block_masses(q, k, lse, block_q=64, block_k=64, scale=scale),
        None,
        masses_error,
    )


def enter_unpack(contest):
    blocks = math.ceil(contest.q.shape[2] / 64)
    heads, device = contest.q.shape[1], contest.device
    keep = torch.rand(1, heads, blocks, blocks, device=device) < 0.2
    wide = torch.nn.functional.pad(keep, (0, -blocks % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    powers = 2 ** torch.arange(8, device=device, dtype=torch.uint8)
    bits = (wide * powers).sum(-1, dtype=torch.uint8)

    def wrong(result):
        return float((result[1] != keep.sum(-1)).sum().item())

    contest.enter("ours, unpack a mask at 0.2", lambda: unpack_mask(bits, blocks), None, wrong)


def enter_sparse(contest, block_q, density):
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale
    heads, length = q.shape[1:3]
    rows, columns = math.ceil(length / block_q), length // 64
    indices, counts = random_lists(heads, rows, columns, density, contest.device)
    options = {"block_q": block_q, "block_k": 64, "scale": scale}
    contest.enter(
        f"ours, sparse {block_q}x64 at {density}",
        lambda: sparse_attention(q, k, v, indices, counts, **options),
        density,
        lambda result: error_of(result[0], q, k, v, block_q, 64, indices),
    )
    if block_q == 128 and density == 0.2:
        bias = torch.zeros(1, length, device=contest.device)
        contest.enter(
            f"ours, sparse {block_q}x64 at {density}, key bias",
            lambda: sparse_attention(q, k, v, indices, counts, key_bias=bias, **options),
            density,
            lambda result: error_of(result[0], q, k, v, block_q, 64, indices),
        )


def enter_flex(contest, density):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = contest.q, contest.k, contest.v
    heads, length = q.shape[1:3]
    blocks = length // 128
    if length % 128:
        print("  FlexAttention: left out, the shape is no multiple of 128")
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
        print(f"  comfy-kitchen: left out ({reason})")
        return
    q, k, v = (x.transpose(1, 2).contiguous() for x in (contest.q, contest.k, contest.v))
    for density in DENSITIES:
        # it chooses its own blocks, so there is no reference to check it against
        contest.enter(
            f"comfy-kitchen sol_attn top-k at {density}",
            lambda density=density: comfy_kitchen.sol_attn(q, k, v, topk_ratio=density),
            density,
        )


def summarise(contest, times):
    """Rows of the table, in the order of entry."""
    median = {name: statistics.median(values) for name, values in times.items()}
    cudnn = median.get("torch cuDNN")
    dense = min(ms for name, ms in median.items() if name in ("torch cuDNN", DENSE))
    heads, length, dim = contest.q.shape[1:]
    rows = []
    for entry in contest.entries:
        ms = sorted(times[entry["name"]])
        density = entry["density"]
        flop = 4 * heads * length**2 * dim * density if density else None
        value = median[entry["name"]]
        rows.append(
            {
                "name": entry["name"],
                "density": density,
                "ms": round(value, 3),
                "ms_20": round(ms[int(0.2 * (len(ms) - 1))], 3),
                "ms_80": round(ms[math.ceil(0.8 * (len(ms) - 1))], 3),
                "tflops": round(flop / value / 1e9, 1) if flop else None,
                "over_cudnn": round(cudnn / value, 2) if cudnn and density else None,
                "of_ideal": round(dense * density / value, 3) if density else None,
                "error": entry["error"],
            }
        )
    return rows


def show(shape, size, rows):
    print(f"\n{shape}: {size[0]} heads x {size[1]} tokens x {size[2]}")
    print(f"{'':40}{'ms':>9}{'20-80 %':>18}{'TFLOP/s':>9}{'x cuDNN':>9}{'ideal':>7}")
    for row in rows:
        spread = f"{row['ms_20']:.2f}-{row['ms_80']:.2f}"
        line = f"{row['name']:40}{row['ms']:9.2f}{spread:>18}"
        if row["density"]:
            line += f"{row['tflops']:9.0f}{row['over_cudnn'] or 0:9.2f}{row['of_ideal']:7.0%}"
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", action="store_true", help="one run of each in turn")
    parser.add_argument("--no-peers", action="store_true", help="leave out flex and comfy-kitchen")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()

    report = {
        **facts(),
        "rounds": args.rounds,
        "shapes": {},
    }
    print(report["hardware"], report["versions"])
    for shape in args.shapes:
        contest = Contest(*SHAPES[shape], torch.device("cuda"))
        enter_dense(contest)
        for density in DENSITIES:
            for block_q in (128, 64):
                enter_sparse(contest, block_q, density)
        enter_unpack(contest)
        if not args.no_peers:
            enter_flex(contest, 0.2)
            enter_kitchen(contest)
        rows = summarise(contest, contest.time(args.rounds, args.turns))
        show(shape, SHAPES[shape], rows)
        report["shapes"][shape] = {"size": SHAPES[shape], "rows": rows}
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        del contest
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
