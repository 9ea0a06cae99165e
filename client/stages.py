"""A training told line by line as it goes: one line per stage, then how far it is. Must not read files or print.

For a person who trains in this very terminal (optimized_train.py): what is repeated is left out, what stands still is said once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from trainerd.contract.status import RECOVERING, RUNNING, STARTING, STOPPING, WAITING, Reading, Status

from . import view
from .words import clean, count, duration, known, number

_PREPARING_SECONDS, _PROGRESS_SECONDS, _STILL_SECONDS = 2.0, 10.0, 15.0
_STAGES = {
    "starting": "Building the model.",
    "preparing": "Preparing the data (once; kept for the next time).",
    "exporting": "Writing the finished model.",
}


@dataclass
class Teller:
    """Remembers what it has told."""

    _stage: str = ""
    _warnings: set[str] = field(default_factory=set)
    _evaluated: dict[str, float] = field(default_factory=dict)
    _first_step: bool = False
    _prepared: bool = False
    _next_at: float = 0.0
    _stage_at: float = 0.0

    def lines(self, reading: Reading, now: float) -> list[str]:
        """What is new since the last look, each line with the time of day."""
        found = reading.status
        if found is None:
            return []
        news = [*self._stages(reading, found, now), *self._steps(reading, found, now), *self._warned(found)]
        hour = time.strftime("%H:%M:%S", time.localtime(now))
        return [f"{hour}  {line}" for line in news]

    def _stages(self, reading: Reading, found: Status, now: float) -> list[str]:
        phase = found.phase.name if found.phase else "starting"
        if reading.state == STARTING:
            stage = "Starting the trainer: it loads PyTorch first."
        elif reading.state in (WAITING, RECOVERING, STOPPING):
            stage = clean(reading.reason)
        else:
            stage = _STAGES.get(phase, "") if reading.state == RUNNING else ""
        if stage == self._stage and reading.state in (STARTING, WAITING) and now >= self._next_at:
            self._next_at = now + _STILL_SECONDS
            return [f"Still {reading.state}, for {duration(now - self._stage_at)} now."]
        if not stage or stage == self._stage:
            return []
        self._stage, self._stage_at, self._next_at = stage, now, now + _STILL_SECONDS
        if reading.state == RECOVERING:
            self._first_step = False
        return [stage]

    def _steps(self, reading: Reading, found: Status, now: float) -> list[str]:
        """Preparation and training as they go on, and each evaluation once."""
        phase, made = found.phase, found.progress
        if reading.state != RUNNING or phase is None or phase.name in ("starting", "exporting"):
            return []
        news = self._evaluation(made.eval)
        if phase.name == "preparing":
            due = known(phase.done) and (now >= self._next_at or not self._prepared)
            self._prepared |= due
            self._next_at = now + _PREPARING_SECONDS if due else self._next_at
            return [*news, view.progress(found, False, 0)] if due else news
        if not self._first_step and known(made.loss):
            self._first_step, self._next_at = True, now + _PROGRESS_SECONDS
            return [*news, f"The first step is done (loss {number(made.loss)}); now it goes on by itself."]
        if self._first_step and now >= self._next_at:
            self._next_at = now + _PROGRESS_SECONDS
            return [*news, self._progress(found, now)]
        return news

    def _progress(self, found: Status, now: float) -> str:
        saved = f"saved: step {count(found.checkpoint.step)}" if found.checkpoint else "nothing saved yet"
        loss = f"loss {number(found.progress.loss)}" if known(found.progress.loss) else ""
        parts = (view.progress(found, False, 0), loss, view.speed(found, now), saved)
        return "  ".join(part.replace(" · ", "  ") for part in parts if part)

    def _evaluation(self, measured: dict[str, float]) -> list[str]:
        if not measured or measured == self._evaluated:
            return []
        self._evaluated = dict(measured)
        return [f"Evaluated: {', '.join(f'{clean(name, 30)} {number(value)}' for name, value in list(measured.items())[:4])}."]

    def _warned(self, found: Status) -> list[str]:
        new = [text for text in map(str, found.warnings) if text not in self._warnings]
        self._warnings.update(new)
        return [f"! {clean(text)}" for text in new]
