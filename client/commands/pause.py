"""`pause`: commit a checkpoint and let the trainer go, so that RAM and GPU are free for the person."""

from __future__ import annotations

import click

from trainerd.contract import status
from trainerd.contract.paths import Home

from .. import ask, console, view
from ..cli import pass_home, timeout


@click.command("pause")
@timeout
@pass_home
def command(home: Home, timeout: float) -> None:
    """Save a checkpoint and free RAM and GPU; `resume` goes on, to the last bit."""
    asked = ask.send(home, ask.live(home), "pause", {"timeout_seconds": timeout})
    hint = f"Look again with: {console.program()} status"
    reading = ask.until(home, asked, lambda r: r.state in ask.RESTS, timeout, hint)
    console.say(view.summary(reading))
    if reading.state == status.PAUSED:
        console.say(f"Go on with: {console.program()} resume")
