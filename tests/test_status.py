"""training_status.json: round trip, the frozen file of schema 1, what a reader concludes, and garbage of every kind."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import ask, glance, view
from trainerd.contract import clock, files, status
from trainerd.contract.errors import TrainerdError
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading, Status

FROZEN = Path(__file__).with_name("data") / "status_schema1.json"
DOCUMENT = json.loads(FROZEN.read_text(encoding="utf-8"))


@pytest.fixture
def alive(home: Home) -> Iterator[FileLock]:
    """A supervisor's lock, held."""
    held = FileLock(home.supervisor_lock)
    assert held.acquire()
    yield held
    held.release()


def frozen() -> Status:
    return status.from_dict(DOCUMENT)


def test_the_frozen_file_of_schema_1_reads_for_ever() -> None:
    """What an earlier release wrote is read whole; what a later one adds is ignored."""
    read = frozen()
    written = read.to_dict()

    def held(document: dict[str, Any], by: dict[str, Any]) -> None:
        for key, value in document.items():
            if key == "a_key_of_a_later_release":
                assert key not in by
            elif isinstance(value, dict) and isinstance(by[key], dict):
                held(value, by[key])
            else:
                assert by[key] == value, key

    held(DOCUMENT, written)
    assert status.from_dict(written) == read


def test_what_is_written_is_read_back(home: Home, alive: FileLock) -> None:
    """write() stamps the clocks; read() gives the same document, live."""
    before = frozen()
    status.write(home, before)
    reading = status.read(home)
    assert (reading.state, reading.alive, reading.status) == ("running", True, before)
    assert reading.to_dict()["alive"] is True and abs(before.updated_at - time.time()) < 60


def _nothing(home: Home) -> None: ...


def _dead_while_running(home: Home) -> None:
    status.write(home, frozen())


def _completed(home: Home) -> None:
    ended = frozen()
    ended.state, ended.reason = status.COMPLETED, "Done."
    status.write(home, ended)


def _garbage(home: Home) -> None:
    home.status.write_bytes(b"\x00\xff{")


def _newer(home: Home) -> None:
    files.write_json(home.status, {**DOCUMENT, "schema": 2})


def _unknown_state(home: Home) -> None:
    files.write_json(home.status, {**DOCUMENT, "state": "meditating"})


def _folder(home: Home) -> None:
    home.status.mkdir()


@pytest.mark.parametrize(
    ("make", "state", "code"),
    [
        (_nothing, status.NEVER_STARTED, 3),
        (_dead_while_running, status.CRASHED, 4),
        (_completed, status.COMPLETED, 0),
        (_garbage, status.UNREADABLE, 4),
        (_newer, status.UNREADABLE, 4),
        (_unknown_state, status.UNREADABLE, 4),
        (_folder, status.UNREADABLE, 4),
    ],
)
def test_what_a_reader_concludes_without_a_supervisor(home: Home, make: Callable[[Home], None], state: str, code: int) -> None:
    """A live state without the lock is crashed; damage is said, never raised; the exit code follows."""
    make(home)
    reading = status.read(home)
    assert reading.state == state and reading.reason and not reading.alive
    assert view.exit_code(reading) == code


def test_what_a_reader_concludes_of_a_silent_supervisor(home: Home, alive: FileLock) -> None:
    """A held lock with an old status is not answering, by the monotonic clock of this boot only; with none, it is starting."""
    assert status.read(home).state == status.STARTING
    ours = {**DOCUMENT["supervisor"], "pid": os.getpid()}
    old = {**DOCUMENT, "supervisor": ours, "updated_monotonic": clock.monotonic() - 60, "boot_id": clock.boot_id()}
    files.write_json(home.status, old)
    reading = status.read(home)
    assert reading.state == status.NOT_ANSWERING and "60 seconds" in reading.reason and view.exit_code(reading) == 4
    files.write_json(home.status, {**old, "boot_id": "another boot"})
    assert status.read(home).state == "running"


