"""Priority on Windows. Must not know what the process does.

Never PROCESS_MODE_BACKGROUND_BEGIN: it caps the working set at 32 MiB. Children inherit the idle class by themselves.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import wintypes

import psutil

assert sys.platform == "win32"

_PROCESS_MEMORY_PRIORITY = 0
_MEMORY_PRIORITY_LOW = 2

_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)


def lower_self(level: str) -> list[str]:
    """Step back behind everything else. Returns what was achieved, in words; "normal" does nothing. Never raises."""
    if level != "idle":
        return []
    achieved = []
    try:
        psutil.Process().nice(psutil.IDLE_PRIORITY_CLASS)
        achieved.append("idle priority class")
    except (psutil.Error, OSError):
        pass  # a policy of the company's: training still works
    if _set_memory_priority(_MEMORY_PRIORITY_LOW):
        achieved.append("low memory priority")
    return achieved


def raise_process(pid: int) -> None:
    """Give a process and its children the normal class back, for a quick stop. Never raises."""
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            process.nice(psutil.NORMAL_PRIORITY_CLASS)
    except (psutil.Error, OSError):
        pass  # it is gone, which is what the stop is for


def wrap(command: list[str], level: str, name: str) -> list[str]:
    """Windows needs no wrapping: the process lowers itself."""
    return command


def _set_memory_priority(priority: int) -> bool:
    value = wintypes.ULONG(priority)
    process = wintypes.HANDLE(_kernel32.GetCurrentProcess())
    try:
        return bool(_kernel32.SetProcessInformation(process, _PROCESS_MEMORY_PRIORITY, ctypes.byref(value), ctypes.sizeof(value)))
    except AttributeError:
        return False  # before Windows 8
