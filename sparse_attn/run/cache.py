"""Where masks, orders and LSE lie between steps: on the GPU, or in pinned CPU memory."""

import torch

# share of the free GPU memory that the cache may take before "auto" moves it to the CPU
GPU_SHARE = 0.2


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

    def forget(self, *stored: torch.Tensor | None) -> None:
        """Drop what was fetched ahead of stored tensors that give way to others."""
        for tensor in stored:
            self._fetched.pop(id(tensor), None)

    def clear(self) -> None:
        self._fetched.clear()
        self._streams.clear()
