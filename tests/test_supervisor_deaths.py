"""A trainer that dies, in every way a script can make it, under a real supervisor with real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.supervised import RUN, Daemon, alive, journal, starts, supervise_here, wait_for
from trainerd.contract import runs, status
from trainerd.contract.paths import Home
from trainerd.supervisor.loop import Timing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals; tests/windows has its own")
FAST = {"steps": 20, "every": 5, "pause": 0.001}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "a home")


def reasons(home: Home) -> list[str]:
    return [str(line["why"]) for line in journal(home) if line["kind"] == "death"]


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ("exit:3", "exit code 3"),
        ("exit:0", "no result on disk); the task's own code may have called exit"),
        (f"signal:{signal.SIGKILL}", "SIGKILL"),
        (f"signal:{signal.SIGSEGV}", "segmentation fault"),
        ("raise:bad batch", "ValueError: bad batch"),
        ("crash-silently:no luck", "RuntimeError: no luck"),
    ],
)
def test_a_dead_trainer_is_restarted_and_finishes(home: Home, do: str, words: str) -> None:
    """Every kind of death after progress: restarted at once, from the last checkpoint, and the run completes."""
    supervisor = supervise_here(home, {**FAST, "at": 12, "do": do}, FAST)
    assert supervisor.result == status.COMPLETED
    reading = status.read(Home(home.root))
    assert reading.status is not None
    assert (reading.state, reading.status.trainer.restarts, reading.status.progress.step) == (status.COMPLETED, 1, 20)
    assert words in str(reading.status.trainer.last_exit)
    assert [words in why for why in reasons(home)] == [True]
    assert runs.read(home, RUN).outcome == "completed"


def test_exit_zero_with_an_old_finished_record_is_still_a_crash(home: Home) -> None:
    """A result left from before (fewer epochs) does not make a crash a success."""
    result = home.run(RUN).result
    result.parent.mkdir(parents=True)
    result.write_text("{}", encoding="utf-8")
    assert supervise_here(home, {**FAST, "at": 2, "do": "exit:0"}, FAST).result == status.COMPLETED
    assert len(starts(home)) == 2


def test_five_deaths_without_progress_try_the_checkpoint_before_then_fail(home: Home) -> None:
    """The fifth death starts from before the newest checkpoint, once; then `failed` says how often and why."""
    supervisor = supervise_here(home, {**FAST, "at": 12, "do": "exit:7"})
    assert supervisor.result == status.FAILED
    assert [before for _, _, before in starts(home)] == ["None"] * 5 + ["10"]
    reading = status.read(home)
    assert "6 times without a new checkpoint: exit code 7" in reading.reason
    record = runs.read(home, RUN)
    assert (record.outcome, record.wanted, record.step) == ("failed", "running", 10)
    assert (home.run(RUN).checkpoints / "checkpoint_epoch_1_step_10.json").exists()


def waits(home: Home, kind: str) -> list[float]:
    """Seconds from each death, or loss of a device, to the start after it."""
    told = [line for line in journal(home) if line["kind"] in (kind, "trainer started")]
    return [after["at"] - before["at"] for before, after in pairwise(told) if before["kind"] == kind and after["kind"] == "trainer started"]


def test_the_waits_between_deaths_double(home: Home) -> None:
    """At once, then 1, 2, 4 real seconds, each within 10 % (and the moment that starting a process takes on a busy machine)."""
    supervisor = supervise_here(home, {"do": "exit-first"}, timing=Timing())
    assert supervisor.result == status.FAILED
    assert "ImportError: no module named nonsense" in status.read(home).reason
    found = waits(home, "death")
    assert len(found) == 4 and len(starts(home)) == 5
    assert all(wanted - 0.01 <= waited < wanted * 1.1 + 0.1 for waited, wanted in zip(found, (0, 1, 2, 4), strict=True)), found


def test_the_waits_for_a_lost_device_double(home: Home) -> None:
    """1, 2, 4 units until it is looked for again, within 10 %, however often; the first new checkpoint makes it the first one again."""
    lost = {**FAST, "at": "start", "do": "raise:CUDA error: unknown error"}
    supervisor = supervise_here(home, lost, lost, lost, {**FAST, "at": 12, "do": lost["do"]}, FAST, timing=Timing(device_seconds=0.7))
    assert supervisor.result == status.COMPLETED
    found = waits(home, "device lost")
    assert all(wanted - 0.01 <= waited < wanted * 1.1 + 0.1 for waited, wanted in zip(found, (0.7, 1.4, 2.8, 0.7), strict=True)), found


def test_an_error_no_restart_can_mend_fails_at_once(home: Home) -> None:
    """A permanent error is not tried five times. It is no death, and our name for it is for programs."""
    assert supervise_here(home, {**FAST, "at": 0, "do": "permanent:column 'x' is missing"}).result == status.FAILED
    assert len(starts(home)) == 1
    reading = status.read(home)
    assert reading.reason == "column 'x' is missing."
    assert reading.status is not None and reading.status.trainer.last_exit == "ConfigError: column 'x' is missing"


def test_what_a_trainer_started_dies_with_it(home: Home) -> None:
    """A killed trainer leaves no process behind, and a child that holds the pipes open does not delay the restart."""
    supervisor = supervise_here(home, {**FAST, "at": 7, "do": f"grandchild:signal:{signal.SIGKILL}"}, FAST)
    assert supervisor.result == status.COMPLETED
    child = int((home.root / "grandchild.pid").read_text(encoding="ascii"))
    wait_for(lambda: not alive(child), 5, "the grandchild to be gone")
    death = next(line for line in journal(home) if line["kind"] == "death")
    again = [line for line in journal(home) if line["kind"] == "trainer started"][1]
    assert again["at"] - death["at"] < 1.0


def test_a_chatty_trainer_does_not_wear_the_supervisor_out(home: Home) -> None:
    """Twenty thousand events in a row arrive without a queue that grows, and the newest counts."""
    supervisor = supervise_here(home, {**FAST, "at": 3, "do": "flood"})
    assert supervisor.result == status.COMPLETED
    assert supervisor.report.status.progress.step == 20


def test_a_loss_that_is_no_number_leaves_a_readable_status(home: Home) -> None:
    """NaN is shown as unknown; the status stays JSON."""
    assert supervise_here(home, {**FAST, "do": "nan"}).result == status.COMPLETED
    reading = status.read(home)
    assert reading.status is not None
    assert reading.status.progress.loss is None


def test_each_warning_is_shown_once(home: Home) -> None:
    """A warning is in the status and, once, in the events."""
    supervise_here(home, {**FAST, "at": 1, "do": "warn:no deterministic kernel"}, FAST)
    reading = status.read(home)
    assert reading.status is not None
    assert reading.status.warnings == ["no deterministic kernel"]
    assert [line["text"] for line in journal(home) if line["kind"] == "warning"] == ["no deterministic kernel"]


def test_a_trainer_that_cannot_be_started_is_tried_again_then_failed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is not there ends in words, not in a traceback."""
    monkeypatch.setattr("tests.supervised.trainer_command", lambda *scripts: ["/nowhere/python"])
    assert supervise_here(home, FAST).result == status.FAILED
    assert "cannot be started" in status.read(home).reason


