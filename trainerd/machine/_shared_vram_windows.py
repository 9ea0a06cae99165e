"""The performance counter "GPU Process Memory, Shared Usage" through pdh.dll. Must not judge what it reads.

It is what Task Manager shows as shared GPU memory of a process: one instance per process and adapter, named pid_N_luid_….
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import wintypes

assert sys.platform == "win32"

_FORMAT_LARGE = 0x400
_MORE_DATA = 0x800007D2


class _Value(ctypes.Structure):
    _fields_ = (("status", wintypes.DWORD), ("large", ctypes.c_longlong))


class _Item(ctypes.Structure):
    _fields_ = (("name", wintypes.LPWSTR), ("value", _Value))


def shared_bytes(pid: int) -> int | None:
    """The bytes, over all adapters; None when the counter does not exist: an old Windows, a server without it. Takes milliseconds."""
    try:
        pdh = ctypes.WinDLL("pdh")
        query, counter = ctypes.c_void_p(), ctypes.c_void_p()
        if pdh.PdhOpenQueryW(None, ctypes.c_size_t(0), ctypes.byref(query)):
            return None
    except (OSError, AttributeError):
        return None
    try:
        path = f"\\GPU Process Memory(pid_{pid}_*)\\Shared Usage"
        if pdh.PdhAddEnglishCounterW(query, path, ctypes.c_size_t(0), ctypes.byref(counter)) or pdh.PdhCollectQueryData(query):
            return None
        return _sum(pdh, counter)
    except AttributeError:
        return None
    finally:
        pdh.PdhCloseQuery(query)


def _sum(pdh: ctypes.WinDLL, counter: ctypes.c_void_p) -> int | None:
    size, number = wintypes.DWORD(0), wintypes.DWORD(0)
    arguments = (counter, _FORMAT_LARGE, ctypes.byref(size), ctypes.byref(number))
    if pdh.PdhGetFormattedCounterArrayW(*arguments, None) & 0xFFFFFFFF != _MORE_DATA:
        return None
    space = ctypes.create_string_buffer(size.value)
    if pdh.PdhGetFormattedCounterArrayW(*arguments, space):
        return None
    items = ctypes.cast(space, ctypes.POINTER(_Item))
    return sum(int(items[i].value.large) for i in range(number.value) if items[i].value.status in (0, 1))
