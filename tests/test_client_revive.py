"""A supervisor that was killed is brought back by whoever looks next, exactly once, and only when its training is still wanted."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import revive
from tests.person import DOOR, FOR_LONG, OWN_TASK, Person
from tests.supervised import RUN, Daemon, wait_for
from trainerd.contract import files, lock, runs, status
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading

LONG = {"steps": 5000, "pause": 0.02}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture
def person(home: Home, tmp_path: Path) -> Iterator[Person]:
    someone = Person(home.root, tmp_path / "state")
    yield someone
    someone.leaves()


def supervisor_of(reading: Reading) -> tuple[int, str]:
    assert reading.status and reading.status.supervisor
    return reading.status.supervisor.pid, reading.status.supervisor.instance


def kill_the_supervisor(person: Person) -> str:
    """kill -9; returns the instance that is gone."""
    pid, instance = supervisor_of(person.sees())
    assert person.kills(pid)
    person.waits_for_state(status.CRASHED, seconds=10)
    return instance


def opened(person: Person, *words: str) -> subprocess.Popen[str]:
    """A monitor that prints lines."""
    command = [sys.executable, str(DOOR), "--home", str(person.home.root), "monitor", "--interval", "0.2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=person.environment)


def starts(person: Person) -> int:
    return sum(event["kind"] in ("started", "resumed") for event in person.events())


def test_whoever_looks_brings_it_back_once_and_the_training_goes_on(person: Person, home: Home, tmp_path: Path) -> None:
    """kill -9: `status` and `monitor --once` only tell; of two monitors opened at once one supervisor comes, said in one line."""
    task = tmp_path / "mine.py"
    task.write_text(OWN_TASK, encoding="utf-8")
    person.starts("--task", f"{task}:Mine", *FOR_LONG, "--set", "polite.priority=normal", "--set", "train.threads=1")
    person.waits_for_step(2)
    gone = kill_the_supervisor(person)
    told = person.types("status")
    assert told.returncode == 4 and "CRASHED" in told.stdout and "resume" in told.stdout
    assert person.types("monitor", "--once").returncode == 4 and person.types("monitor", "--no-revive").returncode == 4
    assert not lock.is_held(home.supervisor_lock) and starts(person) == 1
    monitors = [opened(person), opened(person)]
    try:
        reading = person.waits_for(lambda r: r.alive and r.status and supervisor_of(r)[1] != gone, 60, "another supervisor")
        back = supervisor_of(reading)
        wait_for(lambda: all(m.stdout and "running" in m.stdout.readline() for m in monitors), 60, "both monitors to see it run")
        step = reading.status.progress.step or 0 if reading.status else 0
        person.waits_for(lambda r: r.status and (r.status.progress.step or 0) > step, 60, "another step")
        assert supervisor_of(person.sees()) == back and starts(person) == 2 and len(runs.names(home)) == 1
    finally:
        for monitor in monitors:
            monitor.terminate()
    said = sorted(monitor.communicate()[1] for monitor in monitors)
    assert said[0] == "" and said[1].startswith("The supervisor was gone since ") and said[1].endswith("; started it again.\n"), said
    assert list(home.control.glob("*.json")) == []


def test_the_menu_brings_it_back_and_so_does_a_boot_after_the_system_ended_it(person: Person, home: Home, tmp_path: Path) -> None:
    """One line before the choices. A shutdown ends the processes by a signal: the same boot leaves it so, the next goes on."""
    task = tmp_path / "mine.py"
    task.write_text(OWN_TASK, encoding="utf-8")
    person.starts("--task", f"{task}:Mine", *FOR_LONG)
    kill_the_supervisor(person)
    assert "started it again" not in person.types("menu", "--no-revive", given="9\n").stdout and not person.sees().alive
    done = person.types("menu", given="9\n")
    assert done.stdout.startswith("The supervisor was gone since ") and "started it again" in done.stdout and person.sees().alive
    os.kill(supervisor_of(person.sees())[0], signal.SIGTERM)
    person.waits_for_state(status.STOPPED, seconds=30)
    person.waits_until_gone()
    assert revive.revive(home) == "" and not lock.is_held(home.supervisor_lock)
    document = json.loads(home.status.read_text("utf-8"))
    files.write_json(home.status, {**document, "boot_id": "the boot before"})
    assert "started it again" in person.types("menu", given="9\n").stdout and person.sees().alive


@pytest.mark.parametrize("how", ["stopped", "paused", "stop asked", "failed"])
def test_what_a_person_ended_or_what_failed_stays_so(person: Person, home: Home, how: str) -> None:
    """Not after a stop, not after a pause whose supervisor was killed, not when it was killed while stopping, not after a failure."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        if how in ("stopped", "paused"):
            assert person.types("stop" if how == "stopped" else "pause").returncode == 0
    record = runs.read(home, RUN)
    if how == "stop asked":
        record.wanted = runs.WANTED_STOPPED
    if how == "failed":
        record.outcome = "failed"
    runs.write(home, record)
    before = home.status.read_bytes()
    done = person.types("menu", given="9\n")
    assert done.returncode == 0 and "supervisor was gone" not in done.stdout
    assert not lock.is_held(home.supervisor_lock) and home.status.read_bytes() == before


def test_a_stop_that_comes_first_wins(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at once more under the lock: a run that is no longer wanted when the new supervisor holds it is left alone, silently."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
    missed = runs.read(home, RUN)
    runs.write(home, dataclasses.replace(missed, wanted=runs.WANTED_STOPPED))
    monkeypatch.setattr(revive, "_missed", lambda *_: missed)
    before = home.status.read_bytes()
    assert revive.revive(home) == ""
    assert not lock.is_held(home.supervisor_lock) and runs.read(home, RUN).wanted == runs.WANTED_STOPPED
    assert home.status.read_bytes() == before


def test_what_stands_in_the_way_is_said(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: one sentence with the reason, and whoever looks goes on looking."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
    monkeypatch.setattr("trainerd.machine.filesystem.free_bytes", lambda _: 5_000_000)
    told = revive.revive(home)
    assert told.startswith("The supervisor was gone since ") and "could not be started again: Only 5 MB are free" in told
