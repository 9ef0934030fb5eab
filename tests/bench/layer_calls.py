"""Calls of one layer of HunyuanVideo through a run, alone: what several measurements share."""

import torch

from sparse_attn.call import Call
from sparse_attn.orders.position import serpentine_order
from sparse_attn.run.dense import DenseChoice
from sparse_attn.run.state import RunState
from sparse_attn.schedule import Schedule, StepKind

HEADS, DIM, TEXT = 24, 128, 256
# latent frames of 45 x 80 tokens
LENGTHS = {"5 s": 33, "10 s": 63, "16 s": 97, "24 s": 145}
KINDS = {"D": StepKind.DENSE, "S": StepKind.SEARCH, "s": StepKind.SPARSE}


def inputs(tokens: int, heads: int, device) -> list[torch.Tensor]:
    """q, k, v [1, H, L, D] bfloat16 over the host's memory; neighbours are alike."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for _ in range(3):
        x = torch.empty(1, tokens, heads, DIM, device=device, dtype=torch.bfloat16)
        for head in range(heads):
            base = torch.randn(tokens // 400 + 1, DIM, device=device, generator=generator)
            noise = torch.randn(tokens, DIM, device=device, generator=generator)
            x[0, :, head] = base.repeat_interleave(400, 0)[:tokens] + 0.5 * noise
        found.append(x.transpose(1, 2))
    return found


class LayerRun:
    """A run of `steps` (a letter of `KINDS` each) whose only layer is called with `qkv`.

    Args:
        choice: who runs dense calls; None leaves them to our own exact attention.
    """

    def __init__(self, config, steps: str, qkv, layout, choice: DenseChoice | None = None):
        sigmas = tuple(float(x) for x in range(len(steps), -1, -1))
        schedule = Schedule(tuple(KINDS[x] for x in steps), 0, len(steps), sigmas)
        self.state = RunState(config, schedule, choice or DenseChoice("host"))
        self.qkv, self.layout = qkv, layout
        self.by_position = serpentine_order(layout, qkv[0].device)

    def enter(self, step: int):
        """Begin a step; what is returned runs its call, as often as it is called."""
        self.state.enter_step(step)
        self.call = call = Call(
            *self.qkv, DIM**-0.5, self.layout, step=step, dense=lambda heads=None: 1 / 0,
            key="layer", by_position=self.by_position,
        )  # fmt: skip
        return lambda: self.state.attend(call)

    def end(self) -> int:
        """Free the run and return the most bytes that its layer held; refuse it where calls ran dense."""
        said = self.state.statistics
        if said.warnings or said.kept_dense:
            raise RuntimeError(f"{said.warnings} {dict(said.kept_dense)}")
        self.state.free()
        return said.memory.held_bytes
