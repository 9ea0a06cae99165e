"""Saver and its schedule: at most 1 % of the run's time, never silent about a failure, never in the training's way."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.disks import FailingDisk, WatchedDisk, loaded_step, state_at
from tests.toy import Script, config, run
from trainerd.config.model import CheckpointConfig
from trainerd.contract import files, wire
from trainerd.contract.errors import TrainerdError
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.saver import Saver, SaveSchedule, note_to
from trainerd.engine.state import States


class Sent(list[tuple[str, dict[str, Any]]]):
    """The events sent."""

    def __call__(self, event: str, **fields: Any) -> None:
        self.append((event, fields))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for kind, fields in self if kind == event]


def saver_in(home: Path, sent: Sent, **config: Any) -> Saver:
    store = CheckpointStore(home / "checkpoints" / "run", note=note_to(sent))
    return Saver(store, SaveSchedule(CheckpointConfig(**config)), sent, home)


def submit(saver: Saver, step: int, request: str | None = None) -> None:
    facts: dict[str, Any] = {"epoch": 1, "best": None, "metrics": None, "metrics_bytes": 7 * step, "about": {}}
    saver.submit(state_at(step), step=step, request=request, blocked_seconds=0.001, **facts)


class SlowDisk(WatchedDisk):
    """Waits at every folder sync until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def at(self, kind: str, path: Path, action: Any, detail: Any = None) -> Any:
        if kind == "create" and path.name.endswith(".tmp"):
            self.reached.set()
            assert self.go.wait(30)
        return action()


# the thread


def test_a_save_is_acknowledged_with_its_request(tmp_path: Path) -> None:
    """CHECKPOINT carries the request's id and a path relative to the home, and comes when the checkpoint can be loaded."""
    sent = Sent()
    saver = saver_in(tmp_path, sent)
    submit(saver, 10, request="abc")
    assert saver.wait(30)
    (event,) = sent.of(wire.CHECKPOINT)
    assert event["request"] == "abc" and event["step"] == 10 and event["bytes"] > 0 and event["seconds"] > 0
    assert (tmp_path / event["path"]).exists() and saver.last is not None and saver.last.step == 10
    assert loaded_step(CheckpointStore(tmp_path / "checkpoints" / "run")) == 10
    saver.close()


def test_a_disk_that_answers_no_more_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no supervisor would end it: an error in words after the limit, once waited for; nothing keeps the process alive."""
    disk = SlowDisk()
    monkeypatch.setattr(files, "disk", disk)
    saver = Saver(CheckpointStore(tmp_path), SaveSchedule(CheckpointConfig()), Sent(), tmp_path, limit_seconds=0.3)
    submit(saver, 10)
    assert disk.reached.wait(30)
    began = time.monotonic()
    for act in (saver.wait, saver.wait, lambda: submit(saver, 20), saver.close):
        with pytest.raises(TrainerdError, match="not finished after 0 s: the disk answers no more"):
            act()
    assert 0.3 <= time.monotonic() - began < 20
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "saver")
    disk.go.set()
    assert saver.wait(30) and saver.last is not None and saver.last.step == 10
    saver.close()


def test_a_library_users_training_ends_when_its_disk_answers_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer.train() raises what to do within faults.hang_limits.checkpointing, instead of standing still for ever."""
    disk = SlowDisk()
    monkeypatch.setattr(files, "disk", disk)
    asked = config({"max_steps": 20}, checkpoint={"every_steps": 5, "exact": True}, faults={"hang_limits": {"checkpointing": 1}})
    began = time.monotonic()
    with pytest.raises(TrainerdError, match="the disk answers no more") as error:
        run(tmp_path, asked)
    assert time.monotonic() - began < 40 and "hang_limits.checkpointing" in error.value.hint
    disk.go.set()


def test_training_goes_on_while_a_slow_disk_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submit() returns at once; the next one waits for the running one, and both are there in the end."""
    disk = SlowDisk()
    monkeypatch.setattr(files, "disk", disk)
    saver = saver_in(tmp_path, Sent())
    began = time.monotonic()
    submit(saver, 1)
    assert disk.reached.wait(30) and saver.busy and time.monotonic() - began < 5
    assert not saver.wait(0.05)
    threading.Timer(0.2, disk.go.set).start()
    submit(saver, 2)
    saver.close()
    assert not saver.busy
    assert [m.step for m in CheckpointStore(tmp_path / "checkpoints" / "run").committed()] == [1, 2]


def test_a_full_disk_is_told_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed save says since when progress is unsaved and how many bytes are missing; the next success clears it."""
    sent = Sent()
    saver = saver_in(tmp_path, sent)
    submit(saver, 1)
    saver.wait()
    saved_at = saver.last.at if saver.last else 0
    monkeypatch.setattr(files, "disk", FailingDisk(lambda number, kind, name: kind == "write", errno.ENOSPC))
    submit(saver, 2, request="r")
    saver.wait()
    (unsaved,) = sent.of(wire.UNSAVED)
    assert abs(unsaved["since"] - saved_at) < 5 and unsaved["missing_bytes"] >= 1 and unsaved["request"] == "r"
    assert "No space left" in unsaved["error"] and saver.failure == unsaved["error"]
    monkeypatch.setattr(files, "disk", files.Disk())
    submit(saver, 3)
    saver.close()
    assert sent.of(wire.UNSAVED)[1] == {"since": None, "missing_bytes": None, "error": None} and saver.failure is None
    assert [event["step"] for event in sent.of(wire.CHECKPOINT)] == [1, 3]


