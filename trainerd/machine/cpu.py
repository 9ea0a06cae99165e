"""What the processor is and can. Must not choose threads or precision: it only tells."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import psutil

_CPUINFO = Path("/proc/cpuinfo")
_NODES = Path("/sys/devices/system/node")
# Matrix and vector instructions that decide which precision is fast. Each name is the kernel's.
_INTERESTING = frozenset({"amx_bf16", "amx_tile", "amx_int8", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "fma", "f16c", "bf16"})


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once, at least 1."""
    allowed = logical_cores()
    physical = psutil.cpu_count(logical=False) or allowed
    return max(1, min(physical, allowed))


def logical_cores() -> int:
    """Logical processors this process may use, at least 1: fewer than the machine has under taskset or in a container."""
    try:
        return max(1, len(psutil.Process().cpu_affinity()))
    except (psutil.Error, OSError, AttributeError):
        return max(1, psutil.cpu_count() or 1)


def features(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Instruction sets that matter for precision, by the kernel's names; empty where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return frozenset()
    return frozenset((_told(cpuinfo, "flags", "Features") or "").split()) & _INTERESTING


def model(cpuinfo: Path = _CPUINFO) -> str | None:
    """The processor's name, None where the system does not tell: two with the same instructions may still round differently."""
    if sys.platform == "win32":
        return os.environ.get("PROCESSOR_IDENTIFIER") or None
    return _told(cpuinfo, "model name", "Model") or None


def model_name(cpuinfo: Path = _CPUINFO) -> str | None:
    """What its maker calls it, for a person; None where the system does not tell."""
    return _name_in_registry() if sys.platform == "win32" else model(cpuinfo)


def numa_nodes(nodes: Path = _NODES) -> int | None:
    """Groups of cores with RAM of their own: 1 on a laptop. None: the system does not tell."""
    if sys.platform == "win32":
        import ctypes

        highest = ctypes.c_ulong()
        return int(highest.value) + 1 if ctypes.windll.kernel32.GetNumaHighestNodeNumber(ctypes.byref(highest)) else None
    try:
        return sum(bool(re.fullmatch(r"node\d+", path.name)) for path in nodes.iterdir()) or None
    except OSError:
        return None


def _told(cpuinfo: Path, *names: str) -> str | None:
    """The first value the kernel gives under one of these names."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in names:
                    return value.strip()
    except OSError:
        pass
    return None


def _name_in_registry() -> str | None:
    if sys.platform != "win32":
        return None
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip() or None
    except OSError:
        return None
