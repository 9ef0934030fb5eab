"""Samples a stack of `real_stacks` through ComfyUI's sampler, and watches every model call."""

import time
from collections import Counter

import comfy.patcher_extension
import comfy.sample
import torch

from sparse_attn.host.install import install

from . import real_stacks


class StackRuns:
    """A stack on a device, and runs of it. `errors` gathers what went otherwise than expected."""

    def __init__(self, stack: real_stacks.Stack, small: bool, device):
        self.stack, self.small, self.device = stack, small, device
        self.shapes = stack.short_shapes() if small else stack.shapes
        self.patcher = self.build()
        self.dense_choice = None
        self.errors = []

    def build(self, **options):
        return real_stacks.build(self.stack, self.device, small=self.small, **options)

    def install(self, patcher, config, **options):
        model, handle = install(patcher, config, **options)
        # one for all runs: nearly equal candidates must not change places between two of them
        self.dense_choice = self.dense_choice or handle.dense_choice
        handle.dense_choice = self.dense_choice
        return model, handle

    def sample(self, model, steps, shapes=None, begin=None, **options):
        """Sample; returns the latent and the meter of its model calls.

        Args:
            begin: latent of an earlier sampler to go on from.
        """
        meter = Meter()
        shapes = shapes or self.shapes
        noise, latent = real_stacks.noise(shapes), real_stacks.empty(shapes)
        if begin is not None:
            noise, latent = latent, begin
        text = real_stacks.conditioning(self.stack, self.small)
        out = comfy.sample.sample(
            meter.on(model), noise, steps, 1.0, "euler", "simple", text, text, latent,
            disable_pbar=True, disable_noise=begin is not None, seed=0, **options,
        )  # fmt: skip
        return out, meter

    def sparse(self, config, steps, shapes=None):
        """Sample with AdaSpa; returns the latent, the meter and the statistics."""
        model, handle = self.install(self.patcher, config)
        out, meter = self.sample(model, steps, shapes)
        self.check(handle.latest(), steps, shapes or self.shapes)
        return out, meter, handle.latest()

    def check(self, statistics, steps, shapes):
        """Every call must be taken or declined as the family's rule says."""
        timing = statistics.timing
        taken = sum(len(calls) for calls in (timing.dense, timing.search, timing.sparse))
        if taken != steps * self.stack.layers:
            self.errors.append(f"{taken} calls taken in {steps} steps")
        declined = Counter(self.stack.declined_calls(shapes, statistics.tokens))
        for reason in declined:
            declined[reason] *= steps
        met = statistics.kept_dense + statistics.beside
        if declined != met:
            self.errors.append(f"declined {dict(met)}, expected {dict(declined)}")
        self.errors += statistics.warnings


class Meter:
    """Times every call of the diffusion model, waiting for the device at both ends.

    `seconds` and `peaks` (bytes) have an entry for each call; `change` is what the last one took
    off its input.
    """

    def __init__(self):
        self.seconds, self.peaks, self.change = [], [], None

    def on(self, patcher):
        patched = patcher.clone()
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        patched.remove_wrappers_with_key(kind, "meter")
        patched.add_wrapper_with_key(kind, "meter", self)
        return patched

    def __call__(self, executor, x, *args, **inputs):
        cuda = x.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        out = executor(x, *args, **inputs)
        if cuda:
            torch.cuda.synchronize()
            self.peaks.append(torch.cuda.max_memory_allocated())
        self.seconds.append(time.perf_counter() - start)
        self.change = (x - out).float()
        return out


def relative(out, expected) -> float:
    return (torch.linalg.vector_norm(out - expected) / torch.linalg.vector_norm(expected)).item()
