"""`resume`: go on after a pause (the supervisor is asked), or after a stop, a crash or a reboot (one is started)."""

from __future__ import annotations

import click

from trainerd.contract import lock, status
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home

from .. import ask, choose, console, follow, offers, view
from ..cli import pass_home, timeout
from .start import begin


@click.command("resume")
@click.argument("run", required=False, shell_complete=offers.run_names)
@timeout
@pass_home
def command(home: Home, run: str | None, timeout: float) -> int:
    """Go on with the paused run, else with RUN or the newest unfinished one, as it was."""
    if status.read(home).state != status.PAUSED:
        follow.refuse_if_running(home)
    if lock.is_held(home.supervisor_lock):
        return _wake(home, run, timeout)
    choice = choose.unfinished(home, run)
    choice.told = f"Going on with {choice.run}."
    return begin(home, choice, follow.prepare_home(home), wait=False, as_json=False)


def _wake(home: Home, run: str | None, timeout: float) -> int:
    """Ask the supervisor that holds a paused run to bring the trainer back."""
    before = ask.live(home)
    paused = before.status.run if before.status else None
    if run is not None and run != paused:
        raise Refused(f"{paused} is paused here, not {run}.", f"End it first: {console.program()} stop")
    asked = ask.send(home, before, "resume")
    reading = ask.until(home, asked, lambda r: r.state in ask.GOES_ON, timeout, f"Look again with: {console.program()} status")
    console.say(view.summary(reading))
    return 0
