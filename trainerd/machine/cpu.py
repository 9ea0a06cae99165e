"""What the processor is and can. Must not choose threads or precision: it only tells."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Collection
from pathlib import Path

import psutil

_CPUINFO = Path("/proc/cpuinfo")
_NODES = Path("/sys/devices/system/node")
# Instructions for products in a precision, by the kernel's names and torch's: those of Intel and AMD have the same in both.
_COMPUTING = {
    "bf16": frozenset({"amx_bf16", "avx512_bf16", "bf16"}),
    "fp16": frozenset({"amx_fp16", "avx512_fp16", "asimdhp", "fp16_arith"}),
}
_SLOW = {
    "bf16": "This processor has no bf16 arithmetic: bf16 is slower than fp32 here; auto would choose fp32.",
    "fp16": "This processor has no fp16 arithmetic: fp16 is many times slower than fp32 here; auto would be better.",
}
# Matrix and vector instructions that decide which precision is fast. Each name is the kernel's.
_INTERESTING = frozenset({"amx_tile", "amx_int8", "avx2", "avx512f", "avx512_vnni", "fma", "f16c"}).union(*_COMPUTING.values())
_NAMED_SINCE = {"bf16": (5, 3), "fp16": (5, 11)}
"""The Linux that first names them: of an older one that does not, nothing follows."""
_WIDE_REGISTERS = 0b1110_0000 | 1 << 17 | 1 << 18
"""Those of AVX-512, and AMX's tiles (XSTATE_MASK_AVX512, XSTATE_MASK_AMX_TILE_CONFIG, ..._DATA of winnt.h)."""


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


def computes(precision: str, cpuinfo: Path = _CPUINFO) -> bool | None:
    """Whether it has instructions for products in "bf16" or "fp16"; None where the system does not tell."""
    if sys.platform == "win32":
        return False if _without_wide_registers() else None
    told = (_told(cpuinfo, "flags", "Features") or "").split()
    if _COMPUTING[precision].intersection(told):
        return True
    return False if told and _names(precision, platform.release()) else None


def _names(precision: str, release: str) -> bool:
    """Whether a Linux of this release has names for such instructions."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= _NAMED_SINCE[precision]


def slow(precision: str) -> str | None:
    """That a training in this precision is slow here, in words; None where it is not, or nobody knows. The trainer, which can ask torch,
    says the same (`slow_with`)."""
    return _SLOW[precision] if precision in _SLOW and computes(precision) is False else None


def slow_with(precision: str, instructions: Collection[str]) -> str | None:
    """The same, of a processor with these instructions."""
    return _SLOW[precision] if precision in _SLOW and not _COMPUTING[precision].intersection(instructions) else None


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


def _without_wide_registers() -> bool:
    """Windows names no instructions, but the registers they need: without those of AVX-512 or AMX there is neither precision."""
    if sys.platform != "win32" or platform.machine().upper() not in ("AMD64", "X86_64"):
        return False
    import ctypes

    asked = ctypes.windll.kernel32.GetEnabledXStateFeatures
    asked.restype = ctypes.c_ulonglong
    enabled = int(asked())
    return enabled != 0 and not enabled & _WIDE_REGISTERS


def _name_in_registry() -> str | None:
    if sys.platform != "win32":
        return None
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip() or None
    except OSError:
        return None
