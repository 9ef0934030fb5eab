"""Memory that masks and LSE take between steps: predicted before a run, held where it fits."""

from dataclasses import dataclass

import torch

from .schedule import Schedule, StepKind

# share of the free GPU memory that the cache may take before "auto" moves it to the CPU
GPU_SHARE = 0.2


@dataclass(frozen=True)
class CacheSize:
    """Bytes that one conditioning holds at the fullest moment of a run."""

    mask_bytes: int
    lse_bytes: int

    @property
    def total(self) -> int:
        return self.mask_bytes + self.lse_bytes


def predict(
    schedule: Schedule,
    *,
    layers: int,
    batch: int,
    heads: int,
    tokens: int,
    block_size: int,
    one_pass: bool,
) -> CacheSize:
    """Predict the cache of one conditioning.

    A mask takes one bit per block pair, an LSE four bytes per token, head and layer. The LSE of
    the last warm-up step gives way to the masks layer by layer, so both are whole at once only
    when a later search needs the LSE again.

    Args:
        one_pass: whether the backend searches in one pass and so keeps the LSE of a dense step.
    """
    blocks = -(-tokens // block_size)
    mask = layers * batch * heads * blocks * -(-blocks // 8)
    lse = layers * batch * heads * tokens * 4
    searches = schedule.kinds.count(StepKind.SEARCH)
    if searches == 0:
        return CacheSize(0, 0)
    if searches > 1:
        return CacheSize(mask, lse)
    before = one_pass and any(schedule.wants_lse(i) for i in range(len(schedule.kinds)))
    return CacheSize(mask, 0) if mask >= lse or not before else CacheSize(0, lse)


class Cache:
    """Keeps tensors on the GPU, or in pinned CPU memory with the next one fetched ahead.

    Args:
        place: "gpu" (wherever the tensor is) or "cpu".
    """

    def __init__(self, place: str):
        self.place = place
        self._streams = {}
        # id of a stored tensor -> that tensor, so that its id stays taken, and its copy
        self._fetched = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor to store; on the CPU it is pinned."""
        if self.place == "gpu" or tensor.device.type != "cuda":
            return tensor
        stored = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return stored.copy_(tensor, non_blocking=True)

    def fetch(self, stored: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a stored tensor on `device`."""
        if stored.device == device:
            return stored
        _, fetched = self._fetched.pop(id(stored), (None, None))
        if fetched is None:
            return stored.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(self._streams[device])
        fetched.record_stream(current)
        return fetched

    def prefetch(self, stored: torch.Tensor, device: torch.device) -> None:
        """Start copying a stored tensor to a CUDA `device` beside the current work."""
        if stored.device == device or id(stored) in self._fetched:
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        # the copy into pinned memory was queued on the current stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._fetched[id(stored)] = stored, stored.to(device, non_blocking=True)

    def forget(self, stored: torch.Tensor) -> None:
        """Drop what was fetched ahead of a stored tensor that gives way to another."""
        self._fetched.pop(id(stored), None)

    def clear(self) -> None:
        self._fetched.clear()
        self._streams.clear()
