"""What `status` does, in a tenth of a second: one read, one print. Must not import click, rich, psutil or pydantic."""

from __future__ import annotations

import json
import sys
import time

from trainerd.contract import status
from trainerd.contract.paths import Home

from . import console, view


def show(home: Home, as_json: bool) -> int:
    """Print the state of `home`; returns the exit code."""
    reading = status.read(home)
    if as_json:
        console.say(json.dumps(reading.to_dict(), indent=1))
    else:
        fancy = console.can_show("█░·×")
        text = "\n".join(view.lines(reading, time.time(), fancy, console.program()))
        text = text if fancy else text.replace("·", "|").replace("×", "x")
        console.say(console.filled(text, sys.stdout, view.INDENT))
    return view.exit_code(reading)
