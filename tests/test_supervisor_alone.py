"""The supervisor itself is killed, stopped, started many times at once, or given a damaged or full home."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.disks import FailingDisk
from tests.supervised import QUICK, RUN, Daemon, alive, start_arguments, starts, supervise_here, trainer_command, wait_for
from trainerd.contract import files, interpreter, lock, requests, runs, status
from trainerd.contract.paths import Home
from trainerd.contract.requests import Request
from trainerd.supervisor import commands, death, opening
from trainerd.supervisor import journal as journals
from trainerd.supervisor.loop import Supervisor

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals; tests/windows has its own")
LONG = {"steps": 100_000, "every": 5, "pause": 0.01}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    root = tmp_path / "home"
    root.mkdir()
    return Home(root)


def test_a_killed_supervisor_takes_its_trainer_along_and_the_next_goes_on(home: Home) -> None:
    """kill -9 of the supervisor: the trainer commits and leaves; readers say crashed; the next start resumes; never two trainers."""
    for life in range(3):
        with Daemon(home, LONG, resume=life > 0) as daemon:
            reading = daemon.until_step(6)
            assert reading.status is not None
            daemon.process.kill()
            daemon.process.wait(60)
            after = daemon.reading()
            assert (after.state, after.alive) == (status.CRASHED, False)
            wait_for(lambda pid=reading.status.trainer.pid: not alive(pid or 0), 5, "the trainer to leave")  # type: ignore[misc,union-attr]
    assert runs.read(home, RUN).wanted == "running"
    with Daemon(home, {"steps": 20, "pause": 0.001}, resume=True) as daemon:
        assert daemon.process.wait(60) == 0


def test_a_left_over_trainer_is_waited_for(home: Home) -> None:
    """A trainer that outlives its supervisor (a long save) is not doubled: the new one says `waiting`, then works."""
    with Daemon(home, {**LONG, "every": 10**6, "save_seconds": 6}, LONG) as daemon:
        daemon.until_step(3)
        daemon.process.kill()
        daemon.process.wait(60)
        with Daemon(home, LONG, resume=True) as second:
            waiting = second.until_state(status.WAITING)
            assert "leaving" in waiting.reason
            second.until_step(6)


@pytest.mark.parametrize("number", [16, pytest.param(50, marks=pytest.mark.slow)])
def test_of_many_supervisors_exactly_one_wins(home: Home, number: int) -> None:
    """So many at once on one home: one runs, the others refuse with 5 and words, and no request is left behind."""
    command = json.dumps(trainer_command(LONG))
    processes = []
    for each in range(number):
        request = Request("start", f"{each:032}", start_arguments(run=f"run-{each}"))
        requests.send(home, request)
        words = ("--home", str(home.root), "--instance", request.instance, "--request", request.id, "--trainer-command", command)
        processes.append(
            subprocess.Popen(
                interpreter.command("trainerd.supervisor", *words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=interpreter.environment(),
            )
        )
    try:
        wait_for(lambda: sum(process.poll() is None for process in processes) == 1, 60, "the others to give up")
        losers = [process for process in processes if process.poll() is not None]
        assert {process.returncode for process in losers} == {5}
        assert all(b"already running" in process.communicate(timeout=60)[1] for process in losers)
        wait_for(lambda: status.read(home).state == status.RUNNING and not requests.pending(home), 10, "the winner to run")
        assert len(runs.names(home)) == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    wait_for(lambda: not lock.is_held(home.trainer_lock), 10, "the trainer to leave")


def test_a_request_that_is_gone_is_a_refusal(home: Home) -> None:
    """Another supervisor deleted the start request as a stranger's: 5, and what to do."""
    words = ("--home", str(home.root), "--instance", "a" * 32, "--request", "b" * 32)
    command = interpreter.command("trainerd.supervisor", *words)
    ended = subprocess.run(command, capture_output=True, env=interpreter.environment(), check=False)
    assert ended.returncode == 5
    assert b"Start again." in ended.stderr and b"Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"run": "../escape"}, 2, "cannot be the name"),
        ({"run": None}, 2, "cannot be the name"),
        ({"config": None}, 2, "no configuration"),
        ({"config": {"seed": 1}}, 2, "no configuration"),
        ({"config": {"task": "x", "memory": {"ram_limit": "lots"}}}, 2, "'lots' is not a size"),
        ({"config": {"task": "x", "seed": -1}}, 2, "-1 is not between"),
        ({"task_file": "/nowhere/task.py"}, 2, "is not a file"),
        ({"resume": True}, 4, "No such file"),
    ],
)
def test_a_start_request_that_makes_no_sense_starts_nothing(home: Home, change: dict[str, object], code: int, words: str) -> None:
    """One line for a person, the right exit code, no run, no path outside the home."""
    with Daemon(home, LONG, **change) as daemon:
        assert daemon.process.wait(60) == code
        said = daemon.errors.read_text(encoding="utf-8")
        assert words in said and len(said.strip().splitlines()) == 1
    assert runs.names(home) == [] and not home.status.exists()


