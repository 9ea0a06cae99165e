"""`login`, hidden: what is registered for the person's log-in. Goes on with the unfinished run of the home, or does nothing.

Nobody reads its output: what it did is one line in training_logs/autostart.log. Must not ask, and must not start a new run.
"""

from __future__ import annotations

import os
import time

import click

from trainerd.contract import files, lock
from trainerd.contract.errors import EXIT_DONE, TrainerdError
from trainerd.contract.paths import Home
from trainerd.machine import autostart

from .. import choose, console, follow, registration
from ..cli import pass_home

_LOG_BYTES = 64 * 1024


@click.command("login", hidden=True)
@pass_home
def command(home: Home) -> int:
    """Go on with the unfinished training of this home, if there is one."""
    if not home.root.is_dir():
        return EXIT_DONE  # deleted, or on a drive that is not there today
    if lock.is_held(home.supervisor_lock):
        return _told(home, "it runs already")
    wish = registration.read(home)
    record = registration.due(home)
    if record is None:
        if wish.wanted == registration.AUTO:
            autostart.disable(registration.entry(home))  # the next start registers it again
        return _told(home, "there is nothing to go on with")
    if wish.wanted == registration.UNWANTED:
        return _told(home, "autostart is disabled")
    for name, value in wish.environment.items():
        os.environ.setdefault(name, value)
    try:
        choice = choose.unfinished(home, record.id)
        choice.only_if_wanted = True
        follow.prepare_home(home)
        follow.start(home, choice)
    except TrainerdError as error:
        # Exit code 0 when a supervisor is up after all: systemd would end it with a unit that failed.
        return _told(home, f"{record.id} could not be resumed: {error}", 0 if lock.is_held(home.supervisor_lock) else error.exit_code)
    return _told(home, f"going on with {record.id}")


def _told(home: Home, words: str, code: int = EXIT_DONE) -> int:
    """Write down what was done; a log that cannot be written stops nothing."""
    path = home.logs / registration.LOG
    try:
        home.logs.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LOG_BYTES:
            files.write_atomic(path, path.read_bytes()[-_LOG_BYTES // 2 :].partition(b"\n")[2])
        files.append_line(path, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {words}")
    except OSError:
        pass
    console.say(words)
    return code