def test_between_its_lock_and_its_first_status_a_supervisor_is_starting(
    home: Home, alive: FileLock, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is still the dead one's: none of its numbers is shown, and nobody asks it. One that keeps silent after that is not
    starting for ever; and what cannot be told (a lock that was not signed, a status younger than the lock) is as it stands there."""
    before = frozen()
    status.write(home, before)
    os.utime(home.supervisor_lock, (before.updated_at + 1,) * 2)
    reading = status.read(home)
    assert (reading.state, reading.status, reading.alive) == (status.STARTING, None, True)
    assert glance.show(home, False) == 0
    shown = capsys.readouterr().out
    assert "STARTING" in shown and "226" not in shown and "4.812" not in shown
    monkeypatch.setattr(ask, "_APPEAR_SECONDS", 0.05)
    with pytest.raises(TrainerdError, match="writes no readable status"):
        ask.live(home)
    before.supervisor = status.SupervisorInfo(os.getpid(), "new", 0.0)
    status.write(home, before)
    assert status.read(home).state == "running"
    before.supervisor.pid += 1
    for at, state in ((clock.wall() - 3600, "running"), (clock.wall() + 1, status.STARTING)):
        status.write(home, before)
        os.utime(home.supervisor_lock, (at, at))
        assert status.read(home).state == state
    old = {**before.to_dict(), "updated_at": clock.wall() - 100, "updated_monotonic": clock.monotonic() - 100}
    files.write_json(home.status, old)
    os.utime(home.supervisor_lock, (clock.wall() - 40,) * 2)
    assert status.read(home).state == status.NOT_ANSWERING
    home.supervisor_lock.write_bytes(b"")
    assert status.read(home).state == status.NOT_ANSWERING


def test_unknown_is_not_zero() -> None:
    """What nobody knows yet is left out of the report, never shown as 0."""
    report = "\n".join(view.lines(Reading("starting", "Starting.", Status(run="r"), True), 0.0, True, "trainerd"))
    assert "0" not in report and "None" not in report and "n/a" not in report


def test_the_report_says_what_a_person_asks() -> None:
    """State and reason, what is trained, progress bar, loss, speed, ETA, memory against limits, checkpoint age, restarts, warnings."""
    now = DOCUMENT["checkpoint"]["at"] + 12
    report = "\n".join(view.lines(Reading("running", "Training.", frozen(), True), now, True, "trainerd"))
    for words in (
        "RUNNING", "Training.", "cadence · preset quick", "10 blank", "48.3 %", "step 226 of 468", "epoch 2 of 3", "4.812", "812 samples/s",
        "1 min 20 s", "RAM of the whole machine 6.1 GB of 14.0 GB", "VRAM 3.1 GB of 3.5 GB", "step 200, 12 s ago", "1 restart", "SIGKILL",
            "12 rows",
        "since step 120",
    ):  # fmt: skip
        assert words in report, f"{words!r} is missing in\n{report}"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("failed", "It does not fit: it needs 2.9 GB of RAM."),
        ("recovering", "It does not fit: it needs 2.9 GB of RAM; starting again."),
        ("completed", "Completed."),
    ],
)
def test_how_a_trainer_ended_is_said_once(state: str, reason: str) -> None:
    """In the reason, or, when that is about something else by now, beside the restarts; in `status` and in the monitor."""
    from client import screen

    status_of = status.from_dict({**DOCUMENT, "state": state, "reason": reason})
    status_of.trainer.last_exit = "Refused: It does not fit: it needs 2.9 GB of RAM."
    reading = Reading(state, reason, status_of, state == "recovering")
    report = "\n".join(view.lines(reading, 0.0, True, "trainerd"))
    drawn = "\n".join("".join(text for text, _ in line) for line in screen.frame(screen.Scene(reading)))
    for text in (report, drawn):
        assert text.count("It does not fit: it needs 2.9 GB of RAM") == 1 and "1 restart" in text, text


def test_a_number_of_a_moment_that_is_over_is_not_shown() -> None:
    """Paused or not answering: no speed, no time of arrival; they would be frozen."""
    for state in ("paused", status.NOT_ANSWERING):
        report = "\n".join(view.lines(Reading(state, "", frozen(), True), 0.0, True, "trainerd"))
        assert "samples/s" not in report and "done in" not in report and "4.812" in report


def test_text_from_a_file_cannot_move_the_cursor(home: Home) -> None:
    """Escape sequences in a status are shown as blanks."""
    hostile = status.from_dict({**DOCUMENT, "state": "failed", "reason": "\x1b[2J\x07gone", "warnings": ["\x1b]0;title\x07"]})
    report = "\n".join(view.lines(Reading("failed", hostile.reason, hostile, False), 0.0, True, "trainerd"))
    assert "\x1b" not in report and "\x07" not in report


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _paths(document: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    below = [path for key, value in document.items() if isinstance(value, dict) for path in _paths(value, (*prefix, key))]
    return [(*prefix, key) for key in document] + below


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(_paths(DOCUMENT)), value=_JSON, alive=st.booleans())
def test_any_value_in_any_place_is_shown_or_said_to_be_damage(where: tuple[str, ...], value: Any, alive: bool) -> None:
    """A well-formed document with anything anywhere: a report or Unreadable, never another error."""
    document = json.loads(json.dumps(DOCUMENT))
    at = document
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    try:
        read = status.from_dict(document)
    except status.Unreadable:
        return
    reading = Reading(read.state, read.reason, read, alive)
    for fancy in (True, False):
        assert all("\x1b" not in line for line in view.lines(reading, time.time(), fancy, "trainerd"))
    from client import screen

    assert len(screen.frame(screen.Scene(reading))) == 24
    assert screen.line(reading, time.time())
    json.dumps(reading.to_dict())


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, FROZEN.stat().st_size), garbage=st.binary(max_size=20))
def test_a_torn_or_overwritten_file_is_unreadable_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, cut: int, garbage: bytes
) -> None:
    """Any cut of the file with any bytes put in: a state and an exit code."""
    root = tmp_path_factory.mktemp("torn")
    content = FROZEN.read_bytes()
    (root / "training_status.json").write_bytes(content[:cut] + garbage + content[cut + len(garbage) :][: 2000 - cut])
    reading = status.read(Home(root))
    assert reading.state in (status.UNREADABLE, status.CRASHED) and reading.reason
    assert glance.show(Home(root), as_json=True) == 4
    shutil.rmtree(root)
