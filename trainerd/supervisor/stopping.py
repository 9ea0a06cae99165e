"""Records a person's stop of a run that no supervisor watches: killed, or gone with the machine. Must not start a trainer.

Only a supervisor writes a run's record and the status; so for the moment that this takes, there is one.
"""

from __future__ import annotations

import os
from typing import Any

from trainerd.contract import clock, runs, status
from trainerd.contract.errors import UsageError
from trainerd.contract.paths import Home
from trainerd.contract.status import Status, SupervisorInfo
from trainerd.supervisor import opening
from trainerd.supervisor.journal import Journal
from trainerd.supervisor.report import Report


def record_stop(home: Home, instance: str, request_id: str, arguments: dict[str, Any]) -> None:
    """The run is stopped from now on: nothing brings it back but `resume` or `start`. Raises TrainerdError or OSError."""
    name = arguments.get("run")
    if not isinstance(name, str) or not runs.valid_name(name):
        raise UsageError(f"{name!r} cannot be the name of a run.")
    record = runs.read(home, name)
    if record.outcome is None:
        saved = opening.newest_checkpoint(home, name)
        how = "`resume` goes on from the last checkpoint." if saved else "nothing was saved yet: `resume` begins at the beginning."
        reason = f"Stopped; its supervisor was gone already, and {how}"
        journal = Journal(home, record)
        journal.note("stop", instance=instance, reason=reason)
        journal.save_record(wanted=runs.WANTED_STOPPED, outcome=status.STOPPED, reason=reason, ended_at=clock.wall())
    report = Report(home, record, SupervisorInfo(os.getpid(), instance, clock.wall()))
    before = status.written(home)
    if before is not None and before.run == name:
        _keep(report.status, before)
    report.trainer_gone()
    report.state(record.outcome or status.STOPPED, record.reason)
    report.answer(request_id, "stop", "done")
    report.write_last()


def _keep(shown: Status, before: Status) -> None:
    """What was true of the run still is."""
    for part in ("preset", "log", "trainer", "data", "progress", "plan", "exact", "unsaved", "checkpoint", "warnings"):
        setattr(shown, part, getattr(before, part))
