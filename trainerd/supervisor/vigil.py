"""Keeps watch over one trainer after another: hears its signs of life, looks at the clock, and says when it has hung.

Must not end anybody: the loop does. What is a hang is decided in hang.py.
"""

from __future__ import annotations

import math
import time
from typing import Any

from trainerd.contract import phases, wire
from trainerd.contract.runs import RunRecord
from trainerd.machine.starvation import Starvation
from trainerd.supervisor.hang import Hang, HangWatch
from trainerd.supervisor.trainer import TrainerProcess

# Only what the training thread sends itself is a sign: the saver and the thread that writes events outlive a hang.
_SIGNS = (wire.HELLO, wire.CHECKED, wire.WAITING, wire.PHASE, wire.BEAT)


class Vigil:
    """One supervisor's watch, with what it has learned of this run's trainers."""

    def __init__(self, record: RunRecord, tick_seconds: float) -> None:
        self.hang = HangWatch(record.config.get("faults") or {}, record.slowest, tick_seconds)
        self._starvation: Starvation | None = None
        self._looked_at = time.monotonic()

    def hear(self, trainer: TrainerProcess, message: dict[str, Any]) -> None:
        """Any event of the trainer's."""
        event, at = message.get("event"), message.get("monotonic")
        if event not in _SIGNS:
            return
        if event == wire.PHASE:
            phase = message.get("name")
        elif event == wire.BEAT:
            phase = message.get("phase")
        else:
            phase = {wire.WAITING: phases.WAITING, wire.CHECKED: phases.STARTING}.get(str(event))
        trainer.has_trained |= phase == phases.TRAINING
        self.hang.heard(str(phase) if phase else None, at if isinstance(at, float) else math.inf)
        if event == wire.BEAT:
            number = message.get("save")
            self.hang.saving(number if isinstance(number, int) else None)

    def look(self, trainer: TrainerProcess | None) -> Hang | None:
        """Called in every tick, with the trainer that is expected to work now, if one is."""
        now = time.monotonic()
        elapsed_seconds, self._looked_at = now - self._looked_at, now
        if trainer is None or trainer.exit_code is not None:
            return None
        if not self.hang.suspicious:
            self._starvation = None  # looking at every thread costs a millisecond: not while all is well
        elif self._starvation is None:
            self._starvation = Starvation(trainer.pid)
        return self.hang.tick(elapsed_seconds, self._starvation.share() if self._starvation else 0.0)
