"""How much RAM is used, by the whole machine and by one tree of processes. Must not judge it against a limit of ours.

The machine is what we may have of it: in a container, or under a service's MemoryMax, that is less than there is.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

if sys.platform.startswith("linux"):
    from trainerd.machine import _cgroups_linux as _cgroups
else:
    _cgroups = None

_VMSTAT = Path("/proc/vmstat")
_OWN_STATUS = Path("/proc/self/status")
_PRESSING = re.compile(r"^(Pss_Anon|Pss_Shmem):\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class RamFacts:
    """`used` is what programs cannot get any more: total minus available, so that caches do not count."""

    used_bytes: int
    total_bytes: int
    machine_bytes: int | None = None
    """What the machine has, where a container or a service may hold less of it; None: nothing limits it."""

    @property
    def limited(self) -> str:
        """That it is limited, in words; "" when it is not."""
        if self.machine_bytes is None:
            return ""
        return f"limited by a container to {self.total_bytes / 1e9:.1f} GB of the machine's {self.machine_bytes / 1e9:.1f} GB"


def ram(pid: int | None = None) -> RamFacts:
    """The RAM now that this process may have, or the process `pid`: the machine's, or its container's where that is less."""
    memory = psutil.virtual_memory()
    machine_bytes = total_bytes = int(memory.total)
    available_bytes = int(memory.available)
    for group in _cgroups.limits(pid) if _cgroups is not None else ():
        if group.limit_bytes < machine_bytes:
            total_bytes = min(total_bytes, group.limit_bytes)
            available_bytes = min(available_bytes, max(0, group.limit_bytes - group.used_bytes))
    available_bytes = min(available_bytes, total_bytes)
    return RamFacts(total_bytes - available_bytes, total_bytes, machine_bytes if total_bytes < machine_bytes else None)


@dataclass(frozen=True)
class Kills:
    """How many processes the system's out-of-memory killer has ended: on the machine, and in our own group. None: unknown."""

    machine: int | None = None
    group: int | None = None

    def since(self, before: Kills) -> bool:
        """Whether it was at work in between. The group's count knows about us; the machine's is also that of others."""
        if self.group is not None and before.group is not None:
            return self.group > before.group
        return self.machine is not None and before.machine is not None and self.machine > before.machine


def kills(*, in_our_group: bool = True, vmstat: Path = _VMSTAT) -> Kills:
    """The counts now; `in_our_group`: those who are watched are in the same group as we."""
    return Kills(_counted(vmstat), _cgroups.kills() if _cgroups is not None and in_our_group else None)


def _counted(vmstat: Path) -> int | None:
    try:
        match = re.search(r"^oom_kill (\d+)$", vmstat.read_text("ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) if match else None


def swap() -> RamFacts:
    """What lies in swap, and how large it is; both 0 where there is none."""
    try:
        memory = psutil.swap_memory()
    except (OSError, RuntimeError):
        return RamFacts(0, 0)  # a container without /proc/vmstat, Windows with its counters switched off
    return RamFacts(int(memory.used), int(memory.total))


_code_bytes: int | None = None
"""Pages of files that this process held when it was first asked: its program and its libraries."""


def own_bytes() -> int:
    """The RAM this process holds, what it shares with others included. Pages of files it has mapped since this was first asked are left
    out: the system drops them for whoever needs room, and they are no used RAM of the machine's either."""
    global _code_bytes
    memory = psutil.Process().memory_info()
    of_files = _file_bytes(memory)
    if _code_bytes is None:
        _code_bytes = of_files
    return int(memory.rss) - max(0, of_files - _code_bytes)


def _file_bytes(memory: Any) -> int:
    """Those of its pages that are files'; 0 where the system does not tell."""
    if sys.platform == "win32":
        return max(0, int(memory.rss) - int(memory.vms))  # vms is the commit charge there
    try:
        found = re.search(r"^RssFile:\s+(\d+) kB", _OWN_STATUS.read_text("ascii", "replace"), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found is not None else 0


def process_tree_bytes(pid: int) -> int | None:
    """RAM that a process and all it started keep from others: what they share is counted once, and pages of files, which the system
    drops for whoever needs room, are not (Linux: the proportional share of anonymous and shared memory; Windows: private bytes). None: it
    is gone.

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
        pressing = _pressing(Path("/proc", str(process.pid), "smaps_rollup"))
        if pressing is not None:
            return pressing
        full = process.memory_full_info()
        return int(getattr(full, "pss", 0) or full.uss)
    except psutil.AccessDenied:
        return _resident(process)
    except psutil.Error:
        return None


def _pressing(rollup: Path) -> int | None:
    """Its own pages and those in shared memory; None where the system does not tell (macOS, Linux before 5.4, another user's process)."""
    try:
        found = dict(_PRESSING.findall(rollup.read_text("ascii", "replace")))
    except OSError:
        return None
    return sum(map(int, found.values())) * 1024 if len(found) == 2 else None


def _resident(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return None
