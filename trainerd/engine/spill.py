"""Notices that a GPU's driver has begun to use the computer's RAM in place of its own memory, and says which setting prevents it.

Then nothing fails and every step crawls. A slow step alone proves nothing: the name is given only with evidence, and a hot GPU,
another program on it, or a processor that others use is told apart from it. While nothing is known of how long a step takes, evidence
alone is enough: a training that spills from its first step on has never been faster. Must not know torch, and changes nothing.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from trainerd.contract import wire
from trainerd.machine import gpu, shared_vram
from trainerd.machine.asking import Asking

SPILLED, THROTTLED, BUSY_GPU, STARVED, UNKNOWN = "spilled", "throttled", "busy gpu", "starved", "unknown"
_WINDOW = 5
_SLOW = 2.0
_LEARN_STEPS = 20
_FIRST_STEPS = 5  # kernels are loaded, algorithms are tried
_LEAST_SHARED_BYTES = 64 << 20
_LEAST_ALONE_BYTES = 128 << 20  # where no slow step speaks for it, too: a driver keeps a little there for itself
_LEARNING_LOOKS = 4  # steps from one look to the next while learning
_SLOW_LOOKS = 2  # and while steps are slow: the third of them shows, so it is named by the fifth
_OTHERS_PERCENT = 20.0
_OWN_CPU_SHARE = 0.3  # of one processor: a training thread that got less was not let work
_LOOK_SECONDS = 5.0  # at what is not the driver's: reading it costs milliseconds
_AGAIN_SECONDS = 600.0
_ANSWER_SECONDS = 1.0


@dataclass(frozen=True)
class Evidence:
    """What else can be read when steps are slow; None: nobody tells."""

    throttled: bool | None = None
    others_gpu_percent: float | None = None


def _speed_of(device: str, plan: Mapping[str, Any]) -> list[Any]:
    return [device, *(plan.get(name) for name in ("micro_batch", "precision", "offload", "activation_checkpointing", "compile"))]


class SpillWatch:
    """`shared()` gives the bytes of ours that lie in RAM, and that we did not put there ourselves; what there is of them now, before the
    model is on the device, is not its. It is asked while a run's speed is not known, and when steps have become slow; `look()`
    only then. One warning for each cause, at most every ten minutes."""

    def __init__(self, shared: Callable[[], int | None], look: Callable[[], Evidence], send: Callable[..., None], python: str) -> None:
        self._shared = shared
        self._shared_before = shared() or 0
        self._look = look
        self._send = send
        self._python = python
        self._edge: tuple[float, float] | None = None
        self._skipped = self._number = self._looked = 0
        self._known: float | None = None
        self._has_spilled = False
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._shares: deque[float] = deque(maxlen=_WINDOW)
        self._learned: deque[float] = deque(maxlen=_LEARN_STEPS)
        self._told_at: dict[str, float] = {}
        self._next_look = 0.0

    def learned(self) -> float | None:
        """Seconds for a token (or sample), to be kept with the run; None: not known, or learned while it crawled."""
        if self._has_spilled or len(self._learned) < _LEARN_STEPS:
            return self._known
        learned = statistics.median(self._learned)
        return learned if self._known is None else min(learned, self._known)

    def know(self, seconds: float) -> None:
        """What an earlier trainer of this run has learned, with the same plan on the same device."""
        self._known = seconds

    def kept(self, device: str, plan: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is learned, as a run keeps it in its checkpoints."""
        seconds = self.learned()
        return None if seconds is None else {"seconds": seconds, "of": _speed_of(device, plan)}

    def recall(self, kept: Mapping[str, Any] | None, device: str, plan: Mapping[str, Any]) -> None:
        """How long a step took before, if this training has the same plan on the same device: a spill shows by it from the beginning."""
        if kept is not None and kept.get("of") == _speed_of(device, plan):
            self.know(float(kept["seconds"]))

    def pause(self) -> None:
        """What follows was no step: an evaluation, a save, a cleaning."""
        self._edge = None

    def step(self, now: float, weight: int, cpu_seconds: float | None = None) -> str | None:
        """After every step, with its number of tokens or samples: longer batches take longer. The cause of slow ones, once.
        `cpu_seconds`: what this process has used of processors so far."""
        self._number += 1
        cpu_seconds = time.process_time() if cpu_seconds is None else cpu_seconds
        edge, self._edge = self._edge, (now, cpu_seconds)
        if len(self._learned) < _LEARN_STEPS and (alone := self._spills_alone(now)) is not None:
            return alone
        if edge is None or weight <= 0 or now <= edge[0]:
            return None
        if self._skipped < _FIRST_STEPS:
            self._skipped += 1
            return None
        self._recent.append((now - edge[0]) / weight)
        self._shares.append((cpu_seconds - edge[1]) / (now - edge[0]))
        if len(self._learned) < _LEARN_STEPS:
            self._learned.append(self._recent[-1])
        usual = self.learned() or (statistics.median(self._learned) if len(self._learned) == _LEARN_STEPS else None)
        if usual is None or len(self._recent) < _WINDOW:
            return None
        ratio = statistics.median(self._recent) / usual
        return self._slow(now, ratio) if ratio > _SLOW else None

    def _spills_alone(self, now: float) -> str | None:
        """While it is not known how long a step takes: whether memory of ours lies in RAM."""
        if self._looked and self._number - self._looked < _LEARNING_LOOKS:
            return None
        self._looked = self._number
        spilled_bytes = self._spilled_bytes()
        if spilled_bytes < _LEAST_ALONE_BYTES:
            return None
        self._has_spilled = True
        return self._tell(now, SPILLED, None, spilled_bytes)

    def _slow(self, now: float, ratio: float) -> str | None:
        if self._number - self._looked < _SLOW_LOOKS:
            return None
        self._looked = self._number
        spilled_bytes = self._spilled_bytes()
        if spilled_bytes >= _LEAST_SHARED_BYTES:
            self._has_spilled |= len(self._learned) < _LEARN_STEPS
            return self._tell(now, SPILLED, ratio, spilled_bytes)
        if now < self._next_look:
            return None
        self._next_look = now + _LOOK_SECONDS
        return self._tell(now, self._cause(self._look()), ratio, spilled_bytes)

    def _spilled_bytes(self) -> int:
        return max(0, (self._shared() or 0) - self._shared_before)

    def _tell(self, now: float, cause: str, ratio: float | None, spilled_bytes: int) -> str | None:
        if now - self._told_at.get(cause, float("-inf")) < _AGAIN_SECONDS:
            return None
        self._told_at[cause] = now
        times = None if ratio is None else round(ratio, 1)
        self._send(wire.NOTE, kind="slow", cause=cause, times=times, shared_bytes=spilled_bytes)
        if cause == SPILLED:
            self._send(wire.WARNING, text=self._words(ratio, spilled_bytes))
        return cause

    def _cause(self, found: Evidence) -> str:
        if found.throttled:
            return THROTTLED
        if found.others_gpu_percent is not None and found.others_gpu_percent >= _OTHERS_PERCENT:
            return BUSY_GPU
        if statistics.median(self._shares) < _OWN_CPU_SHARE:
            return STARVED
        return UNKNOWN

    def _words(self, ratio: float | None, shared_bytes: int) -> str:
        slow = "Steps are much slower than they could be" if ratio is None else f"Steps take {ratio:.1f} times as long as before"
        return (
            f"{slow}: the NVIDIA driver keeps {shared_bytes / 1e9:.1f} GB of the training in the computer's RAM. "
            "To have it stop: NVIDIA Control Panel > Manage 3D settings > Program settings > add "
            f"{self._python} > CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback; then pause and resume. "
            "Closing other programs that use the GPU helps, too, and so does a lower memory.vram_limit."
        )


class Look:
    """What this machine tells about its GPU with this number, and this process on it; nothing while its driver does not answer."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._driver = Asking(gpu.load)

    def __call__(self) -> Evidence:
        load = self._driver.ask(self._index, os.getpid(), seconds=_ANSWER_SECONDS) or gpu.GpuLoad()
        return Evidence(load.throttled, load.others_percent)


def shared(pinned_bytes: int) -> int | None:
    """Our GPU memory that lies in the computer's RAM, by this system's counter, without the RAM that we have pinned for the GPU ourselves:
    to the counter that is the same."""
    found = shared_vram.shared_bytes(os.getpid())
    return None if found is None else max(0, found - pinned_bytes)


def python_program() -> str:
    """The program the driver's setting is for: under Windows a virtual environment's python.exe only starts the real one."""
    try:
        return str(psutil.Process().exe())
    except psutil.Error:
        return sys.executable
