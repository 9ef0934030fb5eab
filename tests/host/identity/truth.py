"""Where a thread really is, and the ways in which other nodes change a model's calls."""

import threading
from collections import defaultdict

import torch

from sparse_attn.run.state import RunState
from tests.host.family_cases import CASES
from tests.host.host_fixtures import conditioning

# a case of every model
ONE_EACH = {case.model: name for name, case in reversed(CASES.items())}
WIDE = (1, 16, 3, 16, 96)


class Truth:
    """Where this thread really is, noted by hooks of the test, against what each call's key says."""

    def __init__(self, monkeypatch):
        self.here = threading.local()
        self.met = defaultdict(set)
        self.layers, self.names = defaultdict(set), defaultdict(set)
        attend = RunState.attend

        def noted(run, call):
            if call.key is not None:
                where = self.inside(), getattr(self.here, "part", None)
                self.met[id(run), call.key].add((*where, threading.get_ident()))
                self.layers[self.inside()].add(call.layer)
                self.names[self.inside()].add(call.name)
            return attend(run, call)

        monkeypatch.setattr(RunState, "attend", noted)

    def inside(self):
        stack = getattr(self.here, "stack", None)
        return stack[-1] if stack else None

    def watch(self, block, number):
        def enter(module, inputs):
            self.here.stack = [*getattr(self.here, "stack", []), number]

        def leave(module, inputs, outputs):
            self.here.stack = self.here.stack[:-1]

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)

    def holds(self):
        return bool(self.met) and all(len(places) == 1 for places in self.met.values())


LISTS = (
    "blocks", "transformer_blocks", "double_blocks", "single_blocks", "visual_transformer_blocks",
    "vace_blocks",
)  # fmt: skip


def lists_of(model):
    """The lists of blocks of a diffusion model, by the attribute that holds each."""
    found = {name: getattr(model, name) for name in LISTS if hasattr(model, name)}
    return {
        name: list(blocks.values() if hasattr(blocks, "values") else blocks)
        for name, blocks in found.items()
    }


def in_every_call(patcher, wrapper):
    """Add a wrapper of every call of the model, inside ours."""
    import comfy.patcher_extension

    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    patcher.add_wrapper_with_key(kind, "a test", wrapper)


def guided(guider, shape=WIDE, steps=4):
    import comfy.samplers

    guider.set_conds(conditioning(7, 0), conditioning(9, 1))
    guider.set_cfg(5.0)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.sampler_object("euler")
    with torch.no_grad():
        return guider.sample(noise, torch.zeros(shape), sampler, sigmas, disable_pbar=True, seed=1)
