"""Looks at the RAM once a second from a thread of its own, so that a long micro-batch hides nothing. Must not act, nor judge a limit.

What is seen is told at once when the machine is short of RAM, and when it is at its last; what is done about it is done by the training,
at the edge of a micro-batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from trainerd.contract import wire
from trainerd.machine.memory import RamFacts

_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 60.0
LAST_SHARE = 0.97  # of the machine: beyond it the system may end a program
_END_SECONDS = 2.0
_LAST = "The machine has hardly any RAM left, and less by the second: the system may end a program, this training perhaps. Close others."


class Lookout:
    """`seen(now, ram)` is called in the thread."""

    def __init__(self, ram: Callable[[], RamFacts], seen: Callable[[float, RamFacts], None]) -> None:
        self._ram = ram
        self._seen = seen
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look. The thread keeps no process alive."""
        self._thread = threading.Thread(target=self._look, name="lookout", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more; what is being told is told to its end."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_END_SECONDS)

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._seen(time.monotonic(), self._ram())


class Growing:
    """What of the looks is worth an event: too much in use, once for each time it begins; and the machine at its last."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self._is_over = False
        self._before_bytes: int | None = None
        self._short_at = self._last_at = float("-inf")

    def seen(self, now: float, ram: RamFacts, *, over: bool, ceiling_bytes: int) -> None:
        """One look; neither is told more often than once a minute."""
        facts = {"used_bytes": ram.used_bytes, "total_bytes": ram.total_bytes, "ceiling_bytes": ceiling_bytes}
        if over and not self._is_over and now - self._short_at >= _AGAIN_SECONDS:
            self._short_at = now
            self._send(wire.NOTE, kind="ram_short", **facts)
        self._is_over = over
        grows = self._before_bytes is not None and ram.used_bytes > self._before_bytes
        self._before_bytes = ram.used_bytes
        if grows and ram.used_bytes > ram.total_bytes * LAST_SHARE and now - self._last_at >= _AGAIN_SECONDS:
            self._last_at = now
            self._send(wire.NOTE, kind="ram_at_its_last", **facts)
            self._send(wire.WARNING, text=_LAST)
