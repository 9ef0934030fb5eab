"""Every kernel, with the tile it gets on every card, compiled here without that card.

The compiler needs no GPU, but it must not be interpreted, so other processes run this file. What it
said of a kernel is on record (`compiler.py`), and it is asked again when anything has changed.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

from tests.backends import compiler

ROOT = Path(__file__).resolve().parents[2]
ARCHS = (80, 86, 89, 90, 100, 120)
# the same instructions as 80 and the same shared memory as 120, so fewer kernels suffice
LIKE_OTHERS = (86, 89)
# bytes of stack per thread, where spilled registers go; a handful outside the loop costs nothing
STACK_LIMIT = 256
TENSOR_CORE = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma|v_wmma")
AMD_ARCHS = ("gfx942", "gfx1100")
AMD_SHARED_MEMORY = 64 * 1024
# kernels without a product of matrices
NO_PRODUCTS = {
    f"{name}_kernel"
    for name in (
        "permute", "row_wise_top_k", "deviation", "direction", "along", "sort", "take",
        "unpack_mask", "sums", "finish", "values",
    )
}  # fmt: skip


# what is asked, Hopper's share apart, as it takes as long as the rest
PARTS = [
    ["compile 90", "variants 90"],
    [f"compile {arch}" for arch in (*ARCHS, *AMD_ARCHS) if arch != 90],
]
PROCESSES = compiler.Processes(__file__, PARTS)


@pytest.fixture(scope="module")
def answers():
    pytest.importorskip("triton")
    return PROCESSES.answer


def assert_fits(arch, kernels):
    from sparse_attn.backends.tiles import SHARED_MEMORY

    limit = SHARED_MEMORY[divmod(arch, 10)]
    assert "attention_kernel" in {kernel["kernel"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= limit, f"{kernel}: the card has {limit} bytes"
        assert kernel["stack"] <= STACK_LIMIT, f"{kernel}: registers spill"
        used = kernel["tensor_core"] > 0
        assert used or kernel["kernel"] in NO_PRODUCTS, f"{kernel}: no tensor-core instruction"


def assert_fits_amd(kernels):
    assert {"attention_kernel", "block_masses_kernel"} <= {x["kernel"] for x in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= AMD_SHARED_MEMORY, kernel
        assert kernel["stack"] <= STACK_LIMIT, f"{kernel}: registers spill"
        used = kernel["tensor_core"] > 0
        assert used or kernel["kernel"] in NO_PRODUCTS, f"{kernel}: no matrix instruction"


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit_the_card_and_use_its_tensor_cores(arch, answers):
    assert_fits(arch, answers(f"compile {arch}"))


@pytest.mark.parametrize("arch", AMD_ARCHS)
def test_kernels_compile_for_amd(arch, answers):
    assert_fits_amd(answers(f"compile {arch}"))


@pytest.mark.long
def test_the_record_is_brought_up_to_date(answers):
    rows = {arch: answers(f"compile {arch}") for arch in (*ARCHS, *AMD_ARCHS)}
    for arch in ARCHS:
        assert_fits(arch, rows[arch])
    for arch in AMD_ARCHS:
        assert_fits_amd(rows[arch])
    compiler.write(rows)


def test_what_a_kernel_depends_on_is_part_of_its_key(answers):
    keys = [row["key"] for arch in (*ARCHS, *AMD_ARCHS) for row in answers(f"compile {arch}")]
    assert len(set(keys)) == len(keys)


def test_other_shapes_and_strides_reuse_the_compiled_kernel(answers):
    assert answers("variants 90") == {
        # sparse and dense with masses are one kernel
        "attention_kernel": 2,
        "hopper_attention_kernel": 2,
        "block_masses_kernel": 1,
        "hopper_block_masses_kernel": 1,
        "unpack_mask_kernel": 1,
        "row_wise_top_k_kernel": 1,
        "biased": 3,
    }


def fake_gpu(arch):
    """Make Triton believe that a card of this architecture is present; it can only compile."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, 32)
    if isinstance(arch, str):
        target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    # a kernel keeps its binaries by the number of the device
    device = next(DEVICES)

    class Driver:
        def get_current_target(self):
            return target

        def get_current_device(self):
            return device

        def get_current_stream(self, device):
            return 0

        def get_device_interface(self):
            raise NotImplementedError

    triton.runtime.driver.set_active(Driver())


DEVICES = itertools.count()


