"""How much RAM is used, by the whole machine and by one tree of processes. Must not judge it against a limit."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class RamFacts:
    """`used` is what programs cannot get any more: total minus available, so that caches do not count."""

    used_bytes: int
    total_bytes: int


def ram() -> RamFacts:
    """The machine's RAM now."""
    memory = psutil.virtual_memory()
    return RamFacts(int(memory.total - memory.available), int(memory.total))


def swap() -> RamFacts:
    """What lies in swap, and how large it is; both 0 where there is none."""
    try:
        memory = psutil.swap_memory()
    except (OSError, RuntimeError):
        return RamFacts(0, 0)  # a container without /proc/vmstat, Windows with its counters switched off
    return RamFacts(int(memory.used), int(memory.total))


def process_tree_bytes(pid: int) -> int | None:
    """RAM of a process and all it started, shared pages counted once (PSS; private bytes on Windows). None: it is gone.

    Costs milliseconds per process: not for every second.
    """
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return None
    return sum(filter(None, (_bytes(process) for process in tree))) or None


def _bytes(process: psutil.Process) -> int | None:
    try:
        if sys.platform == "win32":
            # vms is the commit charge there: the private bytes. The full information walks every page, and can be refused.
            return int(process.memory_info().vms)
        full = process.memory_full_info()
        return int(getattr(full, "pss", 0) or full.uss)
    except psutil.AccessDenied:
        return _resident(process)
    except psutil.Error:
        return None


def _resident(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return None
