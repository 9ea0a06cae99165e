"""Training in this terminal (optimized_train.py): the supervisor attached, with the same lock and the same status.

Ctrl-C reaches the supervisor too: it commits a checkpoint and stops. Must not end before it has.
"""

from __future__ import annotations

import subprocess
from typing import Any

import click

from trainerd.contract import errors, requests, status
from trainerd.contract.errors import TrainerdError
from trainerd.contract.paths import Home

from .. import choose, console, follow, launch, options, view
from ..cli import pass_home


@click.command("foreground", hidden=True)
@options.training_options
@pass_home
def command(home: Home, /, **words: Any) -> int:
    """Train in this terminal. Ctrl-C saves a checkpoint and stops; the same command goes on from there."""
    asked = options.configuration(words)
    follow.refuse_if_running(home)
    warnings = follow.prepare_home(home)
    choice = choose.choose(home, asked, resume=not words["no_resume"])
    for warning in warnings:
        console.complain(f"Warning: {warning}")
    if choice.told:
        console.say(choice.told)
    request, instance = follow.send_start(home, choice)
    try:
        supervisor = launch.attached(home, instance, request.id)
    except OSError as error:
        raise TrainerdError(f"The supervisor could not be started: {error.strerror or error}.") from None
    try:
        code = _wait(supervisor)
    finally:
        requests.withdraw(home.control / f"{request.id}.json")
    return _result(home, instance, code)


def _wait(supervisor: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return supervisor.wait()
        except KeyboardInterrupt:
            continue  # the supervisor got it as well; a second Ctrl-C makes it leave without saving


def _result(home: Home, instance: str, code: int) -> int:
    reading = status.read(home)
    shown = reading.status
    mine = shown is not None and shown.supervisor is not None and shown.supervisor.instance == instance
    if code == errors.EXIT_REFUSED and not mine:
        raise follow.already_running(home, reading)
    if mine:
        console.say(view.summary(reading))
    return code
