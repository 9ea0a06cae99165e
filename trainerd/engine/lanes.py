"""Copies between a device and the host, begun now and waited for later; and host memory that a GPU copies from and to by itself.

On a CPU a copy is done when it has begun, so whatever uses a lane is tested there. Must not know what is copied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

_NUM_LANDINGS = 2
_ALIGNED = 64  # bytes: what the vector units of CPUs like
Wait = Callable[[], object]


def lane_of(device: torch.device, largest_bytes: int) -> Lane:
    """The lane for this device, for tensors up to this size."""
    return CudaLane(device, largest_bytes) if device.type == "cuda" else Lane()


class Lane:
    """Everything at once: the device is the CPU itself."""

    pins = False

    def put(self, target: Tensor, source: Tensor) -> None:
        """`target` on the host becomes `source` of the device."""
        target.copy_(source)

    def add(self, target: Tensor, source: Tensor) -> None:
        """`source` of the device is added to `target` on the host."""
        target.add_(source)

    def send(self, target: Tensor, source: Tensor) -> None:
        """`target` on the device becomes `source` of the host. Whatever computes with it afterwards sees the new one."""
        target.copy_(source)

    def wait(self) -> None:
        """Until all that was put or added is there, and all that was sent has been read."""

    def close(self) -> None:
        """Let go of pinned memory. Nothing may be under way."""


class QueuedLane(Lane):
    """Copies that come later. What is to be added lands in a buffer first; there are few, so the oldest is waited for now and then."""

    def __init__(self, largest_bytes: int) -> None:
        self._landings = Arena(_NUM_LANDINGS * Arena.rounded(largest_bytes), self)
        self._free = [self._landings.bytes(largest_bytes) for _ in range(_NUM_LANDINGS)]
        self._under_way: deque[tuple[Wait, Tensor, Tensor | None, Tensor | None]] = deque()

    def _copy(self, target: Tensor, source: Tensor) -> Wait:
        """Begin to copy; returned is what waits for its end."""
        raise NotImplementedError

    def put(self, target: Tensor, source: Tensor) -> None:
        self._under_way.append((self._copy(target, source), target, None, None))

    def add(self, target: Tensor, source: Tensor) -> None:
        while not self._free:
            self._settle()
        landing = self._free.pop()
        part = landing[: source.numel() * source.element_size()].view(source.dtype).view(source.shape)
        self._under_way.append((self._copy(part, source), target, part, landing))

    def wait(self) -> None:
        while self._under_way:
            self._settle()

    def close(self) -> None:
        self._landings.close()

    def _settle(self) -> None:
        """The oldest copy is there."""
        wait, target, part, landing = self._under_way.popleft()
        wait()
        if part is not None:
            target.add_(part)
        if landing is not None:
            self._free.append(landing)


class CudaLane(QueuedLane):
    """A stream of its own, beside the one that computes."""

    pins = True

    def __init__(self, device: torch.device, largest_bytes: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sent: torch.cuda.Event | None = None
        super().__init__(largest_bytes)

    def _copy(self, target: Tensor, source: Tensor) -> Wait:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        source.record_stream(self._stream)  # its memory is not used again before it has been read
        wait: Wait = done.synchronize
        return wait

    def send(self, target: Tensor, source: Tensor) -> None:
        # On the stream that computes: the next forward pass comes after it by itself.
        target.copy_(source, non_blocking=True)
        self._sent = torch.cuda.current_stream(self._device).record_event()

    def wait(self) -> None:
        super().wait()
        if self._sent is not None:
            self._sent.synchronize()


class Arena:
    """One piece of host memory, pinned where the lane wants that and the system allows it, handed out in parts.

    Pinned as it is: torch's own pinned memory is rounded up to a power of two, half of it for nothing.
    """

    def __init__(self, size_bytes: int, lane: Lane) -> None:
        self._memory = torch.empty(max(1, size_bytes), dtype=torch.uint8)
        self._next = 0
        self.is_pinned = lane.pins and pin(self._memory)

    @staticmethod
    def rounded(size_bytes: int) -> int:
        return -(-size_bytes // _ALIGNED) * _ALIGNED

    @staticmethod
    def taken(tensor: Tensor) -> int:
        """What a part for such a tensor takes."""
        return Arena.rounded(tensor.numel() * tensor.element_size())

    def bytes(self, size_bytes: int) -> Tensor:
        """The next part."""
        part = self._memory[self._next : self._next + size_bytes]
        self._next += self.rounded(size_bytes)
        return part

    def like(self, tensor: Tensor) -> Tensor:
        """The next part, in the shape and type of `tensor`."""
        return self.bytes(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)

    def close(self) -> None:
        """Before the memory is given back: the driver must not hold a part of it."""
        if self.is_pinned:
            self.is_pinned = False
            unpin(self._memory)


_registered_bytes = 0


def pinned_bytes() -> int:
    """The RAM that this process has pinned for the GPU: what we have pinned in place, and what torch's own allocator holds."""
    stats = getattr(torch.cuda, "host_memory_stats", None) if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return _registered_bytes + int(stats().get("allocated_bytes.current", 0) if stats is not None else 0)


def pin(memory: Tensor) -> bool:
    """False: the system allows no more pinned memory, or it is a file's. Copies then wait for each other, and nothing else changes."""
    size = memory.numel() * memory.element_size()
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))  # type: ignore[no-untyped-call]
    if code == 0:
        global _registered_bytes
        _registered_bytes += size
        return True
    try:  # the driver tells of its refusal once more, to the next who asks
        torch.zeros(1, device="cuda")
    except RuntimeError:
        pass
    return False


def unpin(memory: Tensor) -> None:
    """Before pinned memory is given back; nothing may be copied from or to it any more."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
    global _registered_bytes
    _registered_bytes -= memory.numel() * memory.element_size()
