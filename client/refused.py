"""What to type after a training that was refused as too large: the same again with the change that its refusal names. Must not read files.

To go on with it as it was would be refused again, unless there is more memory by then.
"""

from __future__ import annotations

import re
from pathlib import Path

from trainerd.contract.errors import Refused
from trainerd.contract.status import Reading

from . import console

_FITS = re.compile(r"would (be likely to )?fit with ((?:--set \S+ )*?--set \S+?)(?: \(| or |\.(?:\s|$))")
_TOO_LARGE = "It does not fit"
_OWN_NAME = re.compile(r".*-\d{8}-\d{6}(-\d+)?")  # choose.py gives it where nobody names the run


def steps(reading: Reading, program: str) -> list[str]:
    """The lines to show; none where it was not refused as too large."""
    shown = reading.status
    kind, _, said = ((shown.trainer.last_exit if shown else None) or "").partition(": ")
    if shown is None or kind != Refused.__name__ or not said.startswith(_TOO_LARGE):
        return []
    later, change = f"{program} resume", _FITS.search(said)
    if change is None or not shown.config or not shown.run:
        return [f"Once there is more memory: {later}"]
    config = console.quoted(str(Path(shown.home) / shown.config))
    name, how = other_name(shown.run, "smaller"), "is likely to fit" if change[1] else "fits"
    return [f"Start it as it {how} with: {program} start --config {config} {change[2]}{name}", f"Or, once there is more memory: {later}"]


def other_name(run: str, what: str) -> str:
    """The option that gives a new run a name, where the one of `run` was a person's and is taken; "" where one is made up anyway."""
    return "" if _OWN_NAME.fullmatch(run) else f" --name {console.quoted(f'{run}-{what}')}"
