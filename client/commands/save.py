"""`save`: write a checkpoint now, and return when it is durable."""

from __future__ import annotations

import click

from trainerd.contract.paths import Home
from trainerd.contract.status import Checkpoint, Reading

from .. import ask, console, words
from ..cli import pass_home, timeout


@click.command("save")
@timeout
@pass_home
def command(home: Home, timeout: float) -> None:
    """Write a checkpoint now."""
    before = ask.live(home)
    asked = ask.send(home, before, "save")
    # The answer comes when the checkpoint is acknowledged; a run that ended meanwhile has saved its result.
    reading = ask.until(home, asked, lambda r: r.alive or _last(r) is not None, timeout, f"Look again with: {console.program()} status")
    last = _last(reading)
    console.say(f"Saved: step {last.step:,} ({words.size(last.bytes)})." if last else "Saved.")


def _last(reading: Reading) -> Checkpoint | None:
    return reading.status.checkpoint if reading.status else None