def test_a_name_that_is_taken_is_refused(home: Home) -> None:
    """A new run never writes into an old one's folder."""
    supervise_here(home, {"steps": 3})
    before = home.run(RUN).record.read_bytes()
    with Daemon(home, LONG) as daemon:
        assert daemon.process.wait(60) == 5
        assert "There is a run fake-1 already." in daemon.errors.read_text(encoding="utf-8")
    assert home.run(RUN).record.read_bytes() == before


def test_a_stopped_supervisor_reads_as_not_answering(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: the lock is held, the status grows old, and readers say so; SIGCONT makes it right again, with nothing killed."""
    monkeypatch.setattr(status, "STALE_SECONDS", 1.5)
    with Daemon(home, LONG) as daemon:
        reading = daemon.until_step(3)
        os.kill(daemon.process.pid, signal.SIGSTOP)
        try:
            daemon.until_state(status.NOT_ANSWERING, seconds=5)
        finally:
            os.kill(daemon.process.pid, signal.SIGCONT)
        again = daemon.until_state(status.RUNNING, seconds=5)
        assert reading.status is not None and again.status is not None
        assert again.status.trainer.pid == reading.status.trainer.pid


def test_a_damaged_status_is_kept_aside(home: Home) -> None:
    """Garbage in training_status.json is moved away, named in a warning, and never overwrites an earlier one kept aside."""
    for number, garbage in enumerate((b"\xff\x00garbage", b'{"schema": 1, "state": "dancing"}'), start=1):
        home.status.write_bytes(garbage)
        assert status.read(home).state == status.UNREADABLE
        with Daemon(home, {"steps": 3}, run=f"r{number}") as daemon:
            assert daemon.process.wait(60) == 0
            reading = daemon.reading()
            assert reading.status is not None
            assert f"training_status.json.corrupt-{number}" in reading.status.warnings[0]
        assert home.status.with_name(f"training_status.json.corrupt-{number}").read_bytes() == garbage


def test_the_status_is_never_torn(home: Home) -> None:
    """Eight readers in a loop while the status is written as fast as it can be: every reading is whole."""
    start = opening.open_run(home, start_arguments())
    supervisor = Supervisor(home, "i" * 32, start, command=trainer_command({}))
    ended, wrong, read = threading.Event(), [], [0]

    def reader() -> None:
        while not ended.is_set():
            try:
                status.from_dict(files.read_json(home.status, "The status"))
                read[0] += 1
            except Exception as error:
                wrong.append(error)

    readers = [threading.Thread(target=reader) for _ in range(8)]
    for thread in readers:
        thread.start()
    for number in range(150):
        supervisor.report.status.reason = "x" * (number * 7 % 3000)
        supervisor.report.urgent()
        supervisor.report.write_if_due(0.0)
    ended.set()
    for thread in readers:
        thread.join()
    assert wrong == [] and read[0] > 50


def test_the_users_task_is_copied_once_and_the_copy_counts(home: Home, tmp_path: Path) -> None:
    """The run keeps its own copy of a task file with its sha256; a later change is named, and not taken over."""
    task = tmp_path / "my task.py"
    task.write_text("first = 1\n", encoding="utf-8")
    supervise_here(home, {"steps": 3}, task_file=str(task))
    copy = home.run(RUN).task / "my task.py"
    assert copy.read_text(encoding="utf-8") == "first = 1\n"
    assert len(runs.read(home, RUN).sources["my task.py"]) == 64
    task.write_text("second = 2\n", encoding="utf-8")
    supervisor = supervise_here(home, {"steps": 6}, task_file=str(task), resume=True)
    assert copy.read_text(encoding="utf-8") == "first = 1\n"
    assert "has changed since the run began" in supervisor.report.status.warnings[0]


def test_a_full_disk_does_not_silence_the_status(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while writing: the ballast is given up and the write repeated; without ballast the next tick tries again."""
    assert journals.keep_ballast(home)
    assert home.ballast.stat().st_size == journals.BALLAST_BYTES
    written = []

    def write() -> None:
        if home.ballast.exists():
            raise OSError(28, "No space left on device")
        written.append(True)

    journals.write_even_when_full(home, write)
    assert written == [True] and not home.ballast.exists()
    record = opening.open_run(home, start_arguments(run="other")).record
    journals.Journal(home, record).retry()
    assert home.ballast.exists()  # there was room again

    start = opening.open_run(home, start_arguments())
    supervisor = Supervisor(home, "i" * 32, start, command=trainer_command({}))
    full = True

    def write_json(path: Path, *arguments: object, **options: object) -> None:
        if full:
            raise OSError(28, "No space left on device")
        real(path, *arguments, **options)  # type: ignore[arg-type]

    real = files.write_json
    monkeypatch.setattr(files, "write_json", write_json)
    supervisor.report.state(status.PAUSED, "Paused.")
    supervisor.report.write_if_due(0.0)
    supervisor.journal.save_record(wanted="paused")
    full = False
    supervisor.report.write_if_due(1000.0)
    supervisor.journal.retry()
    assert json.loads(home.status.read_text(encoding="utf-8"))["state"] == status.PAUSED
    assert runs.read(home, RUN).wanted == "paused"


def test_a_surprise_inside_a_tick_does_not_end_the_supervisor(home: Home) -> None:
    """An error nobody expected is a warning; the run goes on and completes."""
    supervisor = Supervisor(home, "i" * 32, opening.open_run(home, start_arguments()), command=trainer_command({"steps": 30}), timing=QUICK)
    real, left = supervisor._sensors.sample, [3]

    def sample(shown: status.Status) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError("a sensor gone mad")
        real(shown)

    supervisor._sensors.sample = sample  # type: ignore[method-assign]
    assert supervisor.run() == status.COMPLETED
    assert "did not expect" in supervisor.report.status.warnings[0]


def test_a_surprise_at_a_death_does_not_leave_the_run_alone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error nobody expected while a dead trainer is looked at: another one is started all the same, and the run completes."""
    real, left = death.explain, [1]

    def explain(*arguments: Any, **more: Any) -> death.Death:
        left[0] -= 1
        if left[0] == 0:
            raise ZeroDivisionError("an exit code gone mad")
        return real(*arguments, **more)

    monkeypatch.setattr(death, "explain", explain)
    supervisor = supervise_here(home, {"at": 7, "do": "exit:1"}, {})
    assert supervisor.result == status.COMPLETED and len(starts(home)) == 2
    assert "did not expect" in supervisor.report.status.warnings[0]


@pytest.mark.parametrize("failures", [6, 10**9], ids=["for a moment", "for good"])
def test_how_it_ended_is_written_if_it_can_be(home: Home, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """run.json cannot be replaced when the run ends: it is tried again before the supervisor goes, or the status says what that means."""
    monkeypatch.setattr(journals, "_LAST_SECONDS", 1.0)
    supervisor = Supervisor(home, "i" * 32, opening.open_run(home, start_arguments()), command=trainer_command({}), timing=QUICK)
    left = [failures]

    def fails(number: int, kind: str, name: str) -> bool:
        if kind != "create" or "run.json" not in name or supervisor.result is None:
            return False
        left[0] -= 1
        return left[0] >= 0

    monkeypatch.setattr(files, "disk", FailingDisk(fails, errno.EIO))
    assert supervisor.run() == status.COMPLETED
    shown = status.read(home).status
    assert shown is not None
    if failures == 6:
        assert runs.read(home, RUN).outcome == "completed" and shown.warnings == []
    else:
        assert runs.read(home, RUN).outcome is None and "may go on at the next log-in" in shown.warnings[0]


def test_a_request_that_goes_wrong_is_obeyed_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside an answer does not come back with every tick: the file is gone, the status is written, the run completes."""

    def broken(*_: object) -> str:
        raise ZeroDivisionError("a handler gone mad")

    monkeypatch.setitem(commands._HANDLERS, "pause", broken)
    start = opening.open_run(home, start_arguments())
    supervisor = Supervisor(home, "i" * 32, start, command=trainer_command({"steps": 30}), timing=QUICK)
    requests.send(home, Request("pause", supervisor.instance))
    assert supervisor.run() == status.COMPLETED
    assert requests.pending(home) == []
    assert len(supervisor.report.status.warnings) == 1


def test_it_is_small_and_holds_on_to_nothing(home: Home) -> None:
    """No torch, at most 40 MB, its own folder, no terminal, files readable by the person only."""
    with Daemon(home, LONG) as daemon:
        reading = daemon.until_step(20)
        process = psutil.Process(daemon.process.pid)
        loaded = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
        assert "torch" not in loaded and "numpy" not in loaded and "pydantic" not in loaded
        assert process.memory_info().rss < 40e6
        assert process.cwd() == str(home.root)
        assert home.status.stat().st_mode & 0o077 == 0
        assert reading.status is not None and reading.status.trainer.pid is not None
        trainer = psutil.Process(reading.status.trainer.pid)
        environment = trainer.environ()
        assert (environment["OMP_WAIT_POLICY"], environment["PYTHONHASHSEED"]) == ("PASSIVE", "1")
        assert os.getsid(trainer.pid) == trainer.pid
        inherited = {Path(f"/proc/{trainer.pid}/fd/{name}").resolve().name for name in os.listdir(f"/proc/{trainer.pid}/fd")}
        assert "supervisor.lock" not in inherited


def test_starting_is_quick(home: Home) -> None:
    """From nothing to `starting` in the status with the lock held: of the processor it takes less than the second and a half that start
    has. (How long that is by the clock, others decide who use this machine.)"""
    with Daemon(home, LONG) as daemon:
        daemon.until(lambda r: r.alive and r.status is not None and r.status.trainer.pid is not None)
        used = psutil.Process(daemon.process.pid).cpu_times()
        assert used.user + used.system < 1.5
