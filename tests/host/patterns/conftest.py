"""Nodes and folders of patterns, for the tests beside this file."""

from types import SimpleNamespace

import pytest

from tests.host.host_fixtures import sample
from tests.tools import comfy_inprocess


@pytest.fixture
def folders(comfyui, tmp_path):
    """ComfyUI's output and input folders, for one test."""
    import folder_paths

    before = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    folder_paths.set_input_directory(str(tmp_path / "input"))
    yield SimpleNamespace(output=tmp_path / "output/adaspa", input=tmp_path / "input/adaspa")
    folder_paths.set_output_directory(before[0])
    folder_paths.set_input_directory(before[1])


@pytest.fixture
def nodes(folders):
    found = comfy_inprocess.nodes_of(comfy_inprocess.load_pack())
    return {
        name: node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}) for name, node in found.items()
    }  # fmt: skip


@pytest.fixture
def attention(nodes, load):
    """attention(model, **settings) -> patched model and handle of the node itself."""

    def run(name="wan_h64", **settings):
        widgets = {
            "preset": "Custom", "sparsity": 0.6, "block_size": "64", "warmup": 0.0,
            "search_points": "", "min_tokens": 64, "dense_attention": "host",
            "verdict": "sparse", **settings,
        }  # fmt: skip
        model = load(name) if isinstance(name, str) else name
        return nodes["AdaSpaAttention"].execute(model, **widgets).args

    return run


@pytest.fixture
def saved(attention, nodes, folders):
    """A pattern of seed 1 and its video."""
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    out = sample(model, seed=1)
    return SimpleNamespace(path=folders.output / "city.safetensors", out=out, handle=handle)
