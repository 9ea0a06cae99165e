"""The most of a GPU that its driver saw this process hold, for the receipt. Must not limit, free or foretell anything.

The driver is asked when our allocator holds more than ever, and once at the end: what it keeps for itself only grows; from a thread of
its own, for one that is stuck never answers, and a step must not wait for it. Where it does not tell what a process holds (Windows, a
container that numbers processes anew) it is what all hold, less what they held before us.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainerd.machine import gpu
from trainerd.machine.asking import Asking, within

_FIRST_SECONDS = 5.0
_LAST_SECONDS = 2.0


def before_context(nvml: Any = None) -> dict[int, int]:
    """What others hold of each GPU; nothing once this process has a context, for then nobody can tell us from them."""
    if not torch.cuda.is_available() or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    found = within(_FIRST_SECONDS, lambda: gpu.devices(nvml))
    return {one.index: one.used_bytes for one in found or () if one.used_bytes is not None}


class DriverPeak:
    """Of the GPU with torch's number; `others` as before_context() told, `reserved` what our allocator holds. None: a CPU."""

    def __init__(self, index: int | None, others: Mapping[int, int], reserved: Callable[[], int] = lambda: 0, nvml: Any = None) -> None:
        self._index = index
        self._others = others.get(index) if index is not None else None
        self._reserved = reserved
        self._nvml = nvml
        self._highest = -1
        self._most: int | None = None
        self.asking = Asking(self._ask)

    def look(self, reserved_bytes: int) -> None:
        """Ask, when our allocator holds more than at any look before. Returns at once."""
        if self._index is not None and reserved_bytes > self._highest and self.asking.want(reserved_bytes):
            self._highest = reserved_bytes

    def most(self) -> int | None:
        """The most that was seen, now included unless nobody answers any more; None where nobody can tell."""
        if self._index is not None:
            self.asking.settle(_LAST_SECONDS)
            self.asking.ask(self._reserved(), seconds=_LAST_SECONDS)
        return self._most

    def _ask(self, reserved_bytes: int) -> None:
        """In the driver's thread. What is less than our allocator holds was told of somebody else's process, or while others gave back
        what they held."""
        assert self._index is not None
        for told in (self._own, self._beside_others):
            held = told(self._index)
            if held is not None and held > reserved_bytes:
                self._most = max(held, self._most or 0)
                return

    def _own(self, index: int) -> int | None:
        return gpu.held_by(os.getpid(), index, self._nvml)

    def _beside_others(self, index: int) -> int | None:
        """Both by the driver's own count: CUDA's leaves out what the driver keeps of the device for itself."""
        if self._others is None:
            return None
        used = next((one.used_bytes for one in gpu.devices(self._nvml) if one.index == index), None)
        return None if used is None else used - self._others


def of(device: torch.device, others: Mapping[int, int]) -> DriverPeak:
    """For a training on this device."""
    if device.type != "cuda":
        return NOBODY
    return DriverPeak(device.index or 0, others, lambda: torch.cuda.memory_reserved(device))


NOBODY = DriverPeak(None, {})
