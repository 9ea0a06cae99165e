"""Keeps the C library from giving large blocks back to the system after every step. Must not be called in a process that is not ours.

glibc maps every block above its threshold (at most 32 MiB by itself) anew and unmaps it when it is freed: a step's logits and
gradients then cost thousands of page faults, each time again (mallopt(3), M_MMAP_THRESHOLD). Kept in the heap they are used
again by the next step. What is free is given back all the same when memory is short: guard.py trims the heap at its limit.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_BYTES = 1 << 30
"""Rarer blocks than these, such as a whole model's weights, may be mapped: they are not made in every step."""


def keep_large_blocks() -> bool:
    """Serve blocks of up to 1 GiB from the heap, and keep the heap. False where the C library has no such setting."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
