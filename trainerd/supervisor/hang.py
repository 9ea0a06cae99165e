"""Whether a trainer hangs: signs of life and ticks in, a verdict out. Must not know clocks, processes or what follows.

A gap of more than two ticks counts as one: after a suspended laptop, a stopped supervisor or a jump of the clock nothing is
counted that nobody has watched. Time in which the trainer wanted to run and was not let does not count either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainerd.contract import phases

_FACTOR = 5.0
_ENOUGH_GAPS = 5
"""So many gaps between signs of this process, and the slowest of them says something about the next."""
_MOST_DOUBLINGS = 6
_SUSPICIOUS_SHARE = 0.1


@dataclass(frozen=True)
class Hang:
    """No sign of life for longer than the phase may take."""

    phase: str
    silent_seconds: float
    limit_seconds: float


class HangWatch:
    """Watches the trainers of one run, one after another. `slowest` is what was learned: seconds by phase, kept with the run.

    The training thread is watched, and beside it the save that is under way: it runs in a thread of its own, and one that
    never ends would leave the run unsaved for good.
    """

    def __init__(self, faults: Mapping[str, Any], slowest: Mapping[str, float] | None = None, tick_seconds: float = 1.0) -> None:
        self._faults = faults
        self._tick_seconds = tick_seconds
        self._doublings = 0
        self.slowest = {str(k): float(v) for k, v in (slowest or {}).items() if isinstance(v, (int, float)) and math.isfinite(v)}
        self.started()

    def started(self) -> None:
        """A new trainer process: it has shown nothing yet."""
        self.phase = phases.STARTING
        self.silent_seconds = 0.0
        self._slowest_seconds = 0.0  # of this stay in the phase
        self._training_gaps = 0
        self._heard_at = -math.inf
        self._save: int | None = None
        self._saving_seconds = 0.0

    def heard(self, phase: str | None = None, at: float = math.inf) -> None:
        """A sign of life, from the phase the trainer is in now (None: the same). `at` is the trainer's clock when it was made:
        signs come by two ways, and one that was overtaken is too old to say where it is."""
        phase = self.phase if phase is None or at < self._heard_at else phase
        self._heard_at = max(self._heard_at, at if at < math.inf else self._heard_at)
        self._slowest_seconds = max(self._slowest_seconds, self.silent_seconds)
        self.silent_seconds = 0.0
        if phase == self.phase == phases.TRAINING:
            self._training_gaps += 1
        elif phase == self.phase:
            return
        if self.phase != phases.WAITING:
            self._learn(self.phase, self._slowest_seconds)
        if phase != self.phase:
            self.phase, self._slowest_seconds = phase, 0.0

    def saving(self, number: int | None) -> None:
        """Which save is under way, by number; None: none is."""
        if number != self._save:
            if self._save is not None:
                self._learn(phases.CHECKPOINTING, self._saving_seconds)
            self._save, self._saving_seconds = number, 0.0

    def progressed(self) -> None:
        """A new checkpoint: what hung before is overcome."""
        self._doublings = 0

    def tick(self, elapsed_seconds: float, starved_share: float = 0.0) -> Hang | None:
        """So much time has passed, in that share of which the trainer was not let run. The verdict."""
        # Of a longer gap nobody knows anything: the machine slept, or the supervisor was stopped. It counts as one tick.
        known_seconds = elapsed_seconds if elapsed_seconds <= 2 * self._tick_seconds else self._tick_seconds
        counted = max(0.0, known_seconds) * (1.0 - min(max(starved_share, 0.0), 1.0))
        self.silent_seconds += counted
        if self._save is not None:
            self._saving_seconds += counted
        for phase, silent_seconds, limit_seconds in self._lanes():
            if silent_seconds > limit_seconds:
                # A limit that was too short must not end the run: the next attempt is given twice as long.
                self._doublings = min(self._doublings + 1, _MOST_DOUBLINGS)
                return Hang(phase, silent_seconds, limit_seconds)
        return None

    @property
    def suspicious(self) -> bool:
        """Whether it has been silent long enough to look closer at why."""
        return any(silent_seconds > limit_seconds * _SUSPICIOUS_SHARE for _, silent_seconds, limit_seconds in self._lanes())

    def limit_seconds(self, phase: str) -> float:
        """How long a phase may be silent now."""
        chosen = phases.chosen_seconds(self._faults, phase)
        if chosen is not None:
            return chosen
        by_itself = phases.silence(phase)
        # Steps are alike, and a few tell; the end of an evaluation is unlike its beginning: one must have been seen whole.
        known = self._training_gaps >= _ENOUGH_GAPS if phase == phases.TRAINING else phase in self.slowest
        least_seconds = by_itself.floor_seconds if known else by_itself.first_seconds
        here_seconds = self._slowest_seconds if phase == self.phase else 0.0
        slowest_seconds = max(self.slowest.get(phase, 0.0), here_seconds)
        return max(least_seconds, slowest_seconds * _FACTOR) * 2.0**self._doublings

    def learned(self) -> dict[str, float]:
        """What is to be kept with the run."""
        return {phase: round(seconds, 1) for phase, seconds in self.slowest.items()}

    def words(self) -> str:
        """For the status, once it has been silent for half of what it may; "" before."""
        limit_seconds = self.limit_seconds(self.phase)
        if self.silent_seconds * 2 < limit_seconds:
            return ""
        return f"No sign of life for {self.silent_seconds:.0f} s; after {limit_seconds:.0f} s it is started again."

    def _lanes(self) -> tuple[tuple[str, float, float], ...]:
        own = (self.phase, self.silent_seconds, self.limit_seconds(self.phase))
        if self._save is None:
            return (own,)
        return own, (phases.CHECKPOINTING, self._saving_seconds, self.limit_seconds(phases.CHECKPOINTING))

    def _learn(self, phase: str, seconds: float) -> None:
        self.slowest[phase] = max(self.slowest.get(phase, 0.0), seconds)
