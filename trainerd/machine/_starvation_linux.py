"""Starvation on Linux: what the scheduler tells of every thread. Must not know what the process does.

`schedstat` counts the time a thread stood in the queue, but only once it has run again: for one that has not run at all, its
state R says so. A process that works through a swap storm shows by major faults that it goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_STORM_FAULTS_PER_SECOND = 10.0

Seen = tuple[float, float, int]  # CPU seconds, seconds in the queue, major faults
_NEVER: Seen = (0.0, 0.0, 0)


def starved_seconds(pids: Iterable[int], before: Mapping[int, Seen], elapsed_seconds: float) -> tuple[float, dict[int, Seen]]:
    """(the longest wait of any thread of these processes within the time, what to give as `before` next time)."""
    longest_seconds, faults = 0.0, 0
    seen: dict[int, Seen] = {}
    for pid in pids:
        for folder in _threads(pid):
            found = _look(folder)
            if found is None:
                continue
            thread, state, now = int(folder.name), found[0], found[1]
            earlier = before.get(thread)
            seen[thread] = now
            if earlier is None:
                continue
            ran_seconds, queued_seconds, faulted = (later - first for later, first in zip(now, earlier, strict=True))
            if state == "R":
                queued_seconds = max(queued_seconds, elapsed_seconds - ran_seconds)
            longest_seconds = max(longest_seconds, queued_seconds)
            faults += int(faulted)
    if elapsed_seconds > 0 and faults / elapsed_seconds >= _STORM_FAULTS_PER_SECOND:
        return elapsed_seconds, seen
    return min(longest_seconds, elapsed_seconds), seen


def _threads(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []  # it has ended


def _look(folder: Path) -> tuple[str, Seen] | None:
    """State and counters of one thread; None when it has ended."""
    try:
        fields = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    ran_seconds, queued_seconds = (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND, 0.0
    try:
        ran, queued, _ = (folder / "schedstat").read_text("ascii").split()
        ran_seconds, queued_seconds = int(ran) / 1e9, int(queued) / 1e9
    except (OSError, ValueError):
        pass  # a kernel built without it: the state alone has to do
    return fields[0], (ran_seconds, queued_seconds, int(fields[9]))