class Compiled:
    """Stands for a kernel: launching it only compiles it.

    Args:
        asked: where keys of what the compiler is about to do are noted, or None.
        binaries: by key, None for one that was left out; without keys by identity.
    """

    def __init__(self, kernel, asked):
        self.kernel, self.asked = kernel, asked
        self.binaries = {}

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            binary = self.kernel.warmup(*args, grid=grid, **kwargs)
            if self.asked is None:
                self.binaries[id(binary)] = binary
            elif self.asked:
                self.binaries[self.asked.pop()] = binary

        return launch


def compile_only(arch, left_out=None):
    """The operations of this pack, made to compile for `arch` whatever tensors they are given.

    Args:
        left_out: says of a kernel's key whether to leave it out; None needs no keys.
    """
    fake_gpu(arch)
    asked = None if left_out is None else compiler.note_keys(arch, left_out)
    from sparse_attn.backends import tiles

    amd = isinstance(arch, str)
    tiles.card_of = lambda device=None: arch if amd else divmod(arch, 10)
    stands = {}
    for folder in ("triton", "hopper") if arch == 90 else ("triton",):
        for path in sorted((ROOT / "sparse_attn/backends" / folder).glob("[a-z]*.py")):
            module = import_module(f"sparse_attn.backends.{folder}.{path.stem}")
            for name, kernel in vars(module).copy().items():
                # defined there, and not only imported
                if name.endswith("_kernel"):
                    kernel = kernel.kernel if isinstance(kernel, Compiled) else kernel
                    if kernel.fn.__module__ == module.__name__:
                        stands[name.strip("_")] = Compiled(kernel, asked)
                        setattr(module, name, stands[name.strip("_")])
    return stands


def operation(folder, name, file=None):
    return getattr(import_module(f"sparse_attn.backends.{folder}.{file or name}"), name)


def tensors(B, H, L, D, strided=False):
    """Queries, which serve as keys and values too; their contents do not matter."""
    import torch

    shape = (B, L, H, D) if strided else (B, H, L, D)
    q = torch.zeros(shape, dtype=torch.bfloat16)
    return q.transpose(1, 2) if strided else q


