"""What a person removes or puts into a living home: the locks, the run's folder, its metrics. Said, made again, never doubled."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.person import Person
from tests.supervised import RUN, Daemon, alive, journal, wait_for
from tests.toy import Script, Toy, config, lines, run, same
from trainerd.contract import lock, runs, status, wire
from trainerd.contract.errors import Refused, Unreadable
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.engine import locks
from trainerd.engine.metrics import MetricsLog, StepRecord

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a file that is open cannot be removed there")
LONG = {"steps": 100_000, "every": 5, "pause": 0.01}


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.with_name("elsewhere").touch()
    path.symlink_to(path.with_name("elsewhere"))


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may be 107 bytes long
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


NO_FILES = pytest.mark.parametrize("put", [_folder, _pipe, _link, _socket])


def test_a_lock_file_removed_by_hand_is_made_again(home: Home) -> None:
    """The run reads as running again within a tick or two, with one warning and an event; the trainer notices nothing."""
    with Daemon(home, LONG) as daemon:
        before = daemon.until_step(3)
        for _ in range(2):
            home.supervisor_lock.unlink()
            wait_for(lambda: lock.is_held(home.supervisor_lock), 5, "the lock to be made again")
        after = daemon.until(lambda r: r.state == status.RUNNING and r.status is not None and r.status.warnings)
        assert before.status is not None and after.status is not None
        assert before.status.trainer.pid == after.status.trainer.pid
        assert len(after.status.warnings) == 1 and "supervisor.lock was removed" in after.status.warnings[0]
        wait_for(lambda: [line["kind"] for line in journal(home)].count("lock made again") == 2, 5, "an event for each time")
        daemon.ask("stop")
        assert daemon.process.wait(60) == 0


def test_a_supervisor_whose_home_was_taken_leaves_it_alone(home: Home) -> None:
    """The lock is removed and another supervisor starts: the first ends with 5 and writes nothing more; one trainer at a time."""
    with Daemon(home, LONG) as first:
        reading = first.until_step(6)
        assert reading.status is not None
        os.kill(first.process.pid, signal.SIGSTOP)
        home.supervisor_lock.unlink()
        with Daemon(home, LONG, resume=True) as second:
            second.until(lambda r: r.status and r.status.supervisor and r.status.supervisor.instance == second.instance)
            assert alive(reading.status.trainer.pid or 0)
            os.kill(first.process.pid, signal.SIGCONT)
            assert first.process.wait(60) == 5
            assert "another supervisor has taken" in first.errors.read_text(encoding="utf-8")
            going = second.until_step(8)
            assert going.status is not None and going.status.supervisor is not None
            assert going.status.supervisor.instance == second.instance
            assert not alive(reading.status.trainer.pid or 0)
            assert runs.read(home, RUN).outcome is None
            kinds = [line["kind"] for line in journal(home)]
            assert kinds.count("resumed") == 1 and "stopped" not in kinds


@NO_FILES
def test_what_lies_in_place_of_a_lock_is_named(home: Home, tmp_path: Path, put: Callable[[Path], None]) -> None:
    """A folder, a pipe, a link or a socket instead of supervisor.lock: every command says so, at once, with 4 and what to do."""
    put(home.supervisor_lock)
    person = Person(home.root, tmp_path / "state")
    for words in (["status"], ["stop"], ["start", "--dataset-size", "100"], ["resume"], ["logs", "-f"]):
        done = person.types(*words, timeout=20)
        said = done.stdout + done.stderr
        assert done.returncode == (3 if words[0] == "logs" else 4), (words, said)
        assert words[0] == "logs" or ("supervisor.lock is" in said and "Move it away" in said), (words, said)
        assert "Traceback" not in said and "in trainerd itself" not in said
    with Daemon(home, LONG) as daemon:
        assert daemon.process.wait(60) == 4
        assert "Move it away" in daemon.errors.read_text(encoding="utf-8")
    assert runs.names(home) == []
    if put is _link:
        assert home.root.joinpath("elsewhere").read_bytes() == b""


@NO_FILES
def test_what_is_no_file_is_never_locked(tmp_path: Path, put: Callable[[Path], None]) -> None:
    """acquire() and is_held() answer at once, in words."""
    path = tmp_path / "a.lock"
    put(path)
    for ask in (lambda: FileLock(path).acquire(0.1), lambda: lock.is_held(path)):
        with pytest.raises(Unreadable, match=r"a\.lock is"):
            ask()
    assert lock.holder(path) is None


def test_a_lock_put_back_as_a_folder_does_not_end_the_training(home: Home) -> None:
    """The lock is replaced by a folder: a warning, training goes on; the folder taken away, the lock is held again."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(3)
        home.supervisor_lock.unlink()
        home.supervisor_lock.mkdir()
        assert daemon.reading().state == status.UNREADABLE
        wait_for(lambda: b"cannot be made again" in home.status.read_bytes(), 5, "the warning")
        home.supervisor_lock.rmdir()
        daemon.until_step(10)


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    """For the person who has to end it by hand."""
    path = tmp_path / "a.lock"
    path.write_text("99999999 and more that an earlier one wrote\n", encoding="utf-8")
    held = FileLock(path)
    assert held.acquire() and lock.holder(path) == os.getpid()
    held.release()
    assert lock.holder(tmp_path / "none.lock") is None


