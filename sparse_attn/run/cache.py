"""Memory that masks, orders and LSE take between steps: predicted before a run, held where it fits."""

from dataclasses import dataclass

import torch

from ..schedule import Schedule, StepKind

# share of the free GPU memory that the cache may take before "auto" moves it to the CPU
GPU_SHARE = 0.2


@dataclass(frozen=True)
class CacheSize:
    """Bytes that one conditioning holds at the fullest moment of a run."""

    mask_bytes: int
    lse_bytes: int
    order_bytes: int = 0

    @property
    def total(self) -> int:
        return self.mask_bytes + self.lse_bytes + self.order_bytes


def predict(
    schedule: Schedule,
    *,
    layers: int,
    batch: int,
    heads: int,
    tokens: int,
    block_q: int,
    block_k: int,
    one_pass: bool,
    keeps_lse: bool = True,
    own_orders: bool = False,
) -> CacheSize:
    """Predict the cache of one conditioning.

    A mask takes one bit per block pair, an LSE and the orders four bytes per token, head and layer.
    The LSE of the last warm-up step gives way to the masks layer by layer, so both are whole at once
    only when a later search needs the LSE again. What lives within a call alone, such as the arranged
    copies of q, k and v, is not counted.

    Args:
        one_pass: whether the backend searches in one pass and so keeps the LSE of a dense step.
        keeps_lse: False where every search measures its own LSE.
        own_orders: whether every head has an order of its own beside its mask.
    """
    num_q, num_k = -(-tokens // block_q), -(-tokens // block_k)
    mask = layers * batch * heads * num_q * -(-num_k // 8)
    lse = layers * batch * heads * tokens * 4
    searches = schedule.kinds.count(StepKind.SEARCH)
    if searches == 0:
        return CacheSize(0, 0)
    order = lse if own_orders else 0
    if not keeps_lse:
        return CacheSize(mask, 0, order)
    if searches > 1:
        return CacheSize(mask, lse, order)
    before = one_pass and any(schedule.wants_lse(i) for i in range(len(schedule.kinds)))
    if mask + order >= lse or not before:
        return CacheSize(mask, 0, order)
    return CacheSize(0, lse)


class Cache:
    """Keeps tensors on the GPU, or in pinned CPU memory with the next one fetched ahead.

    Args:
        wanted: "gpu" (wherever the tensor is), "cpu", or "auto": on the GPU while there is room.
        free_bytes: free memory of the GPU when the run starts, or None where there is none.
    """

    def __init__(self, wanted: str, free_bytes: int | None = None):
        self.wanted = wanted
        self.free_bytes = free_bytes
        self.place = "cpu" if wanted == "cpu" else "gpu"
        self._streams = {}
        # id of a stored tensor -> that tensor, so that its id stays taken, and its copy
        self._fetched = {}

    def make_room(self, size: int) -> None:
        """Leave the GPU where `size` bytes would take too much of it, unless the user insists."""
        if self.wanted == "auto" and self.free_bytes and size > GPU_SHARE * self.free_bytes:
            self.place = "cpu"

    def shown_place(self) -> str:
        return "cpu" if self.free_bytes is None else self.place

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy to store, in memory of its own; on the CPU it is pinned."""
        if self.place == "gpu" or tensor.device.type != "cuda":
            return tensor.clone()
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
