"""What follows the death of a trainer: pure arithmetic. Must not know the clock, processes or why it died.

What counts is progress on disk, not how long it lived: a lifetime budget would end a month-long run after a few unrelated
crashes, and an uptime rule would restart a trainer that crashes every minute forever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_DEATHS = 5
"""This many deaths in a row without a new checkpoint: the newest checkpoint may be what kills it."""
MAX_DELAY_SECONDS = 300.0


_FIRST_LOOK_SECONDS = 10.0


@dataclass(frozen=True)
class Restart:
    """Start again after `delay_seconds`; with `before_step`, from the checkpoint before that step."""

    delay_seconds: float
    before_step: int | None = None


class RestartPolicy:
    """Counts deaths without progress. One object lives as long as the supervisor."""

    def __init__(self, backoff_seconds: float = 1.0) -> None:
        self._backoff_seconds = backoff_seconds
        self.deaths = 0
        self._from_step = -1
        self._fell_back_from: int | None = None

    def started(self, from_step: int | None) -> None:
        """A trainer starts from the checkpoint of this step, or from the beginning."""
        self._from_step = -1 if from_step is None else from_step

    def acknowledged(self, step: int) -> None:
        """A checkpoint is on disk. Only one beyond where the trainer began, and beyond where it fell back from, is progress."""
        if step > self._from_step and (self._fell_back_from is None or step > self._fell_back_from):
            self.deaths, self._from_step, self._fell_back_from = 0, step, None

    def died(self, committed: Sequence[int]) -> Restart | None:
        """At once after progress, then 1, 2, 4 … 300 s; after five the checkpoint before, once; then None: give up."""
        self.deaths += 1
        if self.deaths < MAX_DEATHS:
            return Restart(0.0 if self.deaths == 1 else self._delay())
        if self._fell_back_from is None and len(committed) >= 2:
            self._fell_back_from = committed[-1]
            return Restart(self._delay(), before_step=committed[-1])
        return None

    def _delay(self) -> float:
        return min(MAX_DELAY_SECONDS, self._backoff_seconds * 2.0 ** (self.deaths - 2))


class DeviceWait:
    """Waits for a device that is gone: 10, 20, 40 … 300 s, for as long as it takes, and none of it counts as a death."""

    def __init__(self, first_look_seconds: float = _FIRST_LOOK_SECONDS) -> None:
        self._first_look_seconds = first_look_seconds
        self._looks = 0
        self._lost_at_work = False

    def lost(self, at_work: bool) -> float | None:
        """When to look for it again; None: this counts as a death.

        `at_work`: the trainer had been training on it. One that comes back and is lost again each time before anything was
        saved is lost by what is done with it.
        """
        if at_work and self._lost_at_work:
            return None
        self._lost_at_work |= at_work
        self._looks += 1
        return min(MAX_DELAY_SECONDS, self._first_look_seconds * 2.0 ** min(self._looks - 1, 10))

    def acknowledged(self) -> None:
        """A new checkpoint: the device works."""
        self._looks, self._lost_at_work = 0, False
