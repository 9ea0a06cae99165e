"""The clocks a status is stamped with, and the boot they belong to. Must not decide what is stale."""

from __future__ import annotations

import sys
import time
from pathlib import Path

_BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


def wall() -> float:
    """UTC epoch seconds."""
    return time.time()


def monotonic() -> float:
    """Seconds since boot, the same for every process; it stands still while the machine sleeps (Linux)."""
    return time.monotonic()


def boot_id() -> str:
    """Names this boot: monotonic stamps of two processes may be compared only when it is the same."""
    try:
        return _BOOT_ID_FILE.read_text("ascii").strip()
    except OSError:
        # Windows and macOS have no such name; the minute of the boot is steady unless somebody sets the clock.
        return f"{sys.platform}-{round((time.time() - time.monotonic()) / 60)}"
