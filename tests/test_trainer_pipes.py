"""The trainer's pipes and locks without a trainer: events that never block, commands never missed, locks that say why."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainerd.contract import wire
from trainerd.contract.lock import FileLock
from trainerd.engine.commands import Commands
from trainerd.engine.locks import DeviceLock, hold
from trainerd.engine.reporter import Reporter

Pipe = tuple[int, int]


@pytest.fixture
def pipe() -> Any:
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (writing, reading):  # in this order: on Windows a pipe that is being read cannot be closed
        try:
            os.close(descriptor)
        except OSError:
            pass


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def messages(reading: int) -> list[dict[str, Any]]:
    """Everything in a pipe whose other end is closed."""
    with open(reading, "rb", closefd=False) as file:
        return [found for line in file if (found := wire.decode(line)) is not None]


def reported(pipe: Pipe, *events: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    reporter = Reporter(pipe[1])
    reporter.start()
    for event, fields in events:
        reporter.send(event, **fields)
    reporter.close(10)
    os.close(pipe[1])
    return messages(pipe[0])


# events


def test_events_arrive_in_order_and_progress_only_as_its_latest(pipe: Pipe) -> None:
    """Every event comes, stamped; of a burst of progress the last one; and progress before what was sent after it."""
    burst = [(wire.PROGRESS, {"step": step}) for step in range(1000)]
    found = reported(pipe, (wire.HELLO, {"pid": 1}), *burst, (wire.CHECKPOINT, {"step": 999, "bytes": 1, "path": "x"}), (wire.FINISHED, {}))
    kinds = [message["event"] for message in found]
    assert [kind for kind in kinds if kind != wire.PROGRESS] == [wire.HELLO, wire.CHECKPOINT, wire.FINISHED]
    progress = [message["step"] for message in found if message["event"] == wire.PROGRESS]
    assert len(progress) <= 3 and progress[-1] == 999 and kinds.index(wire.CHECKPOINT) > kinds.index(wire.PROGRESS)
    assert all(message["at"] > 1e9 and message["monotonic"] > 0 for message in found)


def test_what_json_cannot_say_does_not_stop_the_events(pipe: Pipe) -> None:
    """A loss that is not finite is null; a field that is no JSON is said in a warning; a line that is too long is shortened."""
    found = reported(
        pipe,
        (wire.PROGRESS, {"step": 1, "loss": float("nan"), "eval": {"loss": float("inf"), "x": (1, 2)}}),
        (wire.NOTE, {"kind": "odd", "value": object()}),
        (wire.EXCEPTION, {"type": "X", "text": "y" * 100_000, "permanent": False}),
        (wire.FINISHED, {}),
    )
    by_event = {message["event"]: message for message in found}
    assert by_event[wire.PROGRESS]["loss"] is None and by_event[wire.PROGRESS]["eval"] == {"loss": None, "x": [1, 2]}
    assert "'note'" in by_event[wire.WARNING]["text"]
    assert by_event[wire.EXCEPTION]["type"] == "X" and len(by_event[wire.EXCEPTION]["text"]) == 1000
    assert wire.FINISHED in by_event


def test_nobody_reading_costs_nothing(pipe: Pipe, capfd: pytest.CaptureFixture[str]) -> None:
    """With a full pipe (a stopped supervisor) a send stays in the microseconds, the memory bounded, and close() returns."""
    reporter = Reporter(pipe[1])
    reporter.start()
    slowest = 0.0
    for number in range(5000):
        began = time.thread_time()
        reporter.send(wire.NOTE, kind="n", text="x" * 200, number=number)
        reporter.send(wire.PROGRESS, step=number)
        slowest = max(slowest, time.thread_time() - began)
    began = time.monotonic()
    reporter.close(0.2)
    assert time.monotonic() - began < 5 and slowest < 0.05
    assert len(reporter._queue) <= 1000
    os.close(pipe[0])


def test_a_closed_pipe_is_no_error(pipe: Pipe, capfd: pytest.CaptureFixture[str]) -> None:
    """The reader gone: events are dropped, the log still gets its lines."""
    os.close(pipe[0])
    reporter = Reporter(pipe[1])
    reporter.start()
    reporter.send(wire.WARNING, text="first")
    reporter.send(wire.WARNING, text="second")
    reporter.close(10)
    assert "second" in capfd.readouterr().err


# commands


def test_commands_wait_for_the_loop_and_stray_lines_are_ignored(pipe: Pipe) -> None:
    """Commands come whole however they are cut, in order; nonsense is skipped; the end of the pipe is a LEAVE with save."""
    hurried: list[bool] = []
    commands = Commands(pipe[0], lambda command: pytest.fail("left at once"), lambda: hurried.append(True))
    assert commands.next() is None
    commands.start()
    line = wire.encode({"do": wire.SAVE, "id": "1"})
    os.write(pipe[1], b"nonsense\n[1]\n" + line[:5])
    os.write(pipe[1], line[5:] + b"x" * 70_000)
    os.write(pipe[1], b"\n" + wire.encode({"do": wire.SAVE, "id": "2"}))
    found: list[Any] = []
    until(lambda: found.append(commands.next()) or len([c for c in found if c]) == 2)  # type: ignore[func-returns-value]
    os.close(pipe[1])
    until(lambda: found.append(commands.next()) or found[-1] is not None)  # type: ignore[func-returns-value]
    wanted = [{"do": wire.SAVE, "id": "1"}, {"do": wire.SAVE, "id": "2"}]
    assert [c for c in found if c][:2] == wanted and found[-1]["do"] == wire.LEAVE and found[-1]["save"] is True
    until(lambda: hurried == [True])


def test_before_the_loop_asks_a_leave_is_obeyed_at_once(pipe: Pipe) -> None:
    """Waiting for a lock, importing, preparing: LEAVE does not wait for the main thread; a SAVE is kept for later."""
    left: list[Any] = []
    commands = Commands(pipe[0], left.append)
    commands.start()
    os.write(pipe[1], wire.encode({"do": wire.SAVE, "id": "1"}) + wire.encode({"do": wire.LEAVE, "why": "stop", "save": True}))
    until(lambda: bool(left))
    assert left[0]["why"] == "stop"
    assert commands.next() == {"do": wire.SAVE, "id": "1"}


def test_asking_for_commands_costs_next_to_nothing(pipe: Pipe) -> None:
    """The loop asks at every micro-batch: below a microsecond when there is none (5 here, for a busy machine)."""
    commands = Commands(pipe[0], lambda command: None)
    best = min(_seconds(commands.next, 10_000) for _ in range(20))
    assert best / 10_000 < 5e-6


def _seconds(action: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        action()
    return time.perf_counter() - began


# locks


def test_a_lock_is_waited_for_and_the_reason_said_once(tmp_path: Path) -> None:
    """hold() returns when the holder lets go, having told the reason once."""
    path = tmp_path / "trainer.lock"
    holder = FileLock(path)
    assert holder.acquire()
    told: list[str] = []
    threading.Timer(1.0, holder.release).start()
    mine = FileLock(path)
    hold(mine, lambda: "because", told.append)
    assert mine.held and told == ["because"]
    mine.release()


def test_the_second_home_on_a_device_is_told_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is one training's at a time; the waiting one names the other's home; the kernel frees it when that one dies."""
    monkeypatch.setenv("TRAINERD_STATE", str(tmp_path / "state"))
    program = (
        "import pathlib, sys, time; from trainerd.engine.locks import DeviceLock;"
        "DeviceLock('GPU-1/2', pathlib.Path(sys.argv[1])).acquire(print); print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "one")], stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline().strip() == b"held"
        told: list[str] = []

        def tell(reason: str) -> None:
            told.append(reason)
            other.kill()

        lock = DeviceLock("GPU-1/2", tmp_path / "two")
        lock.acquire(tell)
    assert told == [f"Waiting for the GPU GPU-1/2: the training in {tmp_path / 'one'} is using it."]
    DeviceLock("cpu", tmp_path / "two").acquire(pytest.fail)
    lock.release()
