"""What each kernel can reach on an RTX 3090, 4090 and 5090, by its compiled instructions; no GPU needed.

    python tests/bench/bound_consumer.py

Each kernel is compiled for the card with the tile it gets there, disassembled, and the instructions of
its main loop are counted by the unit that issues them. A unit's time is instructions x warps x turns over
its published rate a clock of a multiprocessor; the largest is the bound, and names what binds. The same
count for an H200 with wgmma off stands beside the time that `bench_consumer.py` measured there. The bound
says nothing of latency: how many programs share a multiprocessor is beside it.
"""

import collections
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["DISABLE_MMA_V3"] = "1"
os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sparse_attn.backends import tiles  # noqa: E402
from tests.backends.test_tiles import attend, compile_only, measure, search, tensors  # noqa: E402

RESULTS = ROOT / "tests" / "bench" / "results"
# compute capability: name, multiprocessors, boost clock in GHz, shared memory of a multiprocessor in KB, and
# products of bfloat16 and of INT8 a clock of a multiprocessor
# GA102, AD102 and GB202 whitepapers: 71, 165 and 210 bfloat16 TFLOP/s with float32 sums, 284, 661 and 838
# INT8 TOPS; of the H200, whose rates on mma.sync nobody publishes, the most that was seen: 357 TFLOP/s of dense
# attention here, and 958 TOPS of a loop of products in probe.py
CARDS = {
    86: ("RTX 3090", 82, 1.695, 100, 256, 1024),
    89: ("RTX 4090", 128, 2.52, 100, 256, 1024),
    120: ("RTX 5090", 170, 2.407, 100, 256, 1024),
    90: ("H200, wgmma off", 132, 1.98, 228, 684, 1834),
}
# results a clock of a multiprocessor: CUDA C++ Programming Guide, throughput of native instructions;
# shared memory answers 128 bytes a clock, a quarter of what one ldmatrix.x4 asks for
UNITS = {
    "exponential": (16, ("MUFU",)),
    "float32": (128, ("FFMA", "FADD", "FMUL")),
    "integer and comparison": (
        64, ("FMNMX", "LOP3", "IADD3", "VIADD", "SHF", "LEA", "ISETP", "FSETP", "FSEL", "SEL", "PRMT", "IMNMX"),
    ),
    "conversion": (64, ("F2FP", "I2F", "I2FP", "F2I", "F2F", "I2I", "I2IP")),
    "shuffle": (32, ("SHFL",)),
    "shared memory": (8, ("LDSM",)),
    "issue": (128, ("",)),
}  # fmt: skip
PRODUCTS = {"HMMA.16816": 2048, "IMMA.16832": 4096, "HMMA.1688": 1024, "IMMA.16816": 2048}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
HEADS, TOKENS, DIM, DENSITY = 24, 119040, 128, 0.2


