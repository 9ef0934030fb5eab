"""Every kernel, with the tile it gets on every card, compiled here without that card.

The compiler needs no GPU, but it must not be interpreted, so each test starts a process.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = (80, 86, 89, 90, 100, 120)
# the same instructions as 80 and the same shared memory as 120, so fewer kernels suffice
LIKE_OTHERS = (86, 89)
# bytes of stack per thread, where spilled registers go; a handful outside the loop costs nothing
STACK_LIMIT = 256
TENSOR_CORE = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma|v_wmma")
AMD_ARCHS = ("gfx942", "gfx1100")
AMD_SHARED_MEMORY = 64 * 1024
# the search with blocks of 128 spills on gfx1100 whatever the tile; it runs once or twice
AMD_STACK_LIMIT = 512
# kernels without a product of matrices
NO_PRODUCTS = ("arrange", "top_blocks", "deviation", "direction", "along", "sort", "take")
# kernels that are the same on all cards
NO_TILES = ("pooled", "arrange", "top blocks", "features", "halve", "tail error")


class Processes:
    """All that this file asks of the compiler, a few processes at a time."""

    def __init__(self):
        self.pool = None
        self.running = set()
        self.ended = False
        self.answers = {}  # (what, arch): future

    def begin(self, at_a_time: int) -> None:
        if self.pool is not None:
            return
        self.pool = ThreadPoolExecutor(at_a_time)
        asked = [("compile", 90), ("variants", 90), *(("compile", x) for x in ARCHS if x != 90)]
        asked += [("compile_amd", x) for x in AMD_ARCHS]
        self.answers = {key: self.pool.submit(self._run, key[0], str(key[1])) for key in asked}

    def _run(self, *arguments):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        with tempfile.TemporaryDirectory() as cache:
            env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
            process = subprocess.Popen(
                [sys.executable, __file__, *arguments], env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            self.running.add(process)
            if self.ended:
                process.kill()
            stdout, stderr = process.communicate()
            self.running.discard(process)
        assert process.returncode == 0, stderr[-3000:]
        return json.loads(stdout.splitlines()[-1])

    def end(self) -> None:
        self.ended = True
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self.running):
                process.kill()


PROCESSES = Processes()


@pytest.fixture(scope="module")
def answers():
    pytest.importorskip("triton")
    PROCESSES.begin(at_a_time=2)
    return PROCESSES.answers


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit_the_card_and_use_its_tensor_cores(arch, answers):
    from sparse_attn.backends.tiles import SHARED_MEMORY

    limit = SHARED_MEMORY[divmod(arch, 10)]
    kernels = answers["compile", arch].result()
    assert {"sparse", "dense"} <= {kernel["kernel"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= limit, f"{kernel}: the card has {limit} bytes"
        assert kernel["stack"] <= STACK_LIMIT, f"{kernel}: registers spill"
        used = kernel["tensor_core"] > 0
        assert used or kernel["kernel"] in NO_PRODUCTS, f"{kernel}: no tensor-core instruction"


@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_kernels_compile_for_amd(arch, answers):
    kernels = answers["compile_amd", arch].result()
    assert {"sparse", "dense", "masses"} <= {kernel["kernel"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= AMD_SHARED_MEMORY, kernel
        assert kernel["stack"] <= AMD_STACK_LIMIT, f"{kernel}: registers spill"
        assert kernel["tensor_core"] > 0, f"{kernel}: no matrix instruction"


def test_other_shapes_and_strides_reuse_the_compiled_kernel(answers):
    assert answers["variants", 90].result() == {
        "sparse": 1,
        "dense": 1,
        "masses": 1,
        "unpack": 1,
        "top_blocks": 1,
        "biased": 2,
        "hopper": 2,  # sparse and dense are one kernel
        "hopper_masses": 1,
    }


def fake_gpu(arch):
    """Make Triton believe that a card of this architecture is present; it can only compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, 32)
    if isinstance(arch, str):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)

    class Driver:
        def get_current_target(self):
            return target

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_device_interface(self):
            raise NotImplementedError

    triton.runtime.driver.set_active(Driver())


