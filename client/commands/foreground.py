"""Training in this terminal (optimized_train.py): the supervisor attached, with the same lock and the same status.

Ctrl-C reaches the supervisor too: it commits a checkpoint and stops. Must not end before it has.
"""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

import click

from trainerd.contract import errors, requests, status
from trainerd.contract.errors import TrainerdError, remedy
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading

from .. import choose, console, fitting, follow, launch, limits, options, room, stages, tail, view
from ..cli import pass_home

_LOOK_SECONDS = 0.25


@click.command("foreground", hidden=True)
@options.training_options
@pass_home
def command(home: Home, /, **words: Any) -> int:
    """Train in this terminal. Ctrl-C saves a checkpoint and stops; the same command goes on from there."""
    asked = options.configuration(words)
    follow.refuse_if_running(home)
    warnings = follow.prepare_home(home)
    choice = choose.choose(home, asked, resume=not words["no_resume"])
    if not choice.resume:
        room.refuse_without_room(home, choice.config)
        warnings += fitting.warnings(home, asked)
    chosen = choice.config.memory
    for warning in (*choice.warnings, *warnings, *limits.warnings(chosen.ram_limit, chosen.vram_limit)):
        console.complain(f"Warning: {warning}")
    if choice.told:
        console.tell(choice.told)
    request, instance = follow.send_start(home, choice)
    try:
        supervisor = launch.attached(home, instance, request.id)
    except OSError as error:
        raise TrainerdError(f"The supervisor could not be started: {error.strerror or error}.", remedy(error)) from None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever called may have it ignored; the supervisor obeys it anyway
    run, program = choice.run, console.program()
    console.tell(f"Training {run} in this terminal. Ctrl-C saves a checkpoint and stops. From another one: {program} status")
    try:
        code = _follow(home, supervisor, instance)
    finally:
        requests.withdraw(home.control / f"{request.id}.json")
    return _result(home, instance, code)


def _follow(home: Home, supervisor: subprocess.Popen[bytes], instance: str) -> int:
    """Tell the training from its status, and what the task itself prints from its log, until the supervisor has ended."""
    teller, own_words = stages.Teller(), tail.OwnWords(home)
    while True:
        try:
            code = supervisor.poll()
            reading = status.read(home)
            if _is_mine(reading, instance):
                for line in (*own_words.read(reading), *teller.lines(reading, time.time())):
                    console.say(line)
            if code is not None:
                return code
            time.sleep(_LOOK_SECONDS)
        except KeyboardInterrupt:
            # The supervisor got it as well; a second one makes it leave without saving.
            console.say("Stopping. Ctrl-C once more does not wait for the checkpoint.")


def _is_mine(reading: Reading, instance: str) -> bool:
    shown = reading.status
    return shown is not None and shown.supervisor is not None and shown.supervisor.instance == instance


def _result(home: Home, instance: str, code: int) -> int:
    reading = status.read(home)
    mine = _is_mine(reading, instance)
    if code == errors.EXIT_REFUSED and not mine:
        raise follow.already_running(home, reading)
    if mine:
        console.tell(view.summary(reading))
        for line in view.what_next(reading, console.program()):
            console.say(line)
    return code
