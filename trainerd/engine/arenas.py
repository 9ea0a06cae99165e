"""Tells the C library whether to keep large blocks between steps or to give them back. Must not be called in a process that is not ours.

glibc maps every block above its threshold (at most 32 MiB by itself) anew and unmaps it when it is freed: a step's logits and
gradients then cost thousands of page faults, each time again (mallopt(3), M_MMAP_THRESHOLD). Kept in the heap they are used
again by the next step, at the price of holes between blocks of other sizes (memory/heap.py). So a trainer begins by giving back,
which also leaves nothing behind of what loading and tracing took; it keeps them where the estimate has room for the holes, and
gives back again when memory gets short (cleaning.py).
"""

from __future__ import annotations

import ctypes

from trainerd.memory import heap

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MOST = -1, -3, -4  # malloc.h
_MAPPINGS = 1 << 15  # the system allows a process 65,530 of all kinds
_THRESHOLD_BYTES = {heap.KEPT: 1 << 30, heap.GIVEN_BACK: 2 << 20}
"""Kept: rarer blocks than these, such as a whole model's weights, may be mapped: they are not made in every step."""
_now = heap.UNKNOWN


def now() -> str:
    """What this process's heap was told last: KEPT or GIVEN_BACK; UNKNOWN in a process that nobody has told, or cannot tell."""
    return _now


def hold(how: str) -> bool:
    """Keep blocks of up to 1 GiB in the heap, or map those from 2 MiB on. False where the C library has no such setting."""
    global _now
    if not heap.can_be_chosen():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_MMAP_THRESHOLD: _THRESHOLD_BYTES[how], _TRIM_THRESHOLD: 2**31 - 1, _MMAP_MOST: _MAPPINGS}
    if not all(mallopt(name, value) for name, value in settings.items()):
        return False
    _now = how
    return True


def give_back() -> None:
    """Memory is short: what is kept is kept no longer. Nothing in a process whose heap is not ours."""
    if _now == heap.KEPT:
        hold(heap.GIVEN_BACK)
