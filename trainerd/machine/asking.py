"""Asks what may never answer, a driver that is stuck, from a thread of its own: nobody waits for it, or no longer than he says. Must not
know what is asked.

The newest answer counts. A question that is not answered within five seconds is answered by None, and no other is asked meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_PATIENCE_SECONDS = 5.0
_DIED_SECONDS = 60.0


class Asking(Generic[T]):
    """One kind of question. Its thread starts with the first one, and keeps no process alive."""

    def __init__(self, ask: Callable[..., T], patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._ask = ask
        self._patience_seconds = patience_seconds
        self._wake, self._done = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._started_at = float("-inf")
        self._question: tuple[Any, ...] = ()
        self._asked_at: float | None = None
        self._answered: tuple[tuple[Any, ...], T] | None = None

    def want(self, *question: Any) -> bool:
        """Ask, unless the last question is still without an answer. Returns at once: whether it was asked."""
        if self._asked_at is not None and self._is_at_work():
            return False
        now, at_work = time.monotonic(), self._is_at_work()
        if not at_work and now - self._started_at < _DIED_SECONDS:
            return False  # an odd driver has ended the thread: not again in every second
        self._question, self._asked_at = question, now
        self._done.clear()
        self._wake.set()
        if not at_work:
            self._started_at = now
            self._thread = threading.Thread(target=self._work, name="asking", daemon=True)
            self._thread.start()
        return True

    def ask(self, *question: Any, seconds: float) -> T | None:
        """For who cannot go on without: ask, and wait for the answer so long at most. None: nobody answers, or is still at another
        question."""
        if not self.want(*question) or not self._done.wait(seconds):
            return None
        return self.answer(*question)

    def settle(self, seconds: float) -> None:
        """Wait so long at most for an answer that is owed, and no longer than anybody would."""
        asked_at = self._asked_at
        if asked_at is not None:
            self._done.wait(max(0.0, min(seconds, asked_at + self._patience_seconds - time.monotonic())))

    @property
    def has_begun(self) -> bool:
        """Whether anything was ever asked."""
        return self._thread is not None

    @property
    def is_open(self) -> bool:
        """Asked, and an answer may still come."""
        asked_at = self._asked_at
        return asked_at is not None and time.monotonic() - asked_at < self._patience_seconds

    def answer(self, *question: Any) -> T | None:
        """The newest answer to this question; None: there is none yet, or nobody answers any more."""
        asked_at, answered = self._asked_at, self._answered
        if answered is None or answered[0] != question:
            return None
        return None if asked_at is not None and time.monotonic() - asked_at >= self._patience_seconds else answered[1]

    def _is_at_work(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            question = self._question
            self._answered = (question, self._ask(*question))
            self._asked_at = None
            self._done.set()


def within(seconds: float, ask: Callable[[], T]) -> T | None:
    """The answer to one question, waited for so long at most; None: there was none."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(ask()), name="asking", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