class Compiled:
    """Stands for a kernel: launching it only compiles it."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.binaries = {}

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            binary = self.kernel.warmup(*args, grid=grid, **kwargs)
            self.binaries[id(binary)] = binary

        return launch


def compile_only(arch):
    """The launchers of this pack, made to compile for `arch` whatever tensors they are given."""
    fake_gpu(arch)
    from sparse_attn.backends import tiles
    from sparse_attn.backends.triton import attention as sparse_attention
    from sparse_attn.backends.triton import (
        block_masses,
        dense_attention,
        features,
        pooled_masses,
        quantise,
        tail_error,
        unpack_mask,
    )
    from sparse_attn.backends.triton import launch as inputs
    from sparse_attn.backends.triton import pca_tree as halve
    from sparse_attn.backends.triton import permute as arrange
    from sparse_attn.backends.triton import quantised_attention as low_precision_attention
    from sparse_attn.backends.triton import row_wise_top_k as top_blocks

    inputs.why_not_tensors = lambda *tensors: None
    inputs.INTERPRETED = True
    amd = isinstance(arch, str)
    tile_of, card = (tiles.amd_tile, arch) if amd else (tiles.tile_for, divmod(arch, 10))
    tiles.choose = lambda kernel, q, block_q, block_k: tile_of(
        kernel, card, q.shape[-1], block_q, block_k
    )
    stands = {
        "sparse": Compiled(sparse_attention._sparse_attention_kernel),
        "dense": Compiled(dense_attention._dense_attention_kernel),
        "masses": Compiled(block_masses._block_masses_kernel),
        "unpack": Compiled(unpack_mask._unpack_mask_kernel),
        "pooled": Compiled(pooled_masses._pooled_masses_kernel),
        "arrange": Compiled(arrange._arrange_kernel),
        "top_blocks": Compiled(top_blocks._top_blocks_kernel),
        "features": Compiled(features._features_kernel),
        "deviation": Compiled(tail_error._deviation_kernel),
        "scores": Compiled(tail_error._scores_kernel),
        "low precision": Compiled(low_precision_attention._low_precision_attention_kernel),
        "quantise": Compiled(quantise._rows_kernel),
    }
    low_precision_attention._low_precision_attention_kernel = stands["low precision"]
    low_precision_attention.has_fp8 = lambda q: not amd and arch >= 89
    quantise._rows_kernel = stands["quantise"]
    for name in ("_sums_kernel", "_finish_kernel", "_values_kernel"):
        setattr(quantise, name, Compiled(getattr(quantise, name)))
    sparse_attention._sparse_attention_kernel = stands["sparse"]
    dense_attention._dense_attention_kernel = stands["dense"]
    block_masses._block_masses_kernel = stands["masses"]
    unpack_mask._unpack_mask_kernel = stands["unpack"]
    pooled_masses._pooled_masses_kernel = stands["pooled"]
    arrange._arrange_kernel = stands["arrange"]
    top_blocks._top_blocks_kernel = stands["top_blocks"]
    features._features_kernel = stands["features"]
    tail_error._deviation_kernel = stands["deviation"]
    tail_error._scores_kernel = stands["scores"]
    for name in ("direction", "along", "sort", "take"):
        stands[name] = Compiled(getattr(halve, f"_{name}_kernel"))
        setattr(halve, f"_{name}_kernel", stands[name])
    if arch == 90:
        from sparse_attn.backends.hopper import attention as hopper_attention
        from sparse_attn.backends.hopper import block_masses as hopper_block_masses
        from sparse_attn.backends.hopper import quantised_attention as hopper_low_precision

        kernel = Compiled(hopper_low_precision.hopper_low_precision_kernel)
        stands["hopper low precision"] = hopper_low_precision.hopper_low_precision_kernel = kernel
        stands["hopper"] = Compiled(hopper_attention.hopper_attention_kernel)
        stands["hopper_masses"] = Compiled(hopper_block_masses.hopper_block_masses_kernel)
        hopper_attention.hopper_attention_kernel = stands["hopper"]
        hopper_block_masses.hopper_block_masses_kernel = stands["hopper_masses"]
    return stands


def call(kernel, B, H, L, D, block, bias=False, strided=False, **kwargs):
    """Call one launcher with tensors of a shape; their contents do not matter."""
    import torch

    from sparse_attn.backends.triton.attention import sparse_attention
    from sparse_attn.backends.triton.block_masses import block_masses
    from sparse_attn.backends.triton.dense_attention import dense_attention
    from sparse_attn.backends.triton.features import features
    from sparse_attn.backends.triton.pca_tree import pca_tree
    from sparse_attn.backends.triton.permute import arrange
    from sparse_attn.backends.triton.pooled_masses import pooled_masses
    from sparse_attn.backends.triton.row_wise_top_k import row_wise_top_k
    from sparse_attn.backends.triton.tail_error import tail_error
    from sparse_attn.backends.triton.unpack_mask import unpack_mask

    shape = (B, L, H, D) if strided else (B, H, L, D)
    q = torch.zeros(shape, dtype=torch.bfloat16)
    q = q.transpose(1, 2) if strided else q
    key_bias = torch.zeros(B, L) if bias else None
    blocks = {"block_q": block, "block_k": block, "scale": 0.1, "key_bias": key_bias}
    Nq = -(-L // block)
    if kernel == "sparse":
        if "tile" in kwargs:
            blocks["block_q"] = kwargs["tile"].tile_q
            Nq = -(-L // blocks["block_q"])
        counts = torch.zeros(B, H, Nq, dtype=torch.int32)
        lists = torch.zeros(B, H, Nq, Nq, dtype=torch.int32)
        sparse_attention(q, q, q, lists, counts, **blocks, **kwargs)
    elif kernel == "tail":
        order = torch.arange(L, dtype=torch.int32).expand(B, H, L)
        blocks |= {"block_k": 64, "key_bias": torch.zeros(B, 64 * 6), "order": order}
        k = torch.zeros(B, H, 64 * 6, D, dtype=torch.bfloat16)
        counts = torch.zeros(B, H, Nq, dtype=torch.int32)
        lists = torch.zeros(B, H, Nq, 6, dtype=torch.int32)
        bits = torch.zeros(B, H, Nq, 1, dtype=torch.uint8)
        sparse_attention(q, k, k, lists, counts, tail=bits, **blocks, **kwargs)
    elif kernel == "arrange":
        arrange(q, torch.arange(L, dtype=torch.int32).expand(B, H, L), means=block == 64)
    elif kernel == "top blocks":
        masses = torch.zeros(B, H, Nq, Nq)
        sinks = torch.zeros(Nq, dtype=torch.bool)
        row_wise_top_k(masses, masses, torch.ones(B, H), 1, sinks, sinks)
    elif kernel == "features":
        bases = torch.zeros(2, B, H, D), torch.zeros(2, B, H, D, 16)
        features(q, q, *bases, torch.zeros(L, 8))
    elif kernel == "halve":
        # the most tokens that are sorted on chip, and one more
        for tokens in (2048, 2049):
            pca_tree(torch.zeros(H, tokens, 40))
    elif kernel == "tail error":
        masses = torch.zeros(B, H, Nq, Nq)
        tail_error(masses, masses.clone(), q, q[:, :, :Nq])
    elif kernel == "pooled":
        lse = torch.zeros(B, H, L)
        pooled_masses(q, q, torch.zeros(B, L), lse, block_q=block, scale=0.1)
    elif kernel == "dense":
        dense_attention(q, q, q, previous_lse=torch.zeros(B, H, L), **blocks, **kwargs)
    elif kernel in ("masses", "int8 masses"):
        int8 = kernel == "int8 masses"
        block_masses(q, q, torch.zeros(B, H, L), int8=int8, **blocks, **kwargs)
    else:
        unpack_mask(torch.zeros(B, H, Nq, -(-L // 8), dtype=torch.uint8), L)


def call_low_precision(arch, D, block, precision, listed=True, tail=False):
    """Call the plain kernel, and on Hopper the other one too."""
    import torch

    from sparse_attn.backends.triton.quantise import quantise
    from sparse_attn.backends.triton.quantised_attention import PRECISIONS, low_precision_attention

    q = torch.zeros(1, 2, 300, D, dtype=torch.bfloat16)
    k = torch.zeros(1, 2, 64 * 6 if tail else 300, D, dtype=torch.bfloat16)
    lists = {}
    if listed:
        shape = (1, 2, -(-300 // block))
        lists["kv_indices"] = torch.zeros(*shape, 5, dtype=torch.int32)
        lists["kv_num_blocks"] = torch.zeros(shape, dtype=torch.int32)
    if tail:
        lists["key_bias"] = torch.zeros(1, 64 * 6)
        lists["tail"] = torch.zeros(*shape, 1, dtype=torch.uint8)
        lists["order"] = torch.arange(300, dtype=torch.int32).expand(1, 2, 300)
    low_precision_attention(q, k, k, scale=0.1, precision=precision, block_q=block, **lists)
    if arch == 90:
        from sparse_attn.backends.hopper import quantised_attention as hopper_low_precision

        dtype = PRECISIONS[precision]
        x = quantise(q, k, k, scale=0.1, dtype=dtype, values=True, ordered=True)
        hopper_low_precision.launch(
            x, q, torch.zeros(1, 2, 300), k.shape[2], block_q=block, num_listed=5 * tail, **lists
        )


def compile_all(arch):
    """What each kernel of this architecture takes of a program's resources."""
    from triton import knobs

    stands = compile_only(arch)
    from sparse_attn.backends import tiles

    calls = [(name, 128, 64, False) for name in ("sparse", "dense")]
    if arch not in LIKE_OTHERS:
        calls += [(name, 128, 64, False) for name in ("features", "halve", "tail error")]
        calls += [(x, 128, 64, False) for x in ("masses", "int8 masses", "top blocks")]
        calls += [("arrange", 128, block, False) for block in (64, 128)]
    if arch == 90:
        calls += [("int8 masses", 128, 64, True)]
    if arch in (90, 120):
        calls += [(name, 128, 128, True) for name in ("sparse", "dense")]
        calls += [(name, 128, block, False) for name in ("tail", "pooled") for block in (64, 128)]
    for kernel, D, block, bias in calls:
        call(kernel, 1, 2, 300, D, block, bias)
        if arch == 90 and kernel not in NO_TILES:
            same = "sparse" if kernel == "tail" else kernel
            if kernel == "int8 masses" and bias:
                same = "masses"
            call(kernel, 1, 2, 300, D, block, bias, tile=tiles.hopper_tile(same, block))
    if arch == 90:
        call("sparse", 1, 2, 300, 64, 64, tile=tiles.hopper_tile("sparse", 64))
    if arch not in LIKE_OTHERS:
        call_low_precision(arch, 128, 64, "int8")
    if arch in (90, 120):
        call_low_precision(arch, 128, 128, "fp8")
        call_low_precision(arch, 128, 128, "int8", listed=False)
        call_low_precision(arch, 128, 128, "int8", tail=True)
    found = []
    for name, stand in stands.items():
        for binary in stand.binaries.values():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
                f.write(binary.asm["cubin"])
                f.flush()
                usage = subprocess.run(
                    [knobs.nvidia.cuobjdump.path, "-res-usage", f.name],
                    capture_output=True, text=True, check=True,
                ).stdout  # fmt: skip
            found.append(
                {
                    "kernel": name,
                    "shared": binary.metadata.shared,
                    "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
                    "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
                    "tensor_core": len(TENSOR_CORE.findall(binary.asm["ptx"])),
                }
            )
    return found


