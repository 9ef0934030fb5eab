"""Time what RTX 30, 40 and 50 run, on any card: the plain kernels on mma.sync, beside their rivals.

    python tests/bench/bench_consumer.py

Triton compiles without wgmma (DISABLE_MMA_V3), with the tiles of an RTX 4090; a kernel whose PTX holds
one is refused. All contestants of a shape run in one process on the same tensors; quantising is part of
every time. Errors are relative, against float32 of the same bfloat16 inputs. `outlier` data has channels
of queries and keys that stand out, an offset that the keys share and channels of values of unequal size.
A key bias hides the last 7 keys and weakens 193 before them, as masked text does.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ["DISABLE_MMA_V3"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from sparse_attn.backends import tiles  # noqa: E402
from sparse_attn.backends.triton import (  # noqa: E402
    attention,
    block_masses,
    permute,
    quantised_attention,
)
from tests.bench.bench_attention import SHAPES  # noqa: E402
from tests.bench.contest import (  # noqa: E402
    Contest,
    error_of,
    mask_of,
    random_lists,
)
from tests.bench.record import facts  # noqa: E402

# an RTX 4090
CARD = (8, 9)
# heads, tokens, head_dim
LENGTHS = {
    **{x: SHAPES[x] for x in ("hunyuan-720p-129f", "wan-720p-81f", "cogvideox1.5-161f")},
    "wan-480p-81f": (40, 32760, 128),
    "minimax-h3-5s": (56, 37700, 128),
}
KERNELS = {
    attention: "_attention_kernel",
    block_masses: "_block_masses_kernel",
    quantised_attention: "_quantised_attention_kernel",
}
# an eight bit answer that errs by more is wrong, not coarse
TOLERANCE = 0.1


def make_outliers(contest):
    """Change the tensors of a contest in place."""
    g = torch.Generator(device=contest.device).manual_seed(2)
    shape = (1, contest.q.shape[1], 1, contest.q.shape[3])
    offset, size = (torch.randn(shape, device=contest.device, generator=g) for _ in range(2))
    contest.k.add_((4 * offset).to(contest.k.dtype))
    contest.q[..., [5, 40]] *= 4
    contest.k[..., [5, 17, 40]] *= 4
    contest.v.mul_(size.exp().to(contest.v.dtype))


def mass_error(contest, masses, bias=0.0):
    """Of one row of blocks of 64."""
    q, k, block = contest.q, contest.k, 7
    s = q[0, -1, block * 64 : block * 64 + 64].float() @ k[0, -1].float().T * contest.scale + bias
    exact = torch.nn.functional.pad(s.softmax(-1).sum(0), (0, -k.shape[2] % 64))
    exact = exact.view(-1, 64).sum(1)
    return ((masses[0, -1, block] - exact).norm() / exact.norm()).item()


class Table:
    """Contestants of one shape, and what each stands for."""

    def __init__(self, contest, shape, data):
        self.contest, self.shape, self.data = contest, shape, data
        self.meant = {}

    def enter(self, who, kind, run, check=None, block_size=None, density=None):
        """Enter one, by a name of its own."""
        name = f"{who} {kind} {block_size or ''} {density or ''}"
        self.meant[name] = {
            "who": who, "kind": kind, "shape": self.shape, "block_size": block_size,
            "density": density, "data": self.data,
        }  # fmt: skip
        self.contest.enter(name, run, density, check, TOLERANCE)

    def rows(self, rounds):
        """One row for each contestant that ran."""
        found = self.contest.rows(self.contest.time(rounds))
        return [self.meant[x["name"]] | {"ms": x["ms"], "error": x["error"]} for x in found]


def enter_dense(table):
    contest, ours = table.contest, "ours"
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale

    def check(out):
        return error_of(out, q, k, v, 64, 64)

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def first(result):
        return check(result[0])

    blocks = {"block_q": 64, "block_k": 64, "scale": scale}
    lse = attention.attention(q, k, v, scale=scale)[1]
    table.enter("torch flash", "dense_bf16", flash, check)
    table.enter(ours, "dense_bf16", lambda: attention.attention(q, k, v, scale=scale), first)
    table.enter(
        ours, "dense_bf16_masses",
        lambda: attention.attention_with_masses(q, k, v, previous_lse=lse, **blocks),
        lambda x: max(first(x), mass_error(contest, x[2])), "64x64",
    )  # fmt: skip
    table.enter(
        ours, "dense_low", lambda: quantised_attention.quantised_attention(q, k, v, scale=scale),
        first,
    )  # fmt: skip

    def low_with_masses():
        # no kernel does both in eight bits
        out, found = quantised_attention.quantised_attention(q, k, v, scale=scale)
        return out, found, block_masses.block_masses(q, k, found, int8=True, **blocks)

    table.enter(
        ours, "dense_low_masses", low_with_masses,
        lambda x: max(first(x), mass_error(contest, x[2])), "64x64",
    )  # fmt: skip
    for kind, int8 in (("masses_bf16", False), ("masses_low", True)):
        table.enter(
            ours, kind,
            lambda int8=int8: block_masses.block_masses(q, k, lse, int8=int8, **blocks),
            lambda x: mass_error(contest, x), "64x64",
        )  # fmt: skip


def enter_sparse(table, block_q, density):
    contest = table.contest
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale
    heads, length = q.shape[1:3]
    columns = math.ceil(length / 64)
    indices, _ = random_lists(heads, math.ceil(length / block_q), columns, density, contest.device)
    order = torch.arange(length, dtype=torch.int32, device=contest.device).expand(1, heads, length)
    moved = permute.permute(q, k, v, order)
    options = {"scale": scale, "mask": mask_of(indices, columns, block_q), "order": order}
    block_size = f"{block_q}x64"

    def check(result):
        return error_of(result[0], q, k, v, block_q, 64, indices)

    for kind, attend in (
        ("sparse_bf16", attention.attention),
        ("sparse_low", quantised_attention.quantised_attention),
    ):
        table.enter(
            "ours", kind, lambda attend=attend: attend(q, k, v, **options), check, block_size,
            density,
        )  # fmt: skip
        table.enter(
            "ours", kind + "_tail",
            lambda attend=attend: attend(q, k, v, pooled=moved.pooled, **options), None, block_size,
            density,
        )  # fmt: skip


def enter_biased(table, block_q, density):
    contest = table.contest
    q, k, v, scale = contest.q, contest.k, contest.v, contest.scale
    heads, length = q.shape[1:3]
    columns = math.ceil(length / 64)
    bias = torch.zeros(1, length, device=contest.device)
    bias[:, -200:], bias[:, -7:] = -1.0, float("-inf")
    indices, _ = random_lists(heads, math.ceil(length / block_q), columns, density, contest.device)
    options = {"scale": scale, "key_bias": bias}
    blocks = {"block_q": 64, "block_k": 64, **options}
    lse = attention.attention(q, k, v, **options)[1]

    def error(out, *lists):
        return error_of(out, q, k, v, block_q, 64, *lists, bias=bias[0])

    def masses_too(found):
        return max(error(found[0]), mass_error(contest, found[2], bias[0]))

    mask = mask_of(indices, columns, block_q)
    for kind, attend in (
        ("bf16", attention.attention), ("low", quantised_attention.quantised_attention)
    ):  # fmt: skip
        table.enter(
            "ours", f"dense_{kind}_bias", lambda attend=attend: attend(q, k, v, **options),
            lambda x: error(x[0]),
        )  # fmt: skip
        table.enter(
            "ours", f"sparse_{kind}_bias",
            lambda attend=attend: attend(q, k, v, mask=mask, **options),
            lambda x: error(x[0], indices), f"{block_q}x64", density,
        )  # fmt: skip
        table.enter(
            "ours", f"masses_{kind}_bias",
            lambda kind=kind: block_masses.block_masses(q, k, lse, int8=kind == "low", **blocks),
            lambda x: mass_error(contest, x, bias[0]), "64x64",
        )  # fmt: skip
    table.enter(
        "ours", "dense_bf16_masses_bias",
        lambda: attention.attention_with_masses(q, k, v, previous_lse=lse, **blocks),
        masses_too, "64x64",
    )  # fmt: skip


def enter_kitchen(table, densities):
    try:
        import comfy_kitchen
    except ImportError as reason:
        table.contest.leave_out("comfy-kitchen", reason)
        return
    q, k, v = table.contest.q, table.contest.k, table.contest.v
    table.enter(
        "comfy-kitchen int8_attention", "dense_low", lambda: comfy_kitchen.int8_attention(q, k, v),
        lambda out: error_of(out, q, k, v, 64, 64),
    )  # fmt: skip
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    for density in densities:
        # it chooses its own blocks, so there is no reference to check it against
        table.enter(
            "comfy-kitchen sol_attn", "sparse_low",
            lambda density=density: comfy_kitchen.sol_attn(*rows, topk_ratio=density),
            None, "64x64", density,
        )  # fmt: skip


def refuse_wgmma():
    """End the run if a kernel that ran holds an instruction that RTX cards have not."""
    seen = 0
    for module, name in KERNELS.items():
        for cache in getattr(module, name).device_caches.values():
            for binary in cache[0].values():
                seen += 1
                if "wgmma" in binary.asm["ptx"] or "mma.sync" not in binary.asm["ptx"]:
                    raise SystemExit(f"{name} does not run on mma.sync alone")
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    args = parser.parse_args()
    tiles.card_of = lambda device=None: CARD
    report = {**facts(), "rows": [], "absent": {}}
    card = report["hardware"].lower().split()[-1]
    out = args.out or ROOT / "tests" / "bench" / "results" / f"consumer_{card}.json"
    print(report["hardware"], report["versions"], flush=True)
    for shape in args.shapes:
        for data in ("random", "outlier") if shape == args.shapes[0] else ("random",):
            contest = Contest(*LENGTHS[shape], torch.device("cuda"))
            densities = (0.2, 0.1) if data == "random" else (0.2,)
            if data == "outlier":
                make_outliers(contest)
            table = Table(contest, shape, data)
            enter_dense(table)
            for density in densities:
                for block_q in (64, 128):
                    enter_sparse(table, block_q, density)
            if data == "random" and shape == args.shapes[0]:
                enter_biased(table, 64, densities[0])
            enter_kitchen(table, densities)
            rows = table.rows(args.rounds)
            for x in rows:
                error = "" if x["error"] is None else f"{x['error']:.4f}"
                size, density = x["block_size"] or "", x["density"] or ""
                print(
                    f"{shape:18}{data:8}{x['who']:29}{x['kind']:18}{size:7}{density:5}"
                    f"{x['ms']:9.2f} {error}",
                    flush=True,
                )
            report["rows"] += rows
            report["absent"] |= {f"{shape} {data} {n}": r for n, r in contest.absent.items()}
            report["binaries_without_wgmma"] = refuse_wgmma()
            out.write_text(json.dumps(report, indent=1) + "\n")
            del contest, table
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
