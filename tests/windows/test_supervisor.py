"""The supervisor as a Windows process: requests by file, restarts, and a job object that leaves nobody behind. No torch."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from tests.supervised import RUN, Daemon, alive, journal, starts, wait_for
from trainerd.contract import runs, status
from trainerd.contract.paths import Home

LONG = {"steps": 100_000, "every": 1000, "pause": 0.05}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    root = tmp_path / "ein höme with spaces"
    root.mkdir()
    return Home(root)


def test_pause_resume_save_and_stop_work_by_request_files(home: Home) -> None:
    """No signal is needed: everything a client asks goes through files, and `stop` ends with nothing running, within seconds."""
    with Daemon(home, LONG) as daemon:
        running = daemon.until_step(3)
        assert running.status is not None
        daemon.ask("pause")
        daemon.until_state(status.PAUSED)
        assert not alive(running.status.trainer.pid or 0)
        daemon.ask("resume")
        again = daemon.until(lambda r: len(starts(home)) == 2 and r.state == status.RUNNING)
        assert daemon.outcome(daemon.ask("save")) == "done"
        asked = time.monotonic()
        daemon.ask("stop")
        assert daemon.process.wait(20) == 0
        assert time.monotonic() - asked < 5.0
        assert again.status is not None
        assert not alive(again.status.trainer.pid or 0)
    assert (daemon.reading().state, runs.read(home, RUN).wanted) == (status.STOPPED, "stopped")


def test_a_reader_that_holds_the_status_holds_up_nobody(home: Home) -> None:
    """A scanner keeps training_status.json open so that it cannot be replaced: training and supervisor go on, and so does the status."""
    with Daemon(home, LONG) as daemon:
        running = daemon.until_step(3)
        assert running.status is not None
        with open(home.status, "rb"):
            wait_for(lambda: "cannot write" in daemon.errors.read_text("utf-8", "replace"), 20, "the supervisor to be held up")
            daemon.ask("save")
            wait_for(lambda: list(home.checkpoints.glob("*/*.json")), 20, "a checkpoint all the same")
        after = daemon.until(lambda r: r.status is not None and r.status.checkpoint is not None)
        assert after.state == status.RUNNING and after.status is not None
        assert (after.status.trainer.pid, after.status.trainer.restarts) == (running.status.trainer.pid, 0)


def test_a_trainer_ended_in_the_task_manager_is_restarted(home: Home) -> None:
    """TerminateProcess from outside: a new trainer is up within seconds, and the status says what happened."""
    with Daemon(home, LONG) as daemon:
        running = daemon.until_step(3)
        assert running.status is not None and running.status.trainer.pid is not None
        gone = running.status.trainer.pid
        psutil.Process(gone).kill()
        again = daemon.until(lambda r: r.status is not None and r.status.trainer.pid not in (gone, None))
        assert again.status is not None
        assert again.status.trainer.restarts == 1 and "somebody ended it" in str(again.status.trainer.last_exit)


def test_what_a_dead_trainer_started_is_killed(home: Home) -> None:
    """The job object takes the grandchildren along, though they hold the event pipe open."""
    with Daemon(home, {"at": 3, "do": "grandchild:exit:5"}, {"steps": 20}) as daemon:
        assert daemon.process.wait(30) == 0
        child = int((home.root / "grandchild.pid").read_text(encoding="ascii"))
        wait_for(lambda: not alive(child), 10, "the grandchild to be gone")
        assert daemon.reading().state == status.COMPLETED
    assert [line["why"] for line in journal(home) if line["kind"] == "death"] == ["exit code 5"]


def test_a_killed_supervisor_takes_its_trainer_along_and_the_next_goes_on(home: Home) -> None:
    """The system closes the job's last handle: no trainer is left; readers say crashed; a second start is refused while one lives."""
    with Daemon(home, LONG) as daemon:
        running = daemon.until_step(3)
        second = Daemon(home, LONG, run="other")
        assert second.process.wait(20) == 5
        assert "already running" in second.errors.read_text(encoding="utf-8", errors="replace")
        daemon.process.kill()
        daemon.process.wait(10)
        assert running.status is not None
        wait_for(lambda: not alive(running.status.trainer.pid or 0), 10, "the trainer to be gone")
        assert daemon.reading().state == status.CRASHED
    with Daemon(home, {"steps": 20, "pause": 0.001}, resume=True) as daemon:
        assert daemon.process.wait(30) == 0
