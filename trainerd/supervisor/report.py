"""The status document: filled, put into words, and written once a second. Must not act on what it shows."""

from __future__ import annotations

import time
from pathlib import Path

from trainerd.contract import clock, files, status
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord
from trainerd.contract.status import Phase, RequestOutcome, Status, SupervisorInfo, TrainerInfo
from trainerd.supervisor import journal

KEEP_REQUESTS = 32
KEEP_WARNINGS = 32
_LAST_SECONDS = 3.0
_DOING = {
    "preparing": "Preparing the data",
    "training": "Training",
    "evaluating": "Evaluating",
    "checkpointing": "Writing a checkpoint",
    "exporting": "Writing the finished model",
}


class Report:
    """Holds the status of one supervisor and knows when the file is out of date."""

    def __init__(self, home: Home, record: RunRecord, supervisor: SupervisorInfo) -> None:
        self._home = home
        self._written_at = float("-inf")
        self._urgent = True
        self.status = Status(
            run=record.id,
            task=record.task,
            preset=record.config.get("preset"),
            home=str(home.root),
            config=relative(home, home.run(record.id).config),
            supervisor=supervisor,
        )

    def state(self, state: str, reason: str) -> None:
        """Say what is going on; a change is written at once."""
        if (state, reason) != (self.status.state, self.status.reason):
            self._urgent |= state != self.status.state
            self.status.state, self.status.reason = state, reason

    def urgent(self) -> None:
        """Something changed that somebody may be waiting for."""
        self._urgent = True

    def trainer_gone(self, left_pid: int | None = None) -> None:
        """Numbers that were the trainer's are not true any more. `left_pid`: the process is still there, and nobody can end it."""
        self.status.trainer.pid, self.status.trainer.started_at = left_pid, None
        self.status.phase = None
        progress, vram = self.status.progress, self.status.memory.vram
        progress.samples_per_second = progress.tokens_per_second = progress.eta_seconds = None
        vram.used_bytes = vram.allocated_bytes = vram.reserved_bytes = None
        self.status.memory.ram.trainer_bytes = None
        self._urgent = True

    def trainer_started(self, pid: int, started_at: float, log: Path) -> None:
        """A new trainer process is up."""
        before = self.status.trainer
        self.status.trainer = TrainerInfo(pid, started_at, before.restarts, before.last_exit)
        self.status.phase = Phase("starting", started_at=started_at)
        self.status.log = relative(self._home, log)
        self._urgent = True

    def warn(self, text: str) -> bool:
        """Show a warning once; False when it is shown already."""
        if text in self.status.warnings:
            return False
        self.status.warnings = [*self.status.warnings, text][-KEEP_WARNINGS:]
        self._urgent = True
        return True

    def answer(self, ident: str, verb: str, outcome: str) -> None:
        """Put the outcome of a request into the status; a later one replaces an earlier one."""
        others = [request for request in self.status.requests if request.id != ident]
        self.status.requests = [*others, RequestOutcome(ident, verb, outcome, clock.wall())][-KEEP_REQUESTS:]
        self._urgent = True

    def answered(self, ident: str) -> bool:
        """Whether a request has been answered: the same id twice is one request."""
        return any(request.id == ident for request in self.status.requests)

    def write_if_due(self, every_seconds: float) -> None:
        """Write the file when something urgent changed or it is time. What cannot be written stays due."""
        now = time.monotonic()
        if not self._urgent and now - self._written_at < every_seconds:
            return
        self._written_at = now
        try:
            journal.write_even_when_full(self._home, lambda: status.write(self._home, self.status))
            self._urgent = False
        except OSError as error:
            # A reader that holds the file (Windows), a full disk: the old file stays, the next tick tries again.
            journal.say(f"cannot write {self._home.status}: {error}")

    def write_last(self) -> None:
        """Before the supervisor ends: nobody comes after it to try again, so it tries a little longer."""
        deadline = time.monotonic() + _LAST_SECONDS
        while self._urgent and time.monotonic() < deadline:
            self.write_if_due(0.0)
            time.sleep(0.05 if self._urgent else 0.0)


def doing(current: Status) -> str:
    """What the trainer is busy with, as one sentence, with what would be lost if it were killed now."""
    phase = current.phase
    if phase is None or phase.name == "starting":
        # Running, it has told that the task is sound: what is left before the first step is not a start any more.
        return "Building the model." if current.state == status.RUNNING else "Starting the trainer."
    words = _DOING.get(phase.name, phase.name.capitalize())
    progress = current.progress
    if phase.name == "training" and progress.epoch is not None and progress.epochs:
        words += f" epoch {progress.epoch} of {progress.epochs}"
    elif phase.done is not None and phase.total:
        words += f": {phase.done:,} of {phase.total:,} {phase.unit or ''}".rstrip()
    at_stake = at_stake_in(current)
    return f"{words}. {at_stake}" if at_stake else f"{words}."


def at_stake_in(current: Status) -> str:
    """What would be computed again if the trainer were killed now; "" when nothing."""
    step, saved = current.progress.step, current.checkpoint
    if current.phase is None or current.phase.name in ("starting", "preparing"):
        return ""  # the numbers are those of the trainer before
    ahead = 0 if step is None else step - (saved.step if saved else 0)
    if ahead <= 0:
        return ""
    since = saved.at if saved else current.trainer.started_at
    if since is not None and current.trainer.started_at is not None:
        since = max(since, current.trainer.started_at)
    ago = "" if since is None else f" ({span(clock.wall() - since)})"
    return f"{ahead:,} step{'s' if ahead != 1 else ''}{ago} since the last checkpoint."


def span(seconds: float) -> str:
    """A length of time for a person: 45 s, 12 min, 3.5 h."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def relative(home: Home, path: Path) -> str:
    """A path as it stands in the status: relative to the home, with forward slashes."""
    try:
        return path.relative_to(home.root).as_posix()
    except ValueError:
        return str(path)


def keep_damaged_aside(home: Home) -> Path | None:
    """Move a status no reader can use out of the way; the new place, or None when there was nothing wrong."""
    try:
        status.from_dict(files.read_json(home.status, "The status"))
        return None
    except FileNotFoundError:
        return None
    except Unreadable:
        pass
    for number in range(1, 1000):
        aside = home.status.with_name(f"{home.status.name}.corrupt-{number}")
        if not aside.exists():
            files.replace(home.status, aside)
            return aside
    return None
