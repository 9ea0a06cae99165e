"""A real supervisor over the fake trainer, for tests. Must not reach into the supervisor: it sees what a client sees."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from trainerd.contract import interpreter, lock, requests, status
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading
from trainerd.supervisor import opening
from trainerd.supervisor.loop import Supervisor, Timing

FAKE = str(Path(__file__).with_name("fake_trainer.py"))
QUICK = Timing(
    tick_seconds=0.05,
    backoff_seconds=0.02,
    device_seconds=0.05,
    room_seconds=0.3,
    lacking_seconds=0.05,
    leave_seconds=0.5,
    leave_now_seconds=0.3,
    hung_seconds=0.5,
    unkillable_seconds=3.0,
)
RUN = "fake-1"
# A limit is for what never comes; a busy machine or a slow disk is no such thing.
_PATIENCE = 4
# Under Wine a look at the files costs as much as a step of what is looked at.
_LOOK_SECONDS = 0.1 if sys.platform == "win32" else 0.02
_OWN_HIDDEN_CONSOLE = getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


def trainer_command(*scripts: dict[str, Any]) -> list[str]:
    """The fake trainer with one script for each of its starts; the last one serves all later ones."""
    return [sys.executable, FAKE, *map(json.dumps, scripts or ({},))]


def start_arguments(**more: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"run": RUN, "resume": False, "config": {"task": "fake", "seed": 1}, "identity": {"task": "fake"}, **more}
    # Not idle by default, or a fake trainer would wait for every test beside it.
    if isinstance(arguments["config"], dict):
        arguments["config"] = {"polite": {"priority": "normal"}, **arguments["config"]}
    return arguments


def supervise_here(home: Home, *scripts: dict[str, Any], timing: Timing = QUICK, **arguments: Any) -> Supervisor:
    """Run a supervisor inside this process until it ends; returns it."""
    home.root.mkdir(parents=True, exist_ok=True)
    start = opening.open_run(home, start_arguments(**arguments))
    supervisor = Supervisor(home, uuid.uuid4().hex, start, command=trainer_command(*scripts), timing=timing)
    supervisor.run()
    return supervisor


class Daemon:
    """`python -m trainerd.supervisor` in a session of its own."""

    def __init__(self, home: Home, *scripts: dict[str, Any], options: Sequence[str] = (), **arguments: Any) -> None:
        self.home = home
        self.instance = uuid.uuid4().hex
        request = requests.Request("start", self.instance, start_arguments(**arguments))
        requests.send(home, request)
        command = interpreter.command("trainerd.supervisor", "--home", str(home.root), "--instance", self.instance, "--request", request.id)
        command += ["--trainer-command", json.dumps(trainer_command(*scripts)), *options]
        self.errors = home.root / f"errors-{self.instance}.txt"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=interpreter.environment(),
                start_new_session=True,
                creationflags=_OWN_HIDDEN_CONSOLE,
            )

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            if sys.platform != "win32":
                os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
        self.process.wait(60)
        if self.home.trainer_lock.exists():
            wait_for(lambda: not lock.is_held(self.home.trainer_lock), 10, "a trainer outlives its supervisor")

    def reading(self) -> Reading:
        return status.read(self.home)

    def until(self, condition: Callable[[Reading], object], seconds: float = 15.0) -> Reading:
        """The first reading that satisfies the condition."""
        found: list[Reading] = []

        def look() -> bool:
            found.append(self.reading())
            return bool(condition(found[-1]))

        try:
            wait_for(look, seconds, "the status")
        except AssertionError as error:
            raise AssertionError(f"{error}; last: {found[-1]}; stderr: {self.errors.read_text('utf-8')}") from None
        return found[-1]

    def until_state(self, *states: str, seconds: float = 15.0) -> Reading:
        return self.until(lambda reading: reading.state in states, seconds)

    def until_step(self, step: int, seconds: float = 15.0) -> Reading:
        return self.until(lambda r: r.status is not None and (r.status.progress.step or 0) >= step and r.state == status.RUNNING, seconds)

    def ask(self, verb: str, **arguments: Any) -> str:
        """Send a request; returns its id."""
        request = requests.Request(verb, self.instance, arguments)
        requests.send(self.home, request)
        return request.id

    def outcome(self, ident: str, seconds: float = 10.0) -> str:
        """What became of a request."""
        reading = self.until(lambda r: r.status is not None and any(q.id == ident for q in r.status.requests), seconds)
        assert reading.status is not None
        return next(q.outcome for q in reading.status.requests if q.id == ident)


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + _PATIENCE * seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(_LOOK_SECONDS)


def starts(home: Home, run: str = RUN) -> list[tuple[float, int, str]]:
    """(when, pid, before step) of every start of the fake trainer; none before the first one has said so."""
    told = home.run(run).folder / "starts.txt"
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    return [(float(when), int(pid), before) for when, pid, before in (line.split() for line in lines)]


def journal(home: Home) -> list[dict[str, Any]]:
    """events.jsonl of the run."""
    return [json.loads(line) for line in home.run(RUN).events.read_text(encoding="utf-8").splitlines()]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie is dead."""
    if sys.platform == "win32":
        return psutil.pid_exists(pid)
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