def test_a_trainer_keeps_its_lock_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trainer.lock removed: locked anew; taken by somebody else meanwhile: told, so that two never write into one run."""
    monkeypatch.setattr(locks, "_KEEP_SECONDS", 0.02)
    path, taken, told = tmp_path / "trainer.lock", threading.Event(), threading.Event()
    mine = FileLock(path)
    assert mine.acquire()
    release = locks.keep(mine, taken.set, told.set)
    path.unlink()
    wait_for(lambda: lock.is_held(path), 5, "the lock to be made again")
    assert told.wait(5) and not taken.is_set()
    for _ in range(50):  # until the other one is quicker
        path.unlink()
        other = FileLock(path)
        if other.acquire(0.0):
            break
    assert taken.wait(5)
    other.release()
    wait_for(lambda: lock.is_held(path), 5, "the lock to be taken again once the other is gone")
    release()
    assert not lock.is_held(path)


def test_whoever_finds_a_lock_removed_lets_its_holder_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second home comes in the very moment the device's lock file is gone: it waits for the device all the same."""
    monkeypatch.setattr(locks, "_KEEP_SECONDS", 0.1)
    monkeypatch.setattr(locks, "_GO_FIRST_SECONDS", 0.5)
    first, second = (locks.DeviceLock("cpu", tmp_path / name, tmp_path) for name in ("first", "second"))
    said: list[str] = []
    assert first.acquire_at_once() is None
    first.keep(said.append)
    for _ in range(3):
        (tmp_path / "devices" / "cpu.lock").unlink()
        assert "the training in " in str(second.acquire_at_once())
    assert len(said) == 3 and "was removed while the training runs; it was made again" in said[0], said


