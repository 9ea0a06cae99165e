"""`stop`: commit a checkpoint, end everything, and return when it is so."""

from __future__ import annotations

import click

from trainerd.contract import runs, status
from trainerd.contract.errors import TrainerdError
from trainerd.contract.paths import Home

from .. import ask, console, follow, view
from ..cli import pass_home, timeout


@click.command("stop")
@click.option("--now", is_flag=True, help="Do not save: what was learnt since the last checkpoint is lost.")
@timeout
@pass_home
def command(home: Home, now: bool, timeout: float) -> None:
    """Save a checkpoint and end. `resume` or `start` goes on from there."""
    left = _left_behind(home)
    if left is not None:
        console.say(view.summary(follow.stop_without_supervisor(home, left)))
        return
    asked = ask.send(home, ask.live(home), "stop", {"now": now, "timeout_seconds": timeout})
    hint = f"Look again with: {console.program()} status\nEnd it without saving with: {console.program()} stop --now"
    reading = ask.until(home, asked, lambda r: not r.alive and r.state in status.END_STATES, timeout, hint)
    console.say(view.summary(reading))


def _left_behind(home: Home) -> str | None:
    """The run shown here, when no supervisor watches it and it would be brought back, at the next log-in or by the monitor."""
    reading = status.read(home)
    if reading.alive or reading.status is None or reading.status.run is None:
        return None
    try:
        record = runs.read(home, reading.status.run)
    except (OSError, TrainerdError):
        return None
    return record.id if record.outcome is None and record.wanted != runs.WANTED_STOPPED else None
