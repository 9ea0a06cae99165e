"""`start`: check everything that can be checked without torch, then begin or go on in the background."""

from __future__ import annotations

import json
import shutil
from typing import Any

import click

from trainerd.contract import status
from trainerd.contract.paths import Home

from .. import choose, console, fit, fitting, follow, limits, options, registration, room, view
from ..cli import pass_home


@click.command("start")
@options.training_options
@click.option("--wait", is_flag=True, help="Return when the training has ended, with its result as exit code.")
@click.option("--no-autostart", is_flag=True, help="Do not go on with this run by itself after a reboot.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@pass_home
def command(home: Home, /, wait: bool, no_autostart: bool, as_json: bool, **words: Any) -> int:
    """Begin a training in the background, or go on with an unfinished one."""
    asked = options.configuration(words)
    follow.refuse_if_running(home)
    warnings = follow.prepare_home(home)
    choice = choose.choose(home, asked, resume=not words["no_resume"])
    if not choice.resume:
        room.refuse_without_room(home, choice.config)
        warnings += fitting.warnings(home, asked)
    return begin(home, choice, warnings, wait, as_json, autostart=not no_autostart)


def begin(home: Home, choice: choose.Choice, warnings: list[str], wait: bool, as_json: bool, autostart: bool = True) -> int:
    """Start `choice` in the background, say how it stands, and wait for its end when asked to."""
    _warn(*choice.warnings, *warnings)
    if choice.told and not as_json:
        console.tell(choice.told)
    _warn(*limits.warnings(choice.config.memory.ram_limit, choice.config.memory.vram_limit))
    if not autostart:
        registration.decline(home, choice.run)
    reading, tied = follow.start(home, choice)
    _warn(*filter(None, [tied]))
    if choice.task_file is not None:
        reading = follow.until_checked(home, reading)
    after_reboot = registration.begun(home, choice.run, autostart, new=not choice.resume)
    if not as_json:
        if reading.alive and reading.state not in status.END_STATES:
            _tell(reading, tied, wait)
        elif not wait:  # else it is said below
            console.say(_result(reading))
        if after_reboot:
            console.tell(after_reboot)
    code = 0
    if wait:
        reading = _until_end(home, choice.run)
        code = view.result_code(reading)
        if not as_json:
            console.say(_result(reading))
    if as_json:
        console.say(json.dumps({**reading.to_dict(), "resumed": choice.resume, "changes": choice.changes}, indent=1))
    return code


def _until_end(home: Home, run: str) -> status.Reading:
    try:
        return follow.until_end(home, run, console.complain)
    except KeyboardInterrupt:
        console.complain("No longer waiting; the training goes on in the background.")
        raise


def _warn(*warnings: str) -> None:
    for warning in warnings:
        console.complain(f"Warning: {warning}")


def _result(reading: status.Reading) -> str:
    return "\n".join([view.summary(reading), *view.what_next(reading, console.program())])


def _tell(reading: status.Reading, tied: str, wait: bool) -> None:
    shown, program = reading.status, console.program()
    run = shown.run if shown else "The run"
    free = "" if tied else "; this window may be closed"
    stays = "This window waits for its end; Ctrl-C ends only the waiting, not the run."
    console.tell(f"{run} is {reading.state}. {stays}" if wait else f"{run} is {reading.state} in the background{free}.")
    if reading.state == status.WAITING:
        console.tell(reading.reason)
    hints = (f"Look: {program} status", f"Watch: {program} monitor", f"End: {program} stop")
    console.say(fit.beside(hints, shutil.get_terminal_size().columns))