def test_a_device_somebody_else_has_taken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the whole folder gone nothing tells a newcomer: then both say so, once, and the first takes the lock again when it is free."""
    monkeypatch.setattr(locks, "_KEEP_SECONDS", 0.05)
    first, second = (locks.DeviceLock("cpu", tmp_path / name, tmp_path / "state") for name in ("first", "second"))
    said: list[str] = []
    assert first.acquire_at_once() is None
    shutil.rmtree(tmp_path / "state")
    assert second.acquire_at_once() is None
    first.keep(said.append)
    wait_for(lambda: said, 5, "the first to notice")
    assert "another training has taken the CPU" in said[0]
    second.release()
    wait_for(lambda: len(said) > 1, 5, "the lock to be taken again")
    assert "it was made again" in said[1] and len(said) == 2


@pytest.mark.parametrize("quicker", [False, True], ids=["alone", "another was quicker"])
def test_a_library_users_home_is_kept_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quicker: bool) -> None:
    """trainer.lock removed under Trainer.train(): made again and said; taken by another training: it ends, and writes no more."""
    monkeypatch.setattr(locks, "_KEEP_SECONDS", 0.05)
    home, link = Home(tmp_path), Script()
    other = FileLock(home.trainer_lock)

    class Loses(Toy):
        def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
            if ctx.training and ctx.step == 9 and not link.of(wire.WARNING):
                home.trainer_lock.unlink()
                assert not quicker or other.acquire(0.0)
                wait_for(lambda: link.of(wire.WARNING), 5, "a warning")
            return super().loss(model, batch, ctx)

    asked = config(checkpoint={"every_steps": 4, "exact": True})
    if not quicker:
        assert run(tmp_path, asked, link, Loses()).outcome == "finished"
        assert "it was made again" in link.of(wire.WARNING)[0]["text"]
    else:
        with pytest.raises(Refused, match="Another training has taken"):
            run(tmp_path, asked, link, Loses())
        assert len(lines(tmp_path)) <= 10 and not home.run("toy").result.exists()
        other.release()
        assert run(tmp_path, asked).outcome == "finished"
    assert not lock.is_held(home.trainer_lock)
    run(tmp_path / "whole", asked)
    assert same(tmp_path / "whole", tmp_path)


def test_a_run_removed_while_it_trains_is_made_again(home: Home, tmp_path: Path) -> None:
    """runs/<run> removed: record, configuration and task file are back, it is said once, and the run completes."""
    task = tmp_path / "mine.py"
    task.write_text("class Mine: ...\n", encoding="utf-8")
    folder = home.run(RUN).folder
    with Daemon(home, {"steps": 600, "every": 5, "pause": 0.01}, task_file=str(task)) as daemon:
        daemon.until_step(6)
        config = home.run(RUN).config.read_bytes()
        shutil.rmtree(folder)
        wait_for(lambda: home.run(RUN).record.exists(), 5, "the record")
        assert daemon.outcome(daemon.ask("save")) == "done"
        reading = daemon.reading()
        assert reading.status is not None and len(reading.status.warnings) == 1
        assert f"runs/{RUN} was removed" in reading.status.warnings[0]
        assert daemon.process.wait(60) == 0
    assert home.run(RUN).config.read_bytes() == config
    assert (home.run(RUN).task / "mine.py").read_bytes() == task.read_bytes()
    record = runs.read(home, RUN)
    assert (record.outcome, record.step is not None, len(record.sources)) == ("completed", True, 1)
    assert journal(home)[0]["kind"] == "run made again"


def test_metrics_removed_while_it_trains_lose_no_step(tmp_path: Path) -> None:
    """metrics.jsonl unlinked under the engine: the next line brings all of it back, as long as a checkpoint expects it."""
    path = tmp_path / "runs" / "r" / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 4):
        log.add(StepRecord(step, 1, 0.5, 0.1, 1.0, 8 * step))
        log.flush()
        shutil.rmtree(tmp_path / "runs")
    log.add(StepRecord(4, 1, 0.5, 0.1, 1.0, 32))
    log.close()
    lines = path.read_text("utf-8").splitlines()
    assert [line.split(",")[0] for line in lines] == [f'{{"step":{n}' for n in (1, 2, 3, 4)]
    assert path.stat().st_size == log.bytes


def test_what_one_trainer_could_not_save_the_next_one_may(home: Home) -> None:
    """A trainer that could save nothing dies; once its successor has saved, the status does not go on saying "unsaved"."""
    with Daemon(home, {**LONG, "at": 2, "do": "unsaved"}, LONG) as daemon:
        reading = daemon.until(lambda r: r.status is not None and r.status.unsaved.since is not None)
        assert reading.status is not None and reading.status.trainer.pid is not None
        os.kill(reading.status.trainer.pid, signal.SIGKILL)
        after = daemon.until(lambda r: r.status is not None and r.status.checkpoint is not None).status
        assert after is not None and (after.unsaved.since, after.unsaved.missing_bytes) == (None, None)


def test_a_save_that_cannot_be_made_is_answered(home: Home) -> None:
    """`save` on a disk that takes nothing is refused with the reason, not left to its time limit."""
    with Daemon(home, {**LONG, "at": 2, "do": "unsaved"}) as daemon:
        daemon.until_step(3)
        assert daemon.outcome(daemon.ask("save")).startswith("refused: The checkpoint")
        done = subprocess.run(
            [sys.executable, "run_optimized_training.py", "--home", str(home.root), "save"],
            capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1], check=False,
        )  # fmt: skip
        assert done.returncode == 5 and "No space left" in done.stderr