def test_an_unexpected_error_is_told_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A state that cannot be saved does not stop the training: it is named in the event, the traceback is in the log."""
    sent = Sent()
    saver = saver_in(tmp_path, sent)
    facts: dict[str, Any] = {"epoch": 1, "best": None, "metrics": None, "metrics_bytes": 0, "about": {}}
    saver.submit({"x": object()}, step=1, **facts)
    saver.close()
    assert "state['x'] is a builtins.object" in sent.of(wire.UNSAVED)[0]["error"] and sent.of(wire.UNSAVED)[0]["missing_bytes"] is None
    assert "Traceback" in capfd.readouterr().err


def test_what_was_set_aside_is_a_warning_to_the_person(tmp_path: Path) -> None:
    """A quarantined checkpoint is an event and a warning that names it."""
    sent = Sent()
    saver = saver_in(tmp_path, sent)
    submit(saver, 1)
    submit(saver, 2)
    saver.close()
    (tmp_path / "checkpoints/run/checkpoint_epoch_1_step_2.pt").write_bytes(b"")
    assert loaded_step(CheckpointStore(tmp_path / "checkpoints" / "run", note=note_to(sent))) == 1
    assert sent.of(wire.NOTE)[0]["kind"] == "checkpoint_quarantine"
    assert "checkpoint_epoch_1_step_2.pt" in sent.of(wire.WARNING)[0]["text"]


# the schedule


def schedule(**config: Any) -> SaveSchedule:
    return SaveSchedule(CheckpointConfig(**config), now=0.0, cores=2)


def steps_saved(plan: SaveSchedule, steps: int, step_seconds: float, blocked: float, cpu: float, size_bytes: int = 1000) -> list[int]:
    saved = []
    for step in range(1, steps + 1):
        now = step * step_seconds
        if plan.due(step, now):
            saved.append(step)
            plan.began(now)
            plan.saved(size_bytes, blocked, cpu, now)
    return saved


def test_cheap_saves_happen_at_every_mark() -> None:
    """A save that costs nothing is due at every mark of every_steps, and nowhere else."""
    assert steps_saved(schedule(every_steps=50), 200, 0.1, 0.0, 0.0) == [50, 100, 150, 200]


def test_saving_costs_at_most_one_percent() -> None:
    """Blocked seconds and the saver's CPU per core stay within 1 % of the run's time, by spacing the saves out."""
    plan = schedule(every_steps=10)
    saved = steps_saved(plan, 20_000, 0.01, blocked=0.01, cpu=0.1)
    assert saved[0] == 10 and len(saved) > 20
    assert plan.cost_seconds <= 0.01 * 200 + 0.06


def test_but_at_least_every_so_many_minutes() -> None:
    """However dear, a save is due after every_minutes, also between the marks."""
    saved = steps_saved(schedule(every_steps=1000, every_minutes=1), 400, 1.0, blocked=30.0, cpu=0.0)
    assert saved == [60, 120, 180, 240, 300, 360]


def test_the_disk_is_spared() -> None:
    """Writing stays below max_write_per_day, apart from a first allowance."""
    saved = steps_saved(schedule(every_steps=1, every_minutes=10**6, max_write_per_day="86.4GB"), 4000, 1.0, 0.0, 0.0, size_bytes=10**8)
    assert len(saved) * 10**8 <= 10**6 * (4000 + 600)
    assert len(saved) > 40


def test_a_run_that_dies_again_and_again_spares_the_disk_as_well() -> None:
    """What earlier processes have written counts: a crash loop does not begin with a fresh allowance each time. But after
    every_minutes without any checkpoint one is due at the next mark, whatever was written."""
    rate, size = 10**6, 10**8  # 86.4 GB a day
    written, spent, wall, last_at = 0, 0.0, 0.0, 0.0
    while wall < 20_000:  # lives of 40 s
        plan = schedule(every_steps=1, every_minutes=5, max_write_per_day="86.4GB")
        plan.go_on(spent, wall - last_at)
        for second in range(1, 41):
            if plan.due(second, float(second)):
                spent, last_at = plan.spent_bytes(float(second)) + size, wall + second
                plan.began(float(second))
                plan.saved(size, 0.0, 0.0, float(second))
                written += size
        wall += 40
    assert written <= rate * (20_000 + 600) + size
    assert written > rate * 19_000
    plan = schedule(every_steps=1, every_minutes=5, max_write_per_day="1MB")
    plan.go_on(10.0**9, 299.0)
    assert not plan.due(1, 0.5) and plan.due(2, 1.0)


def test_exact_saves_at_every_mark_whatever_it_costs() -> None:
    """checkpoint.exact: true is a promise of every mark."""
    assert steps_saved(schedule(every_steps=5, exact=True), 20, 0.01, 10.0, 10.0, 10**12) == [5, 10, 15, 20]


def test_before_something_long_what_is_unsaved_is_worth_a_save() -> None:
    """An evaluation of unknown length, or one that takes long: once ten seconds are unsaved and the cost allows it. Not what is known
    to be short, not twice, and not while a full disk is waited for."""
    plan = schedule(every_steps=1000)
    assert plan.worth_before(None, 10.0) and not plan.worth_before(None, 9.0)
    assert plan.worth_before(30.0, 10.0) and not plan.worth_before(29.0, 10.0)
    plan.began(12.0)
    plan.saved(1000, 0.05, 0.0, 12.0)
    assert not plan.worth_before(None, 21.0) and plan.worth_before(None, 22.0)
    plan.saved(1000, 10.0, 0.0, 13.0)
    assert not plan.worth_before(None, 60.0), "it would cost more than 1 %"
    failing = schedule(every_steps=1000)
    failing.failed(15.0, 0.0)
    assert not failing.worth_before(None, 20.0)


def test_after_a_failure_it_tries_again_later_each_time() -> None:
    """A failed save is tried again after 10 s, then 20 s …, at any step, and a success goes back to normal."""
    plan = schedule(every_steps=50, every_minutes=5)
    plan.began(100.0)
    plan.failed(100.0, 0.0)
    assert not plan.due(50, 109.0) and plan.due(51, 110.0)
    plan.failed(110.0, 0.0)
    assert not plan.due(100, 129.0) and plan.due(101, 130.0)
    plan.saved(1, 0.0, 0.0, 130.0)
    assert not plan.due(102, 131.0) and plan.due(150, 132.0)


def test_what_saving_costs_is_counted() -> None:
    """Every second the training thread stood still, for saves that failed too, and the saver's own CPU time: the 1 % is of all that."""
    plan = SaveSchedule(CheckpointConfig(), now=0.0, cores=4)
    plan.saved(1000, 0.2, 0.4, 1.0)
    plan.waited(0.1)
    plan.failed(2.0, 0.05)
    told = plan.facts(10.0)
    assert (told["saves"], told["blocked_seconds"], told["cpu_seconds"], told["checkpoint_bytes"]) == (1, 0.35, 0.4, 1000)
    assert told["cost_seconds"] == pytest.approx(0.2 + 0.4 / 4 + 0.1 + 0.05) == plan.cost_seconds and told["of_seconds"] == 10.0


