"""Notices that a GPU's driver has begun to use the computer's RAM in place of its own memory, and says which setting prevents it.

Then nothing fails and every step crawls. A slow step alone proves nothing: the name is given only with evidence, and a hot GPU,
another program on it, or a processor that others use is told apart from it. Must not know torch, and changes nothing.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from trainerd.contract import wire
from trainerd.machine import gpu, shared_vram

SPILLED, THROTTLED, BUSY_GPU, STARVED, UNKNOWN = "spilled", "throttled", "busy gpu", "starved", "unknown"
_WINDOW = 5
_SLOW = 2.0
_LEARN_STEPS = 20
_FIRST_STEPS = 5  # kernels are loaded, algorithms are tried
_LEAST_SHARED_BYTES = 64 << 20
_OTHERS_PERCENT = 20.0
_OWN_CPU_SHARE = 0.3  # of one processor: a training thread that got less was not let work
_LOOK_SECONDS = 5.0
_AGAIN_SECONDS = 600.0


@dataclass(frozen=True)
class Evidence:
    """What can be read when steps are slow; None: nobody tells."""

    shared_bytes: int | None = None
    """Our GPU memory that lies in the computer's RAM."""
    throttled: bool | None = None
    others_gpu_percent: float | None = None


class SpillWatch:
    """`look()` is asked only when steps have become slow. One warning for each cause, at most every ten minutes."""

    def __init__(self, look: Callable[[], Evidence], send: Callable[..., None], python: str) -> None:
        self._look = look
        self._send = send
        self._python = python
        self._edge: tuple[float, float] | None = None
        self._skipped = 0
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._shares: deque[float] = deque(maxlen=_WINDOW)
        self._learned: deque[float] = deque(maxlen=_LEARN_STEPS)
        self._shared_before: int | None = None
        self._told_at: dict[str, float] = {}
        self._next_look = 0.0

    def pause(self) -> None:
        """What follows was no step: an evaluation, a save, a cleaning."""
        self._edge = None

    def step(self, now: float, weight: int, cpu_seconds: float | None = None) -> str | None:
        """After every step, with its number of tokens or samples: longer batches take longer. The cause of slow ones, once.
        `cpu_seconds`: what this process has used of processors so far."""
        cpu_seconds = time.process_time() if cpu_seconds is None else cpu_seconds
        edge, self._edge = self._edge, (now, cpu_seconds)
        if edge is None or weight <= 0 or now <= edge[0]:
            return None
        if self._skipped < _FIRST_STEPS:
            self._skipped += 1
            return None
        self._recent.append((now - edge[0]) / weight)
        self._shares.append((cpu_seconds - edge[1]) / (now - edge[0]))
        if len(self._learned) < _LEARN_STEPS:
            self._learned.append(self._recent[-1])
            if len(self._learned) == _LEARN_STEPS:
                self._shared_before = self._look().shared_bytes
            return None
        if len(self._recent) < _WINDOW:
            return None
        ratio = statistics.median(self._recent) / statistics.median(self._learned)
        return self._slow(now, ratio) if ratio > _SLOW else None

    def _slow(self, now: float, ratio: float) -> str | None:
        if now < self._next_look:
            return None  # not in every step: reading the counters costs milliseconds
        self._next_look = now + _LOOK_SECONDS
        found = self._look()
        cause = self._cause(found)
        if now - self._told_at.get(cause, float("-inf")) < _AGAIN_SECONDS:
            return None
        self._told_at[cause] = now
        self._send(wire.NOTE, kind="slow", cause=cause, times=round(ratio, 1), shared_bytes=found.shared_bytes)
        if cause == SPILLED:
            self._send(wire.WARNING, text=self._words(ratio, found.shared_bytes or 0))
        return cause

    def _cause(self, found: Evidence) -> str:
        before = self._shared_before or 0
        if found.shared_bytes is not None and found.shared_bytes - before >= _LEAST_SHARED_BYTES:
            return SPILLED
        if found.throttled:
            return THROTTLED
        if found.others_gpu_percent is not None and found.others_gpu_percent >= _OTHERS_PERCENT:
            return BUSY_GPU
        if statistics.median(self._shares) < _OWN_CPU_SHARE:
            return STARVED
        return UNKNOWN

    def _words(self, ratio: float, shared_bytes: int) -> str:
        return (
            f"Steps take {ratio:.1f} times as long as before: the NVIDIA driver keeps {shared_bytes / 1e9:.1f} GB of the training in the "
            "computer's RAM. To have it stop: NVIDIA Control Panel > Manage 3D settings > Program settings > add "
            f"{self._python} > CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback; then pause and resume. "
            "Closing other programs that use the GPU helps, too, and so does a lower memory.vram_limit."
        )


def look(index: int) -> Evidence:
    """What this machine tells about its GPU with this number, and this process on it."""
    pid = os.getpid()
    load = gpu.load(index, pid)
    return Evidence(shared_vram.shared_bytes(pid), load.throttled, load.others_percent)


def python_program() -> str:
    """The program the driver's setting is for: under Windows a virtual environment's python.exe only starts the real one."""
    try:
        return str(psutil.Process().exe())
    except psutil.Error:
        return sys.executable
