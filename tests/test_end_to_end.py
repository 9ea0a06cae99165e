"""The whole thread on the real engine: start, train, checkpoint, kill, resume, status, stop. As a person would see it."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.person import SMALL, Person, own_task
from trainerd.contract import status


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Person:
    """R: the run nobody disturbs. Everything else must equal it to the bit."""
    someone = Person(tmp_path_factory.mktemp("uninterrupted") / "home")
    someone.starts(*SMALL, "--name", "small")
    reading = someone.waits_for_state(*status.END_STATES)
    assert reading.state == status.COMPLETED, f"{reading.reason}\n{someone.log()}"
    someone.waits_until_gone()
    return someone


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    someone = Person(tmp_path / "home")
    yield someone
    someone.leaves()


@pytest.fixture
def prepared(person: Person, uninterrupted: Person) -> Person:
    """Somebody whose data are prepared already: as R prepared them, which would be a quarter of each run."""
    shutil.copytree(uninterrupted.home.cache, person.home.cache)
    return person


def _is_training(reading: status.Reading) -> bool:
    phase = reading.status.phase if reading.status else None
    return reading.state in status.END_STATES or (reading.state == status.RUNNING and phase is not None and phase.name == "training")


def test_a_run_that_nobody_disturbs_completes_and_is_usable(uninterrupted: Person) -> None:
    """Start it once, and it finishes: completed, each step once, a model that answers, nothing left running."""
    done = uninterrupted.types("status")
    assert done.returncode == 0 and "completed" in done.stdout.lower()
    steps = [step for step, _ in uninterrupted.steps()]
    assert steps == list(range(1, len(steps) + 1))
    answer = uninterrupted.types("suggest", "--model", str(uninterrupted.home.run("small").model), "s")
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


def test_kills_of_trainer_and_supervisor_change_no_bit(uninterrupted: Person, prepared: Person) -> None:
    """kill -9 of the trainer and of the supervisor at random moments: same weights, same losses, each step once."""
    person, moments = prepared, random.Random(7)
    kills = 0
    person.starts(*SMALL, "--name", "small")
    for victim in ("trainer", "supervisor", "trainer", "trainer"):
        reading = person.waits_for(_is_training, 60, "training")
        if reading.state in status.END_STATES:
            break
        assert reading.status
        kills += 1
        time.sleep(moments.random() * 0.7)  # not for readiness: the kill must land anywhere
        if victim == "trainer":
            before = reading.status.trainer.restarts
            if person.kills(reading.status.trainer.pid):
                person.waits_for(
                    lambda r, n=before: r.state in status.END_STATES or (r.status and r.status.trainer.restarts > n), 60, "a restart"
                )
        else:
            assert reading.status.supervisor
            person.kills(reading.status.supervisor.pid)
            person.waits_for(lambda r: not r.alive, 10, "the supervisor's end")
            assert person.types("status").returncode in (0, 4)
            person.starts(*SMALL, "--name", "small")
    reading = person.waits_for_state(*status.END_STATES)
    assert reading.state == status.COMPLETED, f"{reading.reason}\n{person.log()}"
    assert kills == 4, "the run was over before all the kills had been made"
    assert person.steps("small") == uninterrupted.steps("small")
    assert person.weights("small") == uninterrupted.weights("small")
    person.waits_until_gone()


def test_after_a_pause_and_a_stop_it_goes_on_exactly(uninterrupted: Person, prepared: Person) -> None:
    """pause commits and lets the trainer go; resume brings it back. stop: a checkpoint of this very step, everything gone within 5 s,
    exit 3 from status; start resumes the same run. The result is that of an uninterrupted run."""
    person = prepared
    person.starts(*SMALL, "--name", "small")
    person.waits_for_step(40)
    assert person.types("pause").returncode == 0
    reading = person.sees()
    assert reading.state == status.PAUSED and reading.status and reading.status.trainer.pid is None
    assert person.types("status").returncode == 0
    assert person.types("resume").returncode == 0
    person.waits_for_step(person.steps("small")[-1][0] + 20)
    since = time.monotonic()
    done = person.types("stop")
    took = time.monotonic() - since
    assert done.returncode == 0, done.stdout + done.stderr
    person.waits_until_gone(1)
    reading = person.sees()
    assert reading.state == status.STOPPED and reading.status and reading.status.checkpoint
    assert reading.status.checkpoint.step == person.steps("small")[-1][0]
    assert person.types("status").returncode == 3 and person.types("stop").returncode == 3
    assert took < 15, f"stop took {took:.1f} s"  # a busy test machine; the 5 s of the promise are measured in the log
    person.starts(*SMALL, "--name", "small")
    reading = person.waits_for_state(*status.END_STATES)
    assert reading.state == status.COMPLETED, reading.reason
    assert person.steps("small") == uninterrupted.steps("small")
    assert person.weights("small") == uninterrupted.weights("small")


def test_a_second_start_is_refused_with_what_to_do(person: Person) -> None:
    """start while running: exit 5, and the message says what to do; the training goes on."""
    person.starts(*SMALL)
    second = person.types("start", *SMALL)
    assert second.returncode == 5 and "stop" in second.stdout + second.stderr
    assert person.sees().alive


def test_two_homes_on_one_device_take_turns(tmp_path: Path) -> None:
    """A second home on the same device waits and says so; when the first is done it goes on by itself."""
    shared_state = tmp_path / "state"
    first, second = Person(tmp_path / "first", shared_state), Person(tmp_path / "second", shared_state)
    try:
        first.starts(*own_task(tmp_path))
        first.waits_for_step(1)
        second.starts(*own_task(tmp_path))
        reading = second.waits_for_state(status.WAITING)
        assert str(first.home.root) in reading.reason or "another" in reading.reason.lower()
        assert first.types("stop").returncode == 0
        second.waits_for_step(1)
    finally:
        first.leaves()
        second.leaves()


def test_a_damaged_status_is_said_and_kept(uninterrupted: Person, tmp_path: Path) -> None:
    """Garbage in training_status.json: status says so with exit 4; the next start keeps the file aside."""
    someone = Person(tmp_path / "home")
    shutil.copytree(uninterrupted.home.root, someone.home.root, dirs_exist_ok=True)
    someone.home.status.write_bytes(b"\x00garbage{")
    done = someone.types("status")
    assert done.returncode == 4 and "Traceback" not in done.stdout + done.stderr and "damaged" in done.stdout + done.stderr
    try:
        someone.starts(*SMALL, "--name", "again")
        assert [p.read_bytes() for p in someone.home.root.glob("training_status.json.corrupt*")] == [b"\x00garbage{"]
    finally:
        someone.leaves()
