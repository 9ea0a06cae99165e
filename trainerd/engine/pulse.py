"""Signs of life, made by the thread that trains and by nobody else. Must not know who watches, nor what silence means.

The thread that writes events only passes them on: one that lives on while the training hangs cannot make any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainerd.contract import phases, wire

_EVERY_SECONDS = 1.0


class Pulse:
    """beat() costs next to nothing and sends a sign at most once a second; enter() sends at once."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._next = 0.0
        self.phase = phases.STARTING
        self.num_saves = 0
        """Saves begun so far; the last of them is under way while `is_saving` says so."""
        self.is_saving: Callable[[], bool] = lambda: False

    def beat(self) -> None:
        """Still alive."""
        now = time.monotonic()
        if now >= self._next:
            self._tell(now)

    def enter(self, phase: str) -> None:
        """Another phase begins."""
        self.phase = phase
        self._tell(time.monotonic())

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase for the time of a block; then the one before goes on."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def _tell(self, now: float) -> None:
        self._next = now + _EVERY_SECONDS
        self._send(wire.BEAT, phase=self.phase, save=self.num_saves if self.is_saving() else None)
