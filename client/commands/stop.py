"""`stop`: commit a checkpoint, end everything, and return when it is so."""

from __future__ import annotations

import click

from trainerd.contract import status
from trainerd.contract.paths import Home

from .. import ask, console, view
from ..cli import pass_home, timeout


@click.command("stop")
@click.option("--now", is_flag=True, help="Do not save: what was learnt since the last checkpoint is lost.")
@timeout
@pass_home
def command(home: Home, now: bool, timeout: float) -> None:
    """Save a checkpoint and end. `resume` or `start` goes on from there."""
    asked = ask.send(home, ask.live(home), "stop", {"now": now, "timeout_seconds": timeout})
    hint = f"Look again with: {console.program()} status     End it without saving with: {console.program()} stop --now"
    reading = ask.until(home, asked, lambda r: not r.alive and r.state in status.END_STATES, timeout, hint)
    console.say(view.summary(reading))
