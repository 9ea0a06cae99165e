"""The menu of start_training.sh and start_training.bat: one key and Enter, in a console or from a pipe. Must not do work itself.

Every choice is a command line that could be typed; the menu comes back after it.
"""

from __future__ import annotations

import shutil
import sys
from textwrap import wrap

import click

from trainerd.contract import status
from trainerd.contract.errors import TrainerdError
from trainerd.contract.paths import Home

from .. import console, revive, view
from ..cli import pass_home, run

_CHOICES = [
    ("1", "Quick test", "3 epochs, 5,000 samples", ["start", "--preset", "quick"]),
    ("2", "Standard training", "5 epochs, 10,000 samples", ["start", "--preset", "standard"]),
    ("3", "Extended training", "8 epochs, 20,000 samples", ["start", "--preset", "extended"]),
    ("4", "Resume", "go on with the unfinished training", ["resume"]),
    ("5", "Status", "what is happening now", ["status"]),
    ("6", "Monitor", "watch it live", ["monitor"]),
    ("7", "Stop", "save a checkpoint and end", ["stop"]),
    ("8", "System check", "is this machine ready?", ["doctor"]),
    ("9", "Exit", "a running training goes on", []),
]
_NAME, _WIDE = 20, 70


@click.command("menu", hidden=True)
@click.option("--no-revive", is_flag=True, help="Do not start a supervisor again that was killed while its training was wanted.")
@pass_home
def command(home: Home, no_revive: bool) -> int:
    """Choose by number what the commands do by name."""
    told = "" if no_revive else revive.revive(home)
    if told:
        console.tell(told)
    by_key = {key: words for key, _, _, words in _CHOICES}
    while True:
        _show(home)
        key = _ask()
        if key is None or key in ("9", "q", "x", "0", "exit", "quit"):
            return 0
        if key not in by_key:
            if key:
                console.say(f"There is no choice {key!r}.")
            continue
        _do(home, by_key[key])


def _show(home: Home) -> None:
    """What there is to choose, and above it what is going on; in a narrow terminal by name alone."""
    width = shutil.get_terminal_size().columns
    reading = status.read(home)
    stands = "" if reading.state == status.NEVER_STARTED else f"Now: {view.summary(reading)}"
    console.say("\n" + "\n".join(wrap("trainerd: train in the background, and keep using your computer", width)))
    console.say("\n".join(wrap(stands, width)) + "\n" if stands else "")
    for key, name, text, _ in _CHOICES:
        console.say(f"  {key}  {name:<{_NAME}}{text}" if width >= _WIDE else f"  {key}  {name}")


def _ask() -> str | None:
    """The choice typed; None when nobody will type any more."""
    if sys.stdout is not None:
        print("\nYour choice, then Enter: ", end="", flush=True)
    try:
        answer = sys.stdin.readline() if sys.stdin is not None else ""
    except (OSError, ValueError):
        return None
    if not answer or not console.is_terminal(sys.stdin):
        console.say()  # nobody's Enter moved to the next line
    return answer.strip().lower() if answer else None


def _do(home: Home, words: list[str]) -> None:
    """Run one choice; an error is told, and the menu goes on."""
    try:
        run(words, home)
    except TrainerdError as error:
        console.tell(f"{error.message}\n{error.hint}".rstrip())
    except KeyboardInterrupt:
        console.say()