def mask_of(q, block_q, block_k):
    import torch

    from sparse_attn.block_mask import BlockMask

    (B, H, L, _), num_k = q.shape, -(-q.shape[2] // block_k)
    bits = torch.zeros(B, H, -(-L // block_q), -(-num_k // 8), dtype=torch.uint8)
    return BlockMask(bits, num_k, block_q, block_k)


def attend(folder, q, block_q=64, block_k=64, *, name="attention", masked=True, bias=False,
           tail=False):  # fmt: skip
    """Attention of every kind."""
    import torch

    from sparse_attn.backends.permuted import Pooled

    B, H, L, D = q.shape
    options = {"scale": 0.1, "key_bias": torch.zeros(B, L) if bias else None}
    if masked:
        options["mask"] = mask_of(q, block_q, block_k)
    if tail:
        means = torch.zeros(B, H, -(-L // block_k), D, dtype=q.dtype)
        options["pooled"] = Pooled(means, means, torch.zeros(B, means.shape[2]))
        options["order"] = torch.arange(L, dtype=torch.int32).expand(B, H, L)
    operation(folder, name)(q, q, q, **options)


def search(folder, q, block_q=64, block_k=64, *, bias=False):
    """Dense attention with masses."""
    import torch

    B, H, L, _ = q.shape
    operation(folder, "attention_with_masses", "attention")(
        q, q, q, scale=0.1, key_bias=torch.zeros(B, L) if bias else None,
        previous_lse=torch.zeros(B, H, L), block_q=block_q, block_k=block_k,
    )  # fmt: skip


def measure(folder, q, block_q=64, block_k=64, *, bias=False, int8=False):
    """Block masses."""
    import torch

    B, H, L, _ = q.shape
    operation(folder, "block_masses")(
        q, q, torch.zeros(B, H, L), scale=0.1, key_bias=torch.zeros(B, L) if bias else None,
        block_q=block_q, block_k=block_k, int8=int8,
    )  # fmt: skip


def order_and_select(q):
    """What an order and a selection take, the same kernels on all cards."""
    import torch

    B, H, L, D = q.shape
    operation("triton", "permute")(q, q, q, torch.arange(L, dtype=torch.int32).expand(B, H, L))
    for block_q in (64, 128):
        operation("triton", "pooled_masses")(
            q, q, torch.zeros(B, L), torch.zeros(B, H, L), block_q=block_q, scale=0.1
        )
    masses, sinks = torch.zeros(B, H, 5, 5), torch.zeros(5, dtype=torch.bool)
    operation("triton", "row_wise_top_k")(masses, masses, torch.ones(B, H), 1, sinks, sinks)
    operation("triton", "tail_error")(masses, masses.clone(), q, q[:, :, :5])
    bases = torch.zeros(2, B, H, D), torch.zeros(2, B, H, D, 16)
    operation("triton", "features")(q, q, *bases, torch.zeros(L, 8))


def halve(H):
    """The most tokens that are sorted on chip, and one more: 12 to 20 s of compiling."""
    import torch

    for tokens in (2048, 2049):
        operation("triton", "pca_tree")(torch.zeros(H, tokens, 40))


def compile_all(arch, every=False, known=None):
    """What each kernel of this architecture takes of a program's resources.

    Args:
        every: also those tiles that are the same on another card.
        known: rows by key that need not be found out.
    """
    stands = compile_only(arch, None if known is None else known.__contains__)
    q = tensors(1, 2, 300, 128)
    whole = every or arch not in LIKE_OTHERS
    for folder in ("triton", "hopper") if arch == 90 else ("triton",):
        attend(folder, q)
        search(folder, q)
        if whole:
            measure(folder, q)
            measure(folder, q, int8=True)
            attend(folder, q, name="quantised_attention")
        if every or arch in (90, 120):
            # rows sampled of a block
            measure(folder, q, 16)
            measure(folder, q, 16, int8=True)
            attend(folder, q, 128, 128, bias=True)
            search(folder, q, 128, 128, bias=True)
            attend(folder, q, 128, name="quantised_attention", masked=False)
            for name in ("attention", "quantised_attention"):
                attend(folder, q, 64, name=name, tail=True)
                attend(folder, q, 128, name=name, tail=True)
                attend(folder, q, 128, 128, name=name, tail=True)
                attend(folder, q, 128, name=name, tail=True, bias=True)
    if whole:
        order_and_select(q)
    if arch == 120:
        # the same on all cards, and of these the one with the least shared memory
        halve(2)
    if arch == 90:
        measure("hopper", q, int8=True, bias=True)
        measure("hopper", q, bias=True)
        attend("hopper", tensors(1, 2, 300, 64))
    return resources(stands, known)


def resources(stands, known=None):
    """What each binary for an NVIDIA card takes."""
    from triton import knobs

    found = []
    for name, stand in stands.items():
        for key, binary in stand.binaries.items():
            if binary is None:
                found.append(known[key])
                continue
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
                    "key": key,
                }
            )
    return found


def compile_amd(arch, known):
    """As `compile_all`, for an AMD card."""
    stands, q = compile_only(arch, known.__contains__), tensors(1, 2, 300, 128)
    for block in (64, 128):
        attend("triton", q, block, block)
        search("triton", q, block, block)
        measure("triton", q, block, block)
    found = []
    for name, stand in stands.items():
        for key, binary in stand.binaries.items():
            if binary is None:
                found.append(known[key])
                continue
            code = binary.asm["amdgcn"]
            found.append(
                {
                    "kernel": name,
                    "shared": binary.metadata.shared,
                    "stack": int(re.search(r"\.private_segment_fixed_size: (\d+)", code).group(1)),
                    "tensor_core": len(TENSOR_CORE.findall(code)),
                    "key": key,
                }
            )
    return found


def count_variants(arch):
    """How many binaries serve calls that differ only in shape and strides; none is compiled."""
    stands = compile_only(arch, lambda key: True)
    import torch

    for B, H, L, strided in ((1, 1, 64, False), (2, 3, 128, True), (1, 16, 1024, False)):
        q = tensors(B, H, L, 64, strided)
        for folder in ("triton", "hopper"):
            attend(folder, q, 128 if folder == "hopper" else 64)
            search(folder, q)
            measure(folder, q)
    for L in (64, 1000):
        masses = torch.zeros(1, 2, 5, L)
        sinks = torch.zeros(L, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
        operation("triton", "row_wise_top_k")(masses, masses, torch.ones(1, 2), 1, *sinks)
    counts = {name: len(stand.binaries) for name, stand in stands.items() if stand.binaries}
    # a bias is the one thing that makes another kernel
    for B, L in ((1, 64), (2, 130)):
        attend("triton", tensors(B, 2, L, 64), bias=True)
    return counts | {"biased": len(stands["attention_kernel"].binaries)}


def answer(question, known):
    what, arch = question.split()
    if not arch.isdigit():
        return compile_amd(arch, known)
    return count_variants(int(arch)) if what == "variants" else compile_all(int(arch), known=known)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        # other tests run beside
        os.nice(19)
    known = json.loads(sys.stdin.read())
    sys.stdout.write(json.dumps({x: answer(x, known) for x in sys.argv[1:]}) + "\n")
