"""Whether a process wants to run and is not let: the processor is taken by others, or its memory is on the disk.

Must not judge what follows. Where the system tells it of every thread (Linux) that is used; elsewhere it is concluded from a
busy processor. A process that waits for a lock, a pipe or a disk is not starved, and neither is one that spins.
"""

from __future__ import annotations

import sys
import time

import psutil

if sys.platform.startswith("linux"):
    from trainerd.machine._starvation_linux import starved_seconds
else:
    starved_seconds = None

_BUSY_SHARE = 0.9


class Starvation:
    """Looks at one process and all it has started."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._looked_at: float | None = None
        self._cpu = (0.0, 0.0, 0.0)
        self._memory: dict[int, tuple[float, float, int]] = {}

    def share(self) -> float:
        """From 0 to 1: in how much of the time since the last look it was starved. The first look says 0. Never raises."""
        now = time.monotonic()
        before, self._looked_at = self._looked_at, now
        elapsed_seconds = 0.0 if before is None else now - before
        try:
            if starved_seconds is not None:
                waited_seconds, self._memory = starved_seconds(_tree(self._pid), self._memory, elapsed_seconds)
                share = waited_seconds / elapsed_seconds if elapsed_seconds > 0 else 0.0
            else:
                share = self._by_load(elapsed_seconds)
        except (OSError, ValueError, psutil.Error):
            return 0.0
        return min(max(share, 0.0), 1.0) if before is not None else 0.0

    def _by_load(self, elapsed_seconds: float) -> float:
        """While all processors are busy, what it did not get of one counts as starved."""
        times = psutil.cpu_times()
        all_seconds = float(sum(times))
        own_seconds = sum(_cpu_seconds(pid) for pid in _tree(self._pid))
        now = (all_seconds, all_seconds - float(times.idle), own_seconds)
        whole, busy, own = (later - earlier for later, earlier in zip(now, self._cpu, strict=True))
        self._cpu = now
        if whole <= 0 or elapsed_seconds <= 0 or busy / whole < _BUSY_SHARE:
            return 0.0
        return 1.0 - own / elapsed_seconds


def _tree(pid: int) -> list[int]:
    root = psutil.Process(pid)
    return [pid, *(child.pid for child in root.children(recursive=True))]


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