def compile_amd(arch):
    """As `compile_all`, for an AMD card."""
    stands = compile_only(arch)
    for block in (64, 128):
        for kernel in ("sparse", "dense", "masses"):
            call(kernel, 1, 2, 300, 128, block)
    found = []
    for name, stand in stands.items():
        for binary in stand.binaries.values():
            code = binary.asm["amdgcn"]
            found.append(
                {
                    "kernel": name,
                    "shared": binary.metadata.shared,
                    "stack": int(re.search(r"\.private_segment_fixed_size: (\d+)", code).group(1)),
                    "tensor_core": len(TENSOR_CORE.findall(code)),
                }
            )
    return found


def count_variants(arch):
    """How many binaries serve calls that differ only in shape and strides."""
    stands = compile_only(arch)
    import torch

    from sparse_attn.backends import tiles
    from sparse_attn.backends.triton import row_wise_top_k as top_blocks

    counts = {}
    for kernel in ("sparse", "dense", "masses", "unpack"):
        for B, H, L, strided in ((1, 1, 64, False), (2, 3, 128, True), (1, 16, 1024, False)):
            call(kernel, B, H, L, 64, 64, strided=strided)
            if arch == 90 and kernel != "unpack":
                call(kernel, B, H, L, 64, 64, strided=strided, tile=tiles.hopper_tile(kernel, 128))
        counts[kernel] = len(stands[kernel].binaries)
    for L in (64, 1000):
        masses = torch.zeros(1, 2, 5, L)
        sinks = torch.zeros(L, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
        top_blocks.row_wise_top_k(masses, masses, torch.ones(1, 2), 1, *sinks)
    counts["top_blocks"] = len(stands["top_blocks"].binaries)
    for kernel in ("hopper", "hopper_masses") if arch == 90 else ():
        counts[kernel] = len(stands[kernel].binaries)
    # a bias is the one thing that makes a second kernel
    call("sparse", 1, 1, 64, 64, 64, bias=True)
    call("sparse", 2, 2, 130, 64, 64, bias=True)
    counts["biased"] = len(stands["sparse"].binaries)
    return counts


if __name__ == "__main__":
    if hasattr(os, "nice"):
        # other tests run beside
        os.nice(19)
    what = {"compile": compile_all, "compile_amd": compile_amd, "variants": count_variants}
    arch = sys.argv[2] if sys.argv[1] == "compile_amd" else int(sys.argv[2])
    sys.stdout.write(json.dumps(what[sys.argv[1]](arch)) + "\n")
