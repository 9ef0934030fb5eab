"""ComfyUI's split over several GPUs: prompts in threads, each with a copy of the model."""

import gc
import threading

import pytest
import torch

from sparse_attn.run.state import RunState
from tests.host.host_fixtures import assert_other_video, assert_same_video, calls, sample, sparse

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)


@pytest.fixture
def split(comfyui, model_paths, monkeypatch):
    """split(patched) -> a model whose prompts ComfyUI spreads over two devices, both of them CPUs."""
    pytest.importorskip("comfy.multigpu")
    import comfy.model_management
    import comfy_extras.nodes_multigpu as nodes

    def both(exclude_current=False):
        return [SECOND] if exclude_current else [FIRST, SECOND]

    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", both)
    (node,) = [n for n in vars(nodes).values() if getattr(n, "__name__", "").endswith("SplitNode")]

    def split(model):
        # the node stumbles over patchers that have gone while the weights of other tests live on
        gc.collect()
        loaded = comfy.model_management.current_loaded_models
        loaded[:] = [entry for entry in loaded if entry.model is not None]
        return node.execute(model, 2).args[0]

    return split


@pytest.fixture
def threads_seen(monkeypatch):
    """The thread of every call that is ours, with its key."""
    seen = []
    attend = RunState.attend

    def noted(self, call):
        if call.key is not None:
            seen.append((threading.get_ident(), call.key))
        return attend(self, call)

    monkeypatch.setattr(RunState, "attend", noted)
    return seen


def fresh(model_paths, name):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(model_paths[name]))


@pytest.mark.parametrize("name, layers", [("wan_h64", 2), ("hunyuan", 3)])
@pytest.mark.parametrize("order", ["before", "after"])
def test_prompts_in_two_threads(model_paths, split, threads_seen, name, layers, order):
    one_by_one, alone = sparse(fresh(model_paths, name), warmup=0.25)
    expected = sample(one_by_one)
    threads_seen.clear()

    if order == "after":
        model, handle = sparse(fresh(model_paths, name), warmup=0.25)
        model = split(model)
    else:
        model, handle = sparse(split(fresh(model_paths, name)), warmup=0.25)
    out = sample(model)
    assert_same_video(out, expected)
    assert calls(handle) == calls(alone)
    # two threads beside the main one, with nothing in common
    keys = {}
    for thread, key in threads_seen:
        keys.setdefault(thread, set()).add(key)
    assert len(keys) == 2 and threading.get_ident() not in keys
    first, second = keys.values()
    assert len(first) == len(second) == layers and not first & second
    assert handle.latest().schedule.describe() == "steps 1 dense, 2 search, 3-4 sparse"
    assert {role for _, role in handle.latest().patterns} == {"positive", "negative"}
    assert_other_video(out, sample(fresh(model_paths, name)))


def test_an_error_in_one_thread_leaves_the_rest_to_the_host(model_paths, split, monkeypatch):
    class Failure(RuntimeError):
        pass

    attend = RunState.attend

    def fails(self, call):
        if call.step == 1 and call.role == "negative":
            raise Failure
        return attend(self, call)

    model, handle = sparse(fresh(model_paths, "wan_h64"))
    model = split(model)
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "attend", fails)
        assert torch.isfinite(sample(model)).all()
    assert handle.latest().finished
    (warning,) = handle.latest().warnings
    assert warning.startswith("an error in AdaSpa, Failure(): every call runs dense from step 2")
    assert_same_video(sample(model), sample(sparse(fresh(model_paths, "wan_h64"))[0]))
