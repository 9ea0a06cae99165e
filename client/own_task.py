"""What to type after the run of a person's own task has failed: `resume` takes the run's copy of the file, a mended one needs `start`.

Must not read files, nor judge whose fault it was: only where the file cannot even be loaded it is the file's for sure.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from trainerd.contract.errors import BadTaskFile, ConfigError
from trainerd.contract.status import Reading

from . import console, refused

_EXPORT = "The task's own export() "
_MODULE = re.compile(r" imports '([\w.]+)', ")


def steps(reading: Reading, program: str) -> list[str]:
    """The lines to show; none for a built-in task."""
    shown = reading.status
    file, _, name = (shown.task if shown and shown.task else "").rpartition(":")
    if shown is None or not (file.endswith(".py") and name) or not shown.config or not shown.run:
        return []
    if not f"{shown.task}{shown.home}{shown.config}{shown.run}".isprintable():
        return []  # no terminal is to be moved by what a status file says
    mend = f"Mend {PurePath(file.replace(chr(92), '/')).name}"
    same = f"{program} start --config {console.quoted(str(Path(shown.home) / shown.config))}"
    anew = f"{same}{refused.other_name(shown.run, 'mended')}"
    kind, _, said = (shown.trainer.last_exit or "").partition(": ")
    if kind == BadTaskFile.__name__:
        module = _MODULE.search(said)
        found = [f"Or, when Python finds {module[1]!r}, go on with: {program} resume"] if module else []
        return [f"{mend}, then begin a new run with: {anew}", *found]
    if kind == ConfigError.__name__:  # its Settings do not know a word: the run's configuration would say it again
        return [f"Begin a new run with that put right: {program} start --task {console.quoted(shown.task or '')} ..."]
    if kind.startswith(_EXPORT):
        return [f"{mend}, then write the result with: {same}", f"Or try again as it was with: {program} resume"]
    again = "from the last checkpoint " if shown.checkpoint is not None else ""
    tried = f"Try again {again}with the run's own copy of the task: {program} resume"
    mended = f"{mend} if it is wrong, then begin a new run with: {anew}"
    return [tried, mended] if again else [mended, tried]