def test_a_training_tells_at_its_end_what_saving_has_cost(tmp_path: Path) -> None:
    """In the events of the run; and what is copied beside the training is no larger than one checkpoint."""
    link = Script()
    run(tmp_path, config(checkpoint={"every_steps": 4, "exact": True}), link)
    (told,) = [note for note in link.of(wire.NOTE) if note["kind"] == "saving"]
    assert told["saves"] == len(link.of(wire.CHECKPOINT)) >= 6
    assert 0 < told["staged_bytes"] <= told["checkpoint_bytes"]
    assert 0 < told["cost_seconds"] < told["of_seconds"]
    assert told["cost_seconds"] == pytest.approx(told["blocked_seconds"] + told["cpu_seconds"] / told["cores"], abs=1e-4)


class DearDisk(WatchedDisk):
    """Each state that is written costs its thread so much of the processor, and so much time."""

    def __init__(self, cpu_seconds: float, seconds: float) -> None:
        self._cpu_seconds, self._seconds = cpu_seconds, seconds

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        if kind == "create" and ".pt" in path.name:
            began = time.thread_time()
            while time.thread_time() - began < self._cpu_seconds:
                pass
            time.sleep(self._seconds)
        return action()


def test_the_savers_own_time_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU time of its thread, measured there; and what a submit waited for the save before, which held up the training."""
    monkeypatch.setattr(files, "disk", DearDisk(0.05, 0.1))
    saver = saver_in(tmp_path, Sent())
    for step in (1, 2, 3):
        submit(saver, step)
    saver.close()
    told = saver.schedule.facts(time.monotonic())
    assert told["cpu_seconds"] >= 3 * 0.05 and told["blocked_seconds"] >= 2 * 0.1, told


@pytest.mark.parametrize("dear", ["copy", "disk"])
def test_whatever_holds_up_a_training_to_save_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dear: str) -> None:
    """Copying the state, and waiting for the save before, which took longer than the steps between."""
    original = States.capture

    def capture(self: States, facts: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.1)
        return original(self, facts)

    if dear == "copy":
        monkeypatch.setattr(States, "capture", capture)
    else:
        monkeypatch.setattr(files, "disk", DearDisk(0.0, 0.1))
    link = Script()
    run(tmp_path, config({"max_steps": 8}, checkpoint={"every_steps": 1, "exact": True}), link)
    (told,) = [note for note in link.of(wire.NOTE) if note["kind"] == "saving"]
    assert told["saves"] >= 8 and told["blocked_seconds"] >= 0.1 * (told["saves"] - 2), told
