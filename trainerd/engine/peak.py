"""The most RAM this process has held at once, by the system's own count, and how to begin that count anew. Must not judge it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET = "5"  # proc(5): the peak becomes what is held now


def ram_bytes() -> int | None:
    """Since the process began, or since begin_anew() could."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text("ascii", "replace"), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)


def begin_anew() -> int:
    """What was held until now does not count any more. Returned is what a later count must exceed to tell anything: 0 on Linux; where
    the system cannot forget, the peak until now."""
    try:
        _REFERENCES.write_text(_RESET, "ascii")
    except OSError:
        return ram_bytes() or 0
    return 0
