"""`start --wait`: it says when the run stands still, and returns the run's own result, whatever becomes of it and whoever ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import follow, launch, view
from client.commands import start
from tests.person import DOOR, SMALL, Person, own_task
from tests.supervised import wait_for
from trainerd.config.load import resolve
from trainerd.contract import runs, status
from trainerd.contract.errors import Refused, RunFailed, UsageError
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading, Status, SupervisorInfo


@pytest.fixture
def person(tmp_path: Path) -> Any:
    found = Person(tmp_path / "home")
    yield found
    found.leaves()


def test_who_waits_hears_of_a_pause_and_of_a_stop_by_somebody_else(person: Person, tmp_path: Path) -> None:
    """While it is paused, that is said beside the output and nothing is printed in a loop; a stop ends the waiting with 3 and what to
    type. A second start meanwhile is refused with 5 and leads to another home than this one."""
    words = [sys.executable, str(DOOR), "--home", str(person.home.root), "start", *own_task(tmp_path), "--wait", "--json"]
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


def test_what_takes_a_while_is_named_once(home: Home, alive: FileLock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The supervisor that is not up yet, and the trainer that has not looked at the task: a word each, and no more of what is there."""
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        shown(home, "mine", status.RUNNING)

    never = launch.Launched(SimpleNamespace(poll=lambda: None), tmp_path / "early.log")  # type: ignore[arg-type]
    monkeypatch.setattr(follow, "_UP_SECONDS", 20.0)
    monkeypatch.setattr(follow, "_VERDICT_SECONDS", 20.0)
    for patience, expected in ((0.0, 1), (60.0, 0)):
        monkeypatch.setattr(follow, "_PATIENCE_SECONDS", patience)
        for what in ("supervisor", "trainer"):
            said.clear()
            shown(home, "mine", status.STARTING) if what == "trainer" else shown(home, "another", status.RUNNING)
            if not expected:
                shown(home, "mine", status.RUNNING)
            if what == "supervisor":
                reading = follow._until_up(home, "mine", "one", never, tell)
            else:
                reading = follow.until_checked(home, status.read(home), tell)
            assert reading.state == status.RUNNING and len(said) == expected, said
            assert all(text.startswith("Waiting for the") and what in text for text in said), said


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("is_held", [True, False])
def test_a_run_that_is_over_at_once_is_not_called_under_way(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wait: bool, is_held: bool
) -> None:
    """Its result is said, once, and what to type; not that this window waits, nor that something goes on in the background."""
    reading = Reading(status.COMPLETED, "Completed. The model is in models/mine.", Status(run="mine", task="cadence"), is_held)
    monkeypatch.setattr(follow, "start", lambda *_: (reading, ""))
    monkeypatch.setattr(follow, "until_end", lambda *_: replace(reading, alive=False))
    monkeypatch.setattr(start.registration, "begun", lambda *_, **__: "")
    choice = SimpleNamespace(warnings=[], told="", config=resolve("cadence").config, run="mine", task_file=None, resume=False, changes=[])
    assert start.begin(home, choice, [], wait, as_json=False) == 0  # type: ignore[arg-type]
    told = capsys.readouterr().out
    assert told.count("Completed. The model is in models/mine.") == 1 and "suggest PREFIX" in told, told
    assert "waits for its end" not in told and "in the background" not in told and "End:" not in told, told


def test_what_cannot_be_trained_ends_alike_however_late_one_looks(home: Home, tmp_path: Path) -> None:
    """Refused as too large before `start` has looked for the first time, on a busy machine: exit 5, as if it had been seen to come."""
    gone = launch.Launched(SimpleNamespace(poll=lambda: 4), tmp_path / "early.log")  # type: ignore[arg-type]
    for how, kind in (("Refused: It does not fit.", Refused), ("UsageError: No such column.", UsageError), ("exit code 1", RunFailed)):
        failed = Status(run="mine", state=status.FAILED, reason="It failed.", supervisor=SupervisorInfo(1, "one", 1.0))
        failed.trainer.last_exit = how
        status.write(home, failed)
        with pytest.raises(kind):
            follow._until_up(home, "mine", "one", gone, lambda text: None)


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
