"""What of a file the system keeps in RAM, and letting go of it. Must not be used on files of other programs.

Only Linux tells and obeys. What is kept counts as available RAM everywhere: letting go helps little, and is said so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path


def kept_bytes(path: Path) -> int | None:
    """Bytes of the file that lie in the system's cache; None where that is not told."""
    if sys.platform != "linux":
        return None
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return 0
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as seen:
                return _resident(seen, size)
    except (OSError, ValueError):
        return None


def _resident(seen: mmap.mmap, size: int) -> int | None:
    """mincore(2): one byte for every page."""
    page = mmap.PAGESIZE
    pages = (ctypes.c_ubyte * (-(-size // page)))()
    first = ctypes.c_char.from_buffer(seen)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
    finally:
        del first  # the map cannot be closed while something points into it
    return None if failed else min(size, sum(flag & 1 for flag in pages) * page)


def let_go(path: Path) -> None:
    """Ask the system to forget its copy; what is mapped by a process, or not yet written, stays. Raises OSError."""
    if sys.platform != "linux":
        return
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