def test_old_logs_are_thrown_away_and_the_newest_is_named(home: Home) -> None:
    """One log per start, twenty kept, and `log` in the status is the one being written."""
    home.logs.mkdir(parents=True)
    for number in range(30):
        path = home.logs / f"training_20200101_0000{number:02}.log"
        path.touch()
        os.utime(path, (number, number))
    supervise_here(home, {**FAST, "at": 6, "do": "exit:1"}, FAST)
    kept = sorted(path.name for path in home.logs.glob("training_*.log"))
    assert len(kept) == 20
    assert "training_20200101_000029.log" in kept and "training_20200101_000005.log" not in kept
    reading = status.read(home)
    assert reading.status is not None and reading.status.log is not None
    assert (home.root / reading.status.log).exists()


def test_nothing_waits_for_the_next_tick(home: Home) -> None:
    """Death wakes the supervisor by itself: with a tick of a minute a crash and a finish are still seen at once."""
    began = time.monotonic()
    timing = Timing(tick_seconds=60.0)
    assert supervise_here(home, {**FAST, "at": 12, "do": "exit:3"}, FAST, timing=timing).result == status.COMPLETED
    assert time.monotonic() - began < 20


def test_death_is_noticed_within_a_second(home: Home) -> None:
    """A real daemon: from SIGKILL to `recovering` or a new trainer in the status takes less than a second."""
    with Daemon(home, {"steps": 100_000, "pause": 0.01}) as daemon:
        reading = daemon.until_step(6)
        assert reading.status is not None
        pid = reading.status.trainer.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        again = daemon.until(lambda r: r.status is not None and r.status.trainer.pid != pid, 1.5)
        assert again.status is not None
        assert again.status.trainer.restarts == 1


