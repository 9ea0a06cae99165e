"""Asks the live supervisor for something and waits until it is visible in the status. Must not act on files other than the request's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainerd.contract import lock, requests, status
from trainerd.contract.errors import NothingRunning, Refused, TrainerdError, remedy
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading, RequestOutcome

from . import console, stuck, view, words

_LOOK_SECONDS = 0.05
_APPEAR_SECONDS = 5.0
GOES_ON = (status.STARTING, status.RUNNING, status.WAITING, status.RECOVERING, *status.END_STATES)
RESTS = (status.PAUSED, *status.END_STATES)
_EFFECTS = {"resume": GOES_ON, "pause": RESTS}
_STANDS = {
    status.COMPLETED: "{} is completed",
    status.STOPPED: "{} is stopped",
    status.FAILED: "{} has failed",
    status.CRASHED: "{} has crashed",
    status.PAUSED: "{} is paused, and its supervisor has ended",
    status.UNREADABLE: "The status of the last run cannot be read",
}


@dataclass
class Asked:
    """One request on its way."""

    verb: str
    id: str
    path: Path
    at: float = field(default_factory=time.monotonic)

    def answer(self, reading: Reading) -> RequestOutcome | None:
        """The supervisor's answer, None while there is none. Raises Refused."""
        answers = reading.status.requests if reading.status else []
        found = next((answer for answer in answers if answer.id == self.id), None)
        if found is not None and found.outcome.startswith("refused"):
            reason = found.outcome.removeprefix("refused").lstrip(": ")
            message = f"{self.verb} was refused: {reason or 'no reason was given'}"
            raise Refused(message, f"`{console.program()} status` tells how it stands.")
        return found

    def is_done(self, reading: Reading) -> bool | None:
        """Whether the answer is there and has taken effect; None while there is no answer. Raises Refused."""
        answer = self.answer(reading)
        if self.verb == "stop" and not reading.alive:
            return True
        return None if answer is None else answer.outcome == "done" or reading.state in _EFFECTS.get(self.verb, ())

    def withdraw(self) -> None:
        """Take it back, so that it does not take effect after everybody stopped waiting."""
        requests.withdraw(self.path)


def live(home: Home) -> Reading:
    """The status of a live supervisor, waiting a moment for one that is just starting. Raises NothingRunning, TrainerdError."""
    deadline = time.monotonic() + _APPEAR_SECONDS
    while True:
        reading = status.read(home)
        if not reading.alive:
            lock.is_held(home.supervisor_lock)  # raises when the lock itself is what is wrong
            raise nothing_running(home, reading)
        if reading.status is not None and reading.status.supervisor is not None:
            return reading
        if time.monotonic() >= deadline:
            held = replace(reading, holder=lock.holder(home.supervisor_lock))
            message = f"A supervisor holds {home.root} and writes no readable status. {reading.reason}"
            raise TrainerdError(message, stuck.remedy(held, console.program()))
        time.sleep(_LOOK_SECONDS)


def nothing_running(home: Home, reading: Reading) -> NothingRunning:
    """That there is nobody to ask, with how it stands and what to do."""
    run = f"The run {words.clean(reading.status.run)}" if reading.status and reading.status.run else "The last run"
    stands = f" {_STANDS[reading.state].format(run)}." if reading.state in _STANDS else ""
    hints = view.what_next(reading, console.program()) or [f"See what there is with: {console.program()} runs"]
    return NothingRunning(f"Nothing is running in {home.root}.{stands}", "\n".join(hints))


def send(home: Home, reading: Reading, verb: str, arguments: Mapping[str, Any] | None = None) -> Asked:
    """Put the request where the supervisor of `reading` finds it. Raises TrainerdError when it cannot be written."""
    supervisor = reading.status.supervisor if reading.status else None
    if supervisor is None:
        raise nothing_running(home, reading)
    request = requests.Request(verb, supervisor.instance, dict(arguments or {}))
    try:
        return Asked(verb, request.id, requests.send(home, request))
    except OSError as error:
        message = f"The request could not be written into {home.control}: {error.strerror or error}."
        raise TrainerdError(message, remedy(error)) from None


def until(home: Home, asked: Asked, reached: Callable[[Reading], bool], timeout_seconds: float, hint: str) -> Reading:
    """Wait for the answer and then for its effect. Raises Refused, or TrainerdError when the time is up."""
    deadline = time.monotonic() + timeout_seconds
    answered = False
    while True:
        reading = status.read(home)
        answered = answered or asked.answer(reading) is not None
        # A supervisor that ends may answer and leave between two looks: then the effect speaks.
        if (answered or not reading.alive) and reached(reading):
            return reading
        if not reading.alive:
            asked.withdraw()
            message = f"The supervisor ended while asked to {asked.verb}: {reading.state}. {reading.reason}"
            raise TrainerdError(message, f"`{console.program()} logs` tells why.")
        if time.monotonic() >= deadline:
            asked.withdraw()
            what = "has not done it" if answered else "did not answer"
            message = f"{asked.verb}: the supervisor {what} within {timeout_seconds:g} seconds ({reading.state})."
            raise TrainerdError(message, _hint(reading, hint))
        time.sleep(_LOOK_SECONDS)


def _hint(reading: Reading, hint: str) -> str:
    """A supervisor that does not answer is not asked again: that would only go round in a circle."""
    return stuck.remedy(reading, console.program()) if reading.state == status.NOT_ANSWERING else hint
