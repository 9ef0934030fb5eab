"""What a rehearsal launches is what a run launches, to the name of the binary in Triton's cache."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sparse_attn import block_mask
from sparse_attn.backends import choice
from sparse_attn.config import AdaSpaConfig
from sparse_attn.run.rehearsal import rehearse
from sparse_attn.token_layout import TokenLayout
from tests.backends.implementations import kernels_alone
from tests.run.fakes import Run, call_of

ROOT = Path(__file__).resolve().parents[2]


class Launches:
    """Notes the launches of the interpreter, and runs them or not."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpretedFunction

        self.met, self.runs = set(), False
        run_it, launch_key = InterpretedFunction.run, choice.compiler().launch_key

        def note(kernel, *args, grid, warmup, **kwargs):
            self.met.add(launch_key(kernel, args, kwargs))
            if self.runs:
                run_it(kernel, *args, grid=grid, warmup=warmup, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", note)

    def pca_tree(self, features):
        """By plain torch, since sorting in the interpreter takes a minute."""
        runs, self.runs = self.runs, False
        choice._kernel("pca_tree").pca_tree(features)
        self.runs = runs
        return choice.torch_pca_tree.pca_tree(features)


@pytest.mark.parametrize(
    ("settings", "bias", "most_pairs"),
    [
        ({"precision": "int8", "tail": "pooled", "query_stride": 4}, False, 25),
        ({"precision": "int8", "tail": "pooled", "token_order": "position"}, False, 15),
        ({"precision": "int8", "tail": "pooled", "token_order": "position"}, False, 9),
        ({"tail": "none", "block_size": "128", "recall": 0.7}, True, 25),
    ],
    ids=["tail", "rows in twos", "blocks in twos", "recall"],
)
def test_a_run_launches_nothing_that_was_not_rehearsed(
    settings, bias, most_pairs, monkeypatch, device
):
    if device.type == "cuda":
        pytest.skip("notes launches of the interpreter")
    launches, backend = Launches(monkeypatch), kernels_alone()
    state = torch.get_rng_state()
    rehearse(backend, AdaSpaConfig(**settings), 64, torch.bfloat16, bias)
    # a thread rehearses beside the sampler, and the seeds of a video are not ours
    assert torch.equal(torch.get_rng_state(), state)
    rehearsed, launches.met, launches.runs = launches.met, set(), True
    monkeypatch.setattr(block_mask, "MOST_PAIRS", most_pairs)
    layout = TokenLayout(20, 3, 4, 20)
    L = layout.tokens
    qkv = torch.randn(3, 1, 1, L, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = Run(
        "DSSs", replace(backend, pca_tree=launches.pca_tree), layout=layout, **settings
    ).state
    for step in range(4):
        key_bias = torch.zeros(1, L) if bias else None
        call = call_of(qkv.unbind(0), step, layout=layout)
        state.attend(replace(call, scale=0.125, key_bias=key_bias))
    assert len(launches.met) >= 5
    assert launches.met <= rehearsed


def test_what_comes_before_launches_is_taken_back(device):
    from sparse_attn.block_mask import BlockMask

    bits = torch.ones(1, 1, 2, 1, dtype=torch.uint8, device=device)
    unpack, came = choice._kernel("unpack_mask").unpack_mask, []
    take_back = choice.before_launches(device, came.append)
    unpack(BlockMask(bits, 2, 64, 64))
    take_back()
    unpack(BlockMask(bits, 2, 64, 64))
    assert len(came) == 1 and came[0].startswith("_unpack_mask_kernel uint8 int32 int32")


# cache keys that a rehearsal of the pack, under any name, looks up: argv is root, name, card, layout
KEYS = """
import json, sys, types
from importlib import import_module
root, name, card, layout, heads = sys.argv[1:]
pack = types.ModuleType(name)
pack.__path__ = [root]
sys.modules[name] = pack
import torch, triton
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_key
try:
    from triton.runtime.cache import get_cache_invalidating_env_vars
except ImportError:
    from triton._C.libtriton import get_cache_invalidating_env_vars
found, now = {}, []

def compile(src, target, options, **more):
    backend = make_backend(target)
    key = get_cache_key(src, backend, backend.parse_options(options), get_cache_invalidating_env_vars())
    found.setdefault(now[0], set()).add(key)

triton.compiler.compile = compile
choice = import_module(name + ".sparse_attn.backends.choice")
rehearsal = import_module(name + ".sparse_attn.run.rehearsal")
config = import_module(name + ".sparse_attn.config").AdaSpaConfig(precision="int8")
rehearsal.LAYOUT = import_module(name + ".sparse_attn.token_layout").TokenLayout(*json.loads(layout))
rehearsal.HEADS = int(heads)
backend = choice.compiling_kernels(tuple(json.loads(card)), lambda key: True, lambda key: None)
compiler, launches = choice.compiler(), triton.runtime.jit.JITFunction.run

def note(kernel, *args, **kwargs):
    now[:] = [compiler.launch_key(kernel, args, kwargs)]
    return launches(kernel, *args, **kwargs)

triton.runtime.jit.JITFunction.run = note
hooked = []
choice.before_launches(torch.device("cuda"), hooked.append)
for bias in (False, True):
    rehearsal.rehearse(backend, config, 128, torch.bfloat16, bias)
# what a launch asks for is what a worker has said
assert set(hooked) == set(found)
print(json.dumps({launch: sorted(keys) for launch, keys in found.items()}))
"""


@pytest.mark.parametrize("card", [(8, 9), (9, 0)])
def test_another_video_finds_the_binaries_in_the_cache(card):
    """Another length, other heads, text before the video, the pack under another name."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    videos = [("pack", [0, 3, 8, 88], 2), ("custom_nodes_adaspa", [77, 5, 9, 64, 3], 5)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", KEYS, str(ROOT), name, str(list(card)), str(layout), str(heads)],
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for name, layout, heads in videos
    ]  # fmt: skip
    answers = []
    for process in running:
        said, failed = process.communicate(timeout=300)
        assert process.returncode == 0, failed[-2000:]
        answers.append(json.loads(said.splitlines()[-1]))
    # what tells launches apart tells binaries apart, so each is asked for once
    assert len(answers[0]) > 30 and all(len(keys) == 1 for keys in answers[0].values())
    assert answers[0] == answers[1]
