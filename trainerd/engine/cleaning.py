"""Cleans memory, and measures what that was worth: milliseconds, bytes freed, bytes still free ten steps later. Must not see a limit.

A cleaning whose bytes are taken again ten steps later has bought nothing: the next one waits twice as long. What all of them cost is
held to 0.2 % of the run's time. What an out-of-memory frees for its own recovery is no cleaning, and not counted here.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trainerd.contract import wire
from trainerd.engine import arenas

_SHARE = 0.002
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 300.0
_WORTH_BYTES = 32 << 20
_LATER_STEPS = 10
_PASS_SECONDS = 10.0


def free() -> None:
    """Give back what nothing refers to: Python's cycles, CUDA's cached blocks, the C allocator's free pages."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    else:
        arenas.give_back()  # on a CPU it is the heap's blocks that are short of room
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            pass  # not glibc


@contextmanager
def settled() -> Iterator[None]:
    """What set-up has made stays to the end: a collection on the way need not look at its 300,000 objects again. Whoever has frozen
    something himself keeps it so."""
    had_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not had_frozen:
            gc.unfreeze()


class Cleaner:
    """`own_bytes()` is what this process holds of the machine and of the device; `clean` does the work."""

    def __init__(self, own_bytes: Callable[[], int], send: Callable[..., None], clean: Callable[[], None] = free) -> None:
        self._own_bytes = own_bytes
        self._send = send
        self._free = clean
        self._began: float | None = None
        self._next = 0.0
        self._passed_at = float("-inf")
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._last_seconds = 0.0
        self._measure_at: int | None = None
        self._freed = self._held_after = 0
        self.cleanups = 0
        self.seconds = 0.0
        """What all of them have cost so far."""

    def due(self, now: float, *, needed: bool = False) -> bool:
        """Whether the last one's pause is over, and another one is within the share of the training's time. One that is `needed`, since
        blocks have just become free that the heap or the device would keep, is let through at most once in ten seconds; it is charged, too.
        """
        if now >= self._next and (self.cleanups == 0 or self._is_within_share(now)):
            return True
        if not needed or now - self._passed_at < _PASS_SECONDS:
            return False
        self._passed_at = now
        return True

    def _is_within_share(self, now: float) -> bool:
        return self.seconds + self._last_seconds <= _SHARE * (now - (self._began or 0.0))

    def clean(self, now: float, step: int) -> int:
        """Clean once; returns the bytes that are free now. What they are worth is known ten steps later."""
        before = self._own_bytes()
        began = time.perf_counter()
        self._free()
        self._last_seconds = time.perf_counter() - began
        self._held_after = self._own_bytes()
        self._freed = max(0, before - self._held_after)
        self.cleanups += 1
        self.seconds += self._last_seconds
        self._pause_seconds = min(self._pause_seconds * 2, _LONGEST_PAUSE_SECONDS)
        self._next = now + self._pause_seconds
        self._measure_at = step + _LATER_STEPS
        milliseconds = round(self._last_seconds * 1e3, 1)
        told = {"step": step, "freed_bytes": self._freed, "milliseconds": milliseconds, "next_in_seconds": self._pause_seconds}
        self._send(wire.NOTE, kind="cleanup", **told)
        return self._freed

    def passed(self, step: int, now: float) -> None:
        """After every step: ten steps after a cleaning, what is still free of it. Only that makes the next one come soon."""
        if self._began is None:
            self._began = now
        if self._measure_at is None or step < self._measure_at:
            return
        self._measure_at = None
        still_free = min(self._freed, max(0, self._freed - (self._own_bytes() - self._held_after)))
        if still_free >= _WORTH_BYTES:
            self._pause_seconds = _FIRST_PAUSE_SECONDS
            self._next = min(self._next, now + _FIRST_PAUSE_SECONDS)
        told = {"freed_bytes": self._freed, "still_free_bytes": still_free, "next_in_seconds": round(max(0.0, self._next - now), 1)}
        self._send(wire.NOTE, kind="cleanup_lasted", step=step, **told)
