"""What an out-of-memory error looks like, and cleaning up before one comes. Must not decide how the step is retried.

Cleaning costs milliseconds and frees nothing when nothing is loose: so it backs off then.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from trainerd.config.model import MemoryConfig
from trainerd.machine import memory as machine_memory
from trainerd.memory.limits import resolve_limit

# How allocators say no when they do not raise OutOfMemoryError: torch's CPU allocator (Linux, Windows), cuBLAS, cuDNN, the driver.
_ALLOCATION_FAILED = (
    "out of memory",
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_LOOK_SECONDS = 1.0
_CAP_SECONDS = 60.0
_LONGEST_PAUSE_SECONDS = 300.0
_THRESHOLD = 0.95  # of the limit: cleaning at the limit itself would be too late
_WORTH_BYTES = 32 << 20
_MARGIN_BYTES = 64 << 20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _ALLOCATION_FAILED)


def free() -> None:
    """Give back what nothing refers to: Python's cycles, CUDA's cached blocks, the C allocator's free pages."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            pass  # not glibc


class MemoryWatch:
    """Looks once a second; cleans above the threshold; holds CUDA's allocator to what the limit leaves it."""

    def __init__(self, config: MemoryConfig, device: torch.device, send: Callable[..., None]) -> None:
        self._send = send
        self._device = device
        self._ram_limit = resolve_limit(config.ram_limit, machine_memory.ram().total_bytes)
        self._vram_limit: int | None = None
        if device.type == "cuda":
            self._vram_limit = resolve_limit(config.vram_limit, torch.cuda.mem_get_info(device)[1])
        self._next_look = self._next_cap = self._next_cleaning = 0.0  # the first look, before the first step, caps at once
        self._pause_seconds = _LOOK_SECONDS
        self.cleanups = 0
        self.oom_recoveries = 0

    def look(self, now: float) -> None:
        """Called in every step; does something once a second."""
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        if self._vram_limit is not None and now >= self._next_cap:
            self._next_cap = now + _CAP_SECONDS
            self._cap_allocator()
        if now >= self._next_cleaning and self._over_threshold():
            self._clean(now)

    def tell(self) -> None:
        """Send the numbers of the status."""
        facts: dict[str, Any] = {"cleanups": self.cleanups, "oom_recoveries": self.oom_recoveries}
        if self._device.type == "cuda":
            facts["vram_allocated_bytes"] = torch.cuda.memory_allocated(self._device)
            facts["vram_reserved_bytes"] = torch.cuda.memory_reserved(self._device)
        self._send("memory", **facts)

    def _over_threshold(self) -> bool:
        if machine_memory.ram().used_bytes > self._ram_limit * _THRESHOLD:
            return True
        if self._vram_limit is None:
            return False
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return total_bytes - free_bytes > self._vram_limit * _THRESHOLD

    def _clean(self, now: float) -> None:
        """Clean once, see what it brought, and wait twice as long when it brought nothing."""
        before = self._held_bytes()
        began = time.perf_counter()
        free()
        milliseconds = round((time.perf_counter() - began) * 1e3, 1)
        freed = before - self._held_bytes()
        self.cleanups += 1
        worth = freed >= _WORTH_BYTES
        self._pause_seconds = _LOOK_SECONDS if worth else min(self._pause_seconds * 2, _LONGEST_PAUSE_SECONDS)
        self._next_cleaning = now + self._pause_seconds
        self._send("note", kind="cleanup", freed_bytes=max(0, freed), milliseconds=milliseconds, next_in_seconds=self._pause_seconds)
        self.tell()

    def _held_bytes(self) -> int:
        """What a cleaning can lower: the RAM in use and the blocks CUDA's allocator keeps."""
        reserved = torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else 0
        return machine_memory.ram().used_bytes + reserved

    def _cap_allocator(self) -> None:
        """Our allocator may have the limit minus what everything else on the device uses now, our context included."""
        assert self._vram_limit is not None
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        others = total_bytes - free_bytes - torch.cuda.memory_reserved(self._device)
        cap = max(0, self._vram_limit - others - _MARGIN_BYTES)
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total_bytes), self._device)
