"""`start --wait`: it says when the run stands still, and returns the run's own result, whatever becomes of it and whoever ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import follow, view
from tests.person import DOOR, SMALL, Person
from tests.supervised import wait_for
from trainerd.contract import runs, status
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading, Status, SupervisorInfo


@pytest.fixture
def person(tmp_path: Path) -> Any:
    found = Person(tmp_path / "home")
    yield found
    found.leaves()


def test_who_waits_hears_of_a_pause_and_of_a_stop_by_somebody_else(person: Person) -> None:
    """While it is paused, that is said beside the output and nothing is printed in a loop; a stop ends the waiting with 3 and what to
    type. A second start meanwhile is refused with 5 and leads to another home than this one."""
    words = [sys.executable, str(DOOR), "--home", str(person.home.root), "start", *SMALL, "--epochs", "500", "--wait", "--json"]
    waiting = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=person.environment)
    person.waits_for_step(3)
    second = person.types("start", *SMALL, "--wait")
    assert second.returncode == 5 and "is already in" in second.stderr and " --home ANOTHER_FOLDER start" in second.stderr
    assert " --home ANOTHER_FOLDER start --epochs 12 --dataset-size 2000 --set train.batch_size=64 " in second.stderr, "what was asked for"
    assert second.stderr.count("--home") == 3 and len(second.stderr.splitlines()) == 4, "once for each hint, a line each"
    assert person.types("pause").returncode == 0
    person.waits_for_state(status.PAUSED)
    assert person.types("resume").returncode == 0
    person.waits_for_state(status.RUNNING)
    assert waiting.poll() is None
    assert person.types("stop").returncode == 0
    said, beside = waiting.communicate(timeout=60)
    assert waiting.returncode == 3 and json.loads(said)["state"] == status.STOPPED
    assert beside.count("is paused: Paused at step") == 1 and "Waiting for it to go on." in beside, beside


@pytest.fixture
def alive(home: Home) -> Iterator[FileLock]:
    """A supervisor's lock, held."""
    held = FileLock(home.supervisor_lock)
    assert held.acquire()
    yield held
    held.release()


def shown(home: Home, run: str, state: str, reason: str = "") -> None:
    """What a supervisor of this process writes."""
    status.write(home, Status(run=run, state=state, reason=reason, supervisor=SupervisorInfo(os.getpid(), "one", 1.0)))


def waited(home: Home, then: Callable[[list[str]], None]) -> tuple[Reading, list[str]]:
    """The end of the run "mine", and what was said meanwhile; `then` is what happens while somebody waits."""
    said: list[str] = []
    found: list[Reading] = []
    thread = threading.Thread(target=lambda: found.append(follow.until_end(home, "mine", said.append)), daemon=True)
    thread.start()
    then(said)
    thread.join(10)
    assert found, "it is still waited for"
    return found[0], said


def test_standing_still_is_said_once_each_time(home: Home, alive: FileLock, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the GPU, then paused, then on: a word each, however often one looks, and whatever else the reason says meanwhile."""
    looks: list[Reading] = []
    monkeypatch.setattr(follow, "_END_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(follow.status, "read", lambda home, read=status.read: looks.append(read(home)) or looks[-1])

    def then(said: list[str]) -> None:
        shown(home, "mine", status.WAITING, "Waiting for the GPU: another home is using it.")
        wait_for(lambda: len(said) == 1, 5, "the first word")
        shown(home, "mine", status.WAITING, "Waiting for the GPU: still.")
        wait_for(lambda: sum("still" in look.reason for look in looks) > 3, 5, "a few looks")
        shown(home, "mine", status.PAUSED, "Paused at step 7.")
        wait_for(lambda: len(said) == 2, 5, "the second word")
        shown(home, "mine", status.STARTING)
        shown(home, "mine", status.RUNNING)
        wait_for(lambda: len(said) == 3, 5, "the third word")
        shown(home, "mine", status.COMPLETED, "Done.")
        alive.release()

    shown(home, "mine", status.RUNNING)
    reading, said = waited(home, then)
    assert reading.state == status.COMPLETED and view.result_code(reading) == 0
    assert [text.split(":")[0] for text in said] == ["mine is waiting", "mine is paused", "mine goes on."]


@pytest.mark.parametrize(
    ("outcome", "state", "code"),
    [("stopped", status.STOPPED, 3), ("completed", status.COMPLETED, 0), ("failed", status.FAILED, 4), (None, status.CRASHED, 4)],
)
def test_another_runs_end_is_not_this_ones(home: Home, alive: FileLock, outcome: str | None, state: str, code: int) -> None:
    """Ended between two looks, and another run is trained: its own result, from its record, at once."""
    runs.write(home, runs.RunRecord("mine", "cadence", 1.0, {"task": "cadence"}, {}, outcome=outcome, reason="As recorded."))
    shown(home, "mine", status.RUNNING)
    reading, said = waited(home, lambda said: shown(home, "another", status.RUNNING))
    assert (reading.state, view.result_code(reading), said) == (state, code, [])
    assert outcome is None or "As recorded." in view.summary(reading)
    home.run("mine").record.write_text("{", "utf-8")
    assert view.result_code(follow.until_end(home, "mine", said.append)) == 4


@pytest.mark.parametrize(
    ("state", "code", "next_words"),
    [(status.RUNNING, 4, "Go on"), (status.PAUSED, 3, "p resume"), (status.FAILED, 4, "p logs"), (status.STOPPED, 3, "p resume")],
)
def test_without_a_supervisor_it_is_over(home: Home, state: str, code: int, next_words: str) -> None:
    """Killed while it trained: crashed; while it was paused: no result either. Each says what to type."""
    shown(home, "mine", state, "As it was.")
    reading = follow.until_end(home, "mine", lambda text: None)
    assert view.result_code(reading) == code and any(next_words in line for line in view.what_next(reading, "p"))