def test_a_lost_gpu_is_waited_for_and_costs_no_restart(home: Home) -> None:
    """CUDA's "unknown error" after suspend: `waiting` with the remedy, looked for again and again, none of it a death; then it goes on."""
    lost = {**FAST, "at": "start", "do": "raise:CUDA error: unknown error\nCUDA kernel errors might be asynchronously reported"}
    with Daemon(home, lost) as daemon:
        waiting = daemon.until_state(status.WAITING)
        assert "Waiting for the GPU: ValueError: CUDA error: unknown error" in waiting.reason
        assert "modprobe nvidia_uvm" in waiting.reason and "again in 10 s" in waiting.reason
        daemon.ask("stop")
        assert daemon.process.wait(60) == 0
    again = Home(home.root.with_name("again"))
    supervisor = supervise_here(again, *[lost] * 8, {**FAST, "at": 12, "do": lost["do"]}, FAST)
    assert supervisor.result == status.COMPLETED
    assert len(starts(again)) == 10
    kinds = [line["kind"] for line in journal(again)]
    assert (kinds.count("device lost"), kinds.count("death")) == (9, 0)
    assert supervisor.report.status.trainer.restarts == 0


def test_a_gpu_that_is_lost_by_what_is_done_with_it_ends_the_run(home: Home) -> None:
    """It comes back, is trained on, and is lost before anything is saved, every time: that spends the budget, with the remedy."""
    supervisor = supervise_here(home, {**FAST, "at": 3, "do": "raise:CUDA error: the launch timed out and was terminated"})
    assert supervisor.result == status.FAILED
    assert "micro_batch helps" in status.read(home).reason
    assert len(starts(home)) == 6


def test_no_number_goes_back_once_and_the_second_time_at_that_step_is_the_end(home: Home) -> None:
    """The last checkpoint, once; then `failed` names the step, and the events name the samples."""
    bad = {**FAST, "at": 12, "do": "not-finite"}
    assert supervise_here(home, bad, FAST).result == status.COMPLETED
    again = Home(home.root.with_name("again"))
    assert supervise_here(again, bad).result == status.FAILED
    assert len(starts(again)) == 2
    assert "the second time at the same step: The loss is not a finite number at step 13" in status.read(again).reason
    told = [line for line in journal(again) if line["kind"] == "not finite"]
    assert [(line["step"], line["samples"]) for line in told] == [(13, [3, 17])] * 2


def test_a_killed_supervisor_does_not_forget_what_was_no_number(home: Home) -> None:
    """Killed between the first time and the second: it still is the second. After the person has looked, it is a first one again."""
    bad, slow = {**FAST, "at": 12, "do": "not-finite"}, {**FAST, "pause": 0.4}
    with Daemon(home, bad, slow) as daemon:
        daemon.until(lambda r: r.status is not None and r.status.trainer.restarts == 1 and r.status.progress.step == 11)
        daemon.process.kill()
        daemon.process.wait(60)
    with Daemon(home, bad, resume=True) as daemon:
        daemon.until_state(status.FAILED)
        daemon.process.wait(60)
    assert "the second time at the same step" in status.read(home).reason
    assert len(starts(home)) == 3
    with Daemon(home, bad, resume=True) as daemon:
        daemon.until_state(status.FAILED)
        daemon.process.wait(60)
    assert len(starts(home)) == 5, "it was not given another chance after the person had looked"