def main_loop(cubin):
    """Names of the instructions of the innermost loop with the most products."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True,
            check=True,
        ).stdout  # fmt: skip
    found = [(int(m[1], 16), m[2], m[3]) for m in map(INSTRUCTION.search, text.splitlines()) if m]
    best: list[str] = []
    most = 0
    for at, name, rest in found:
        to = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if to and int(to[1], 16) < at:
            body = [n for a, n, _ in found if int(to[1], 16) <= a <= at]
            # keys that are masked have smaller tiles, or a loop after the main one
            if (products := sum(n.startswith(tuple(PRODUCTS)) for n in body)) > most:
                best, most = body, products
    return best


def bound(cubin, card, warps, tile_q, keys, share):
    """Milliseconds that each unit needs."""
    _, multiprocessors, clock, _, bf16, int8 = CARDS[card]
    count = collections.Counter(main_loop(cubin))
    turns = HEADS * math.ceil(TOKENS / tile_q) * warps * TOKENS / keys * share
    per_ms = multiprocessors * clock * 1e6

    def sum_of(prefixes):
        return sum(n for name, n in count.items() if name.startswith(prefixes))

    matrix = sum(
        count[name] * size / (bf16 if name[0] == "H" else int8)
        for name in count
        for prefix, size in PRODUCTS.items()
        if name.startswith(prefix)
    )
    clocks = {"matrix": matrix}
    clocks |= {unit: sum_of(names) * 32 / rate for unit, (rate, names) in UNITS.items()}
    return {unit: round(x * turns / per_ms, 1) for unit, x in clocks.items()}


def kernels(arch):
    """(kind, binary, tile_q, keys a turn, share of the pairs) of every kernel."""
    stands = compile_only(arch)
    q = tensors(1, 2, 300, DIM)

    def made(stand, *args, **options):
        before = set(stands[stand].binaries)
        args[0](*args[1:], **options)
        (new,) = set(stands[stand].binaries) - before
        return stands[stand].binaries[new]

    dense = {"masked": False}
    low = {"name": "quantised_attention"}
    name, low_name = "attention_kernel", "quantised_attention_kernel"
    # on the H200 those that were timed there
    card = (8, 9) if arch == 90 else divmod(arch, 10)
    tiles.card_of = lambda device=None: card
    high, low_high = tiles.attention(card, 128, DIM), tiles.attention(card, 64, DIM)
    size, half = ((x.tile_q, 2 * x.tile_k) for x in (high, low_high))
    yield "dense_bf16", made(name, attend, "triton", q, **dense), *size, 1.0
    yield "dense_bf16_masses", made(name, search, "triton", q), *size, 1.0
    yield "sparse_bf16 64x64", made(name, attend, "triton", q, 64), *half, DENSITY
    yield "sparse_bf16 128x64", made(name, attend, "triton", q, 128), *size, DENSITY
    yield "dense_low", made(low_name, attend, "triton", q, **dense, **low), 64, 64, 1.0
    yield "sparse_low 64x64", made(low_name, attend, "triton", q, 64, **low), 64, 64, DENSITY
    rows, low_rows = (tiles.block_masses(card, x, False).tile_q for x in (False, True))
    yield "masses_bf16", made("block_masses_kernel", measure, "triton", q), rows, 64, 1.0
    yield (
        "masses_low",
        made("block_masses_kernel", measure, "triton", q, int8=True),
        low_rows,
        64,
        1.0,
    )


def measured():
    """{kind and block size: ms} of this shape on an H200."""
    file = RESULTS / "consumer_h200.json"
    if not file.is_file():
        return {}
    found = {}
    for x in json.loads(file.read_text())["rows"]:
        if (x["who"], x["data"], x["shape"]) == ("ours", "random", "hunyuan-720p-129f"):
            size = f" {x['block_size']}" if x["kind"].startswith("sparse") else ""
            if x["density"] in (None, DENSITY):
                found[x["kind"] + size] = x["ms"]
    return found


def of_card(arch):
    """Rows of one card."""
    import triton

    rows, times = [], measured()
    for kind, binary, tile_q, keys, share in kernels(arch):
        warps, shared = binary.metadata.num_warps, binary.metadata.shared
        units = bound(binary.asm["cubin"], arch, warps, tile_q, keys, share)
        binding = max(units, key=lambda x: units[x])
        rows.append(
            {
                "kernel": kind, "card": CARDS[arch][0], "arch": arch,
                "tile": f"{tile_q}x{keys}, {warps} warps, {binary.metadata.num_stages} stages",
                "programs_by_shared_memory": CARDS[arch][3] // math.ceil(shared / 1024 + 1),
                "binding_unit": binding, "bound_ms": units[binding], "units_ms": units,
                "measured_ms": times.get(kind) if arch == 90 else None,
                "triton": triton.__version__,
            }
        )  # fmt: skip
    return rows


def main():
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(of_card(int(sys.argv[1]))) + "\n")
        return
    rows = []
    for arch in CARDS:
        # a process for each: the pretended card stays
        answer = subprocess.run(
            [sys.executable, __file__, str(arch)], capture_output=True, text=True, check=True
        ).stdout
        found = json.loads(answer.splitlines()[-1])
        for x in found:
            print(f"{x['card']:16}{x['kernel']:20}{x['binding_unit']:24}{x['bound_ms']:8.1f}")
        rows += found
    (RESULTS / "bounds.json").write_text(
        json.dumps(
            {
                "shape": [HEADS, TOKENS, DIM], "density": DENSITY,
                "command": "python tests/bench/bound_consumer.py", "rows": rows,
            },
            indent=1,
        ) + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
