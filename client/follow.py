"""Starts a supervisor and follows it: until it is up, until it ends. Must not decide what it runs."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable

from trainerd.contract import errors, files, ground, lock, requests, runs, status
from trainerd.contract.errors import AlreadyRunning, Refused, RunFailed, TrainerdError, Unreadable, UsageError, remedy
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading
from trainerd.machine import filesystem

from . import console, launch, options, stuck
from .choose import Choice

_LOOK_SECONDS = 0.02
_UP_SECONDS = 30.0
_VERDICT_SECONDS = 300.0
_END_SECONDS = 3.0
_END_LOOK_SECONDS = 0.25
_PATIENCE_SECONDS = 2.0
"""Until what is waited for is said: on a machine with nothing else to do it is there before."""
Tell = Callable[[str], None]
_STANDING = (status.PAUSED, status.WAITING, status.RECOVERING, status.NOT_ANSWERING)
_LEAST_FREE_BYTES = 200_000_000
_OF_THE_TASK = {UsageError.__name__, *(kind.__name__ for kind in UsageError.__subclasses__())}


def refuse_if_running(home: Home) -> None:
    """Raise AlreadyRunning when a supervisor holds this home, after waiting a moment for one that has just ended."""
    deadline = time.monotonic() + _END_SECONDS
    while lock.is_held(home.supervisor_lock):
        reading = status.read(home)
        if reading.state not in status.END_STATES or time.monotonic() >= deadline:
            raise already_running(home, reading)
        time.sleep(_LOOK_SECONDS)


def already_running(home: Home, reading: Reading) -> AlreadyRunning:
    """That this home is taken, by what, and what to do."""
    program = console.program()
    run = reading.status.run if reading.status and reading.status.run else "a run"
    if reading.state == status.PAUSED:
        return AlreadyRunning(f"{run} is paused in {home.root}.", f"Go on with: {program} resume\nEnd it with: {program} stop")
    if reading.state == status.NOT_ANSWERING:
        return AlreadyRunning(f"{run} is already in {home.root}. {reading.reason}", stuck.remedy(reading, program))
    hint = f"Watch it: {program} monitor\nEnd it: {program} stop\nTrain beside it: {console.elsewhere()} start{options.typed()}"
    return AlreadyRunning(f"{run} is already in {home.root} ({reading.state}).", hint)


def prepare_home(home: Home) -> list[str]:
    """Create the home; returns warnings about the place. Raises Refused when it cannot hold a training."""
    try:
        files.make_folder(home.root, 0o700)
    except OSError as error:
        raise Refused(f"The home {home.root} cannot be created: {error.strerror or error}.", "Name another folder with --home.") from None
    found = ground.check(home)
    free = filesystem.free_bytes(home.root)
    if free is not None and free < _LEAST_FREE_BYTES:
        least = f"at least {_LEAST_FREE_BYTES // 10**6} MB are needed"
        message = f"Only {free // 10**6} MB are free where {home.root} is; {least}."
        raise Refused(message, "Free some space, or use another --home.")
    network = filesystem.network_filesystem(home.root)
    if network is not None:
        found.append(f"The home {home.root} is on {network}: locks and saved files are less safe there. Better use a local --home.")
    synced = filesystem.synced_folder(home.root)
    if synced is not None:
        found.append(f"The home {home.root} is inside {synced}, which would upload every checkpoint. Better use another --home.")
    return found


class _Patience:
    """Says what is waited for, once, when it is not there after a moment."""

    def __init__(self, what: str, tell: Tell) -> None:
        self._what, self._tell, self._at = what, tell, time.monotonic() + _PATIENCE_SECONDS

    def is_tried(self) -> None:
        if self._what and time.monotonic() >= self._at:
            self._tell(self._what)
            self._what = ""


def start(home: Home, choice: Choice, tell: Tell = console.complain) -> tuple[Reading, str]:
    """Spawn a supervisor for `choice`; returns when the status shows it, with why it may end with this terminal, if it may. `tell` hears
    what is waited for when that takes a while.

    Raises AlreadyRunning, TrainerdError.
    """
    request, instance = send_start(home, choice)
    path = home.control / f"{request.id}.json"
    try:
        launched = launch.detached(home, instance, request.id)
    except OSError as error:
        requests.withdraw(path)
        raise TrainerdError(f"The supervisor could not be started: {error.strerror or error}.", remedy(error)) from None
    try:
        return _until_up(home, choice.run, instance, launched, tell), launched.tied
    finally:
        requests.withdraw(path)  # taken by now, or refused: it must not take effect later


def stop_without_supervisor(home: Home, run: str) -> Reading:
    """Have a run recorded as stopped that no supervisor watches, by one that lives for nothing else. Raises TrainerdError."""
    request = requests.Request("stop", uuid.uuid4().hex, {"run": run})
    try:
        path = requests.send(home, request)
        launched = launch.detached(home, request.instance, request.id)
    except OSError as error:
        raise TrainerdError(f"The home {home.root} cannot be written: {error.strerror or error}.", remedy(error)) from None
    try:
        code = launched.process.wait(_UP_SECONDS)
    except subprocess.TimeoutExpired:
        raise TrainerdError(f"The stop is not recorded after {_UP_SECONDS:g} seconds.", f"See {launched.early_log}") from None
    finally:
        requests.withdraw(path)
    if code != errors.EXIT_DONE:
        raise _died(home, code, launched)
    _forget(launched)
    return status.read(home)


def send_start(home: Home, choice: Choice) -> tuple[requests.Request, str]:
    """Write the request a new supervisor begins with; returns it and the instance it is meant for. Raises TrainerdError."""
    instance = uuid.uuid4().hex
    request = requests.Request("start", instance, choice.arguments())
    try:
        requests.send(home, request)
    except OSError as error:
        raise TrainerdError(f"The home {home.root} cannot be written: {error.strerror or error}.", "Name another with --home.") from None
    return request, instance


def _until_up(home: Home, run: str, instance: str, launched: launch.Launched, tell: Tell) -> Reading:
    deadline = time.monotonic() + _UP_SECONDS
    patience = _Patience(f"Waiting for the supervisor of {run} to come up.", tell)
    while True:
        ended = launched.process.poll()
        reading = status.read(home)
        if _shows(reading, run, instance) and (reading.alive or ended is not None):
            return _verdict_of(reading, launched) if ended is not None else reading
        if ended is not None:
            raise _died(home, ended, launched)
        if time.monotonic() >= deadline:
            raise TrainerdError(f"The supervisor is not up after {_UP_SECONDS:g} seconds.", f"See {launched.early_log}")
        patience.is_tried()
        time.sleep(_LOOK_SECONDS)


def _shows(reading: Reading, run: str, instance: str) -> bool:
    shown = reading.status
    return shown is not None and shown.run == run and shown.supervisor is not None and shown.supervisor.instance == instance


def _verdict_of(reading: Reading, launched: launch.Launched) -> Reading:
    """A supervisor that came up and is gone already: a failure is told as one."""
    if reading.state == status.COMPLETED:
        return reading
    _refuse_untrainable(reading)
    raise RunFailed(f"The run ended at once: {reading.state}. {reading.reason}", f"See {launched.early_log.parent}")


def _refuse_untrainable(reading: Reading) -> None:
    """A run that failed because it cannot be trained like this is a wrong word or a refusal. Raises UsageError, Refused."""
    wrong, _, words = ((reading.status.trainer.last_exit if reading.status else None) or "").partition(": ")
    if reading.state == status.FAILED and wrong in _OF_THE_TASK:
        raise UsageError(words)
    if reading.state == status.FAILED and wrong == Refused.__name__:
        raise Refused(words)


def _died(home: Home, code: int, launched: launch.Launched) -> TrainerdError:
    words = launched.last_words()
    if code == errors.EXIT_REFUSED:
        _forget(launched)
        reading = status.read(home)
        return already_running(home, reading) if reading.alive or not words else Refused(words.removeprefix("trainerd: "))
    message = words or f"it said nothing (exit code {code})"
    return TrainerdError(f"The supervisor could not start: {message}", f"See {launched.early_log}")


def _forget(launched: launch.Launched) -> None:
    try:
        launched.early_log.unlink()
    except OSError:
        pass  # a scanner holds it on Windows; the next start removes it


def until_checked(home: Home, reading: Reading, tell: Tell = console.complain) -> Reading:
    """Wait until the trainer has loaded the task file and said whether it can be trained; `tell` hears that when it takes a while.
    Raises UsageError, Refused, RunFailed."""
    deadline = time.monotonic() + _VERDICT_SECONDS
    patience = _Patience("Waiting for the trainer: it loads PyTorch and your task, and says whether that can be trained here.", tell)
    while time.monotonic() < deadline:
        reading = status.read(home)
        phase = reading.status.phase.name if reading.status and reading.status.phase else "starting"
        _refuse_untrainable(reading)
        if reading.state in (status.FAILED, status.CRASHED, status.UNREADABLE):
            raise RunFailed(f"{reading.state.capitalize()}: {reading.reason}", f"See {console.program()} logs")
        if reading.state in (*status.END_STATES, status.RUNNING, status.WAITING, status.PAUSED) or phase != "starting":
            return reading
        patience.is_tried()
        time.sleep(0.05)
    return reading


def until_end(home: Home, run: str, tell: Tell) -> Reading:
    """Wait for the run's end, however long; a supervisor that dies without a word is an end, too. `tell` hears when it stands still, and
    when it goes on."""
    standing: str | None = None
    while True:
        reading = status.read(home)
        if reading.status is not None and reading.status.run != run:
            return _as_recorded(home, run)
        if not reading.alive:
            return reading
        now = reading.state if reading.state in _STANDING else None
        if now is not None and now != standing:
            tell(f"{run} is {now}: {reading.reason} Waiting for it to go on.")
        elif standing is not None and reading.state == status.RUNNING:
            tell(f"{run} goes on.")
        standing = standing if reading.state == status.STARTING else now
        time.sleep(_END_LOOK_SECONDS)


def _as_recorded(home: Home, run: str) -> Reading:
    """How a run ended that the status is not about any more: another one was started since."""
    try:
        record = runs.read(home, run)
    except (OSError, Unreadable):
        return Reading(status.UNREADABLE, f"Another run was started, and the record of {run} cannot be read.", None, False)
    if record.outcome is None:
        return Reading(status.CRASHED, "Its supervisor ended without a word, and another run was started since.", None, False)
    return Reading(record.outcome, record.reason, None, False)
