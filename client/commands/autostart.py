"""`autostart enable|disable|status`: whether an unfinished training goes on by itself after a reboot. Must not start one."""

from __future__ import annotations

import json

import click

from trainerd.contract import files
from trainerd.contract.errors import TrainerdError, remedy
from trainerd.contract.paths import Home
from trainerd.machine import autostart

from .. import console, registration
from ..cli import pass_home


@click.command("autostart")
@click.argument("what", type=click.Choice(["status", "enable", "disable"]), default="status")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@pass_home
def command(home: Home, what: str, as_json: bool) -> None:
    """Whether an unfinished training of this home goes on when you log in. `disable` holds for later starts, too."""
    try:
        if what == "enable":
            _enable(home)
        elif what == "disable":
            _disable(home)
        found = registration.found(home)
    except OSError as error:
        raise TrainerdError(f"The registration for log-in: {error.strerror or error}{_place(error)}.", remedy(error)) from None
    if as_json:
        console.say(json.dumps(_document(home, found), indent=1))
        return
    for line in registration.words(home, found):
        console.say(line)


def _enable(home: Home) -> None:
    files.make_folder(home.root, 0o700)
    wish = registration.read(home)
    wish.wanted, wish.without = registration.WANTED, []
    registration.write(home, wish)
    autostart.enable(registration.entry(home))


def _disable(home: Home) -> None:
    if home.root.is_dir():
        wish = registration.read(home)
        wish.wanted = registration.UNWANTED
        registration.write(home, wish)
    autostart.disable(registration.entry(home))


def _document(home: Home, found: autostart.Found) -> dict[str, object]:
    due = registration.due(home)
    return {
        "schema": 1,
        "state": found.state,
        "way": found.way,
        "path": str(found.path) if found.path else None,
        "wanted": registration.read(home).wanted,
        "next": due.id if due else None,
        "last": registration.last_words(home),
    }


def _place(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""
