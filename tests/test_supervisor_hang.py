"""A trainer that hangs, in every way a script can make it, and one that only seems to: real processes, real signals."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.supervised import QUICK, RUN, Daemon, journal, starts, supervise_here, wait_for
from trainerd.contract import runs, status
from trainerd.contract.paths import Home
from trainerd.machine.starvation import Starvation

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals; tests/windows has its own")
FAST = {"steps": 20, "every": 5, "pause": 0.001}
LONG = {"steps": 100_000, "every": 5, "pause": 0.01}


def config(**faults: object) -> dict[str, object]:
    return {"task": "fake", "seed": 1, "faults": faults}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "a home")


def of(home: Home, kind: str) -> list[dict[str, object]]:
    return [line for line in journal(home) if line["kind"] == kind]


@pytest.mark.parametrize(("do", "in_stack"), [("hang", "in act"), ("lock", "in act"), (f"signal:{signal.SIGSTOP}", "")])
def test_a_hung_trainer_is_found_in_time_and_restarted(home: Home, do: str, in_stack: str) -> None:
    """Asleep, holding the interpreter's lock, or stopped: found within its limit, its stack in its log, restarted, finished."""
    supervisor = supervise_here(home, {**FAST, "at": 12, "do": do}, FAST, config=config(hang=1))
    assert supervisor.result == status.COMPLETED
    (hang,) = of(home, "hang")
    assert (hang["phase"], hang["limit_seconds"]) == ("training", 1.0)
    assert 1.0 <= float(str(hang["silent_seconds"])) < 10  # a busy machine; measured in the log
    (death,) = of(home, "death")
    assert f"gave no sign of life for 1 s while training (its stacks are in training_logs/{death['log']})" in str(death["why"])
    assert float(str(death["at"])) - float(str(hang["at"])) < 2.0 + QUICK.hung_seconds
    assert in_stack in (home.logs / str(death["log"])).read_text(encoding="utf-8")
    assert [before for _, _, before in starts(home)] == ["None", "None"]


def test_a_run_that_hangs_again_and_again_fails_in_words(home: Home) -> None:
    """Five hangs without progress are five deaths without progress."""
    supervisor = supervise_here(home, {**FAST, "at": 0, "do": "hang"}, config=config(hang=1))
    assert supervisor.result == status.FAILED
    assert len(starts(home)) == 5
    assert "5 times without a new checkpoint: it gave no sign of life for 1 s while training" in status.read(home).reason


def test_slow_is_not_hung(home: Home) -> None:
    """A step just below the limit and a save far above it, which has a limit of its own, are left alone."""
    script = {**FAST, "every": 10, "save_seconds": 2.0, "at": 3, "do": "slow:0.8"}
    supervisor = supervise_here(home, script, config=config(hang=1, hang_limits={"checkpointing": 30}))
    assert supervisor.result == status.COMPLETED
    assert (len(starts(home)), of(home, "hang")) == (1, [])
    assert runs.read(home, RUN).wanted == "running"


def test_a_stopped_supervisor_and_a_stopped_machine_kill_nobody(home: Home) -> None:
    """SIGSTOP of the supervisor, and of supervisor and trainer together (a suspended laptop), for longer than the limit."""
    with Daemon(home, LONG, config=config(hang=3)) as daemon:  # more than one late tick may count
        reading = daemon.until_step(6)
        assert reading.status is not None and reading.status.trainer.pid is not None
        trainer, supervisor = reading.status.trainer.pid, daemon.process.pid
        for stopped in ([supervisor], [supervisor, trainer]):
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            threading.Event().wait(3.7)  # time has to pass: that is the fault
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            step = (daemon.reading().status or status.Status()).progress.step or 0
            daemon.until_step(step + 50)
        again = daemon.reading()
        assert again.status is not None and again.status.trainer.pid == trainer
        assert of(home, "hang") == []


def test_stop_and_pause_go_before_a_hang(home: Home) -> None:
    """Asked to stop while a hung trainer is being ended: it is not started again; pause frees its memory just so."""
    for verb, end in (("pause", status.PAUSED), ("stop", status.STOPPED)):
        here = Home(home.root.with_name(verb))
        here.root.mkdir()
        with Daemon(here, {**LONG, "at": 12, "do": f"signal:{signal.SIGSTOP}"}, config=config(hang="off")) as daemon:
            daemon.until_step(12)
            daemon.ask(verb, timeout_seconds=1.0)
            daemon.until_state(end, seconds=10)
            assert len(starts(here)) == 1


def test_silence_is_told_before_anything_is_done_about_it(home: Home) -> None:
    """From half of the limit on the status says how long there was no sign of life; with the next sign it is forgotten."""
    with Daemon(home, {**LONG, "at": 12, "do": "slow:3"}, config=config(hang=4)) as daemon:
        daemon.until(lambda reading: "No sign of life for" in reading.reason)
        daemon.until_step(14)
        assert "No sign" not in daemon.until_state(status.RUNNING).reason
    assert len(starts(home)) == 1


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_long_time_of_stops_and_crashes_is_no_hang(home: Home) -> None:
    """TRAINERD_SOAK_SECONDS (a minute): stopped supervisors and machines and killed trainers at random; no hang is seen, every
    death is mended, and the supervisor holds no more than at the beginning."""
    home.root.mkdir()
    chance, end = random.Random(1), time.monotonic() + float(os.environ.get("TRAINERD_SOAK_SECONDS", "60"))
    kills = 0
    idle = {**config(hang=5, hang_limits={"starting": 60}), "polite": {"priority": "idle"}}  # what starves most beside other work
    with Daemon(home, {**LONG, "steps": 10**9}, config=idle) as daemon:
        supervisor = psutil.Process(daemon.process.pid)
        begun: tuple[int, int] | None = None
        while time.monotonic() < end:
            reading = daemon.until_state(status.RUNNING, seconds=600)
            assert reading.status is not None
            pid, step = reading.status.trainer.pid, reading.status.progress.step or 0
            daemon.until_step(step + 60, seconds=600)
            begun = begun or (supervisor.memory_info().rss, supervisor.num_fds())
            what = chance.choice(["kill", "supervisor", "machine", "trainer"])
            pids = {"supervisor": [supervisor.pid], "machine": [supervisor.pid, pid], "trainer": [pid]}.get(what, [])
            if what == "kill":
                os.kill(pid or 0, signal.SIGKILL)
                kills += 1
            for stopped in filter(None, pids):
                os.kill(stopped, signal.SIGSTOP)
            threading.Event().wait(chance.uniform(0.1, 3.0 if what == "trainer" else 8.0))
            for stopped in filter(None, pids):
                os.kill(stopped, signal.SIGCONT)
            if what == "kill":
                daemon.until(lambda r, gone=pid: r.status is not None and r.status.trainer.pid not in (gone, None), 600)  # type: ignore[misc]
        daemon.until_state(status.RUNNING, seconds=600)
        assert (of(home, "hang"), len(of(home, "death"))) == ([], kills)
        assert begun is not None and supervisor.num_fds() <= begun[1] + 4 and supervisor.memory_info().rss < begun[0] + 20e6


@contextmanager
def spinning(program: str, processor: int, number: int = 1) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of one session, all on one processor."""
    words = ["taskset", "-c", str(processor), sys.executable, "-c", program]
    processes = [subprocess.Popen(words) for _ in range(number)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def starved(pid: int, seconds: float = 1.0) -> float:
    looking = Starvation(pid)
    looking.share()
    threading.Event().wait(seconds)
    return looking.share()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="taskset, /proc")
def test_who_stands_in_the_queue_is_starved_and_who_sleeps_is_not() -> None:
    """One of five that share a processor waits for most of the time; a sleeper among them waits for nothing."""
    processor = max(os.sched_getaffinity(0))
    with spinning("while True: pass", processor, 5) as crowd, spinning("import time; time.sleep(60)", processor) as asleep:
        wait_for(lambda: all(Path(f"/proc/{p.pid}/comm").read_text().startswith("python") for p in [*crowd, *asleep]), 10, "them to run")
        assert starved(crowd[0].pid) > 0.5
        assert starved(asleep[0].pid) < 0.3
    assert Starvation(2**22 - 1).share() == 0.0


def test_starvation_is_concluded_from_a_busy_processor_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system tells nothing of queues (Windows): all processors busy with others, and little of one for us."""
    from collections import namedtuple

    from trainerd.machine import starvation

    times = namedtuple("times", "user idle")
    seen = iter([times(0.0, 0.0), times(2.0, 0.0), times(4.0, 0.0), times(4.5, 1.5)])
    own = iter([0.0, 0.0, 0.6, 0.6])
    clock = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(starvation, "starved_seconds", None)
    monkeypatch.setattr(starvation.psutil, "cpu_times", lambda: next(seen))
    monkeypatch.setattr(starvation, "_tree", lambda pid: [pid])
    monkeypatch.setattr(starvation, "_cpu_seconds", lambda pid: next(own))
    monkeypatch.setattr(starvation.time, "monotonic", lambda: next(clock))
    looking = Starvation(1)
    assert [round(looking.share(), 3) for _ in range(4)] == [0.0, 1.0, 0.4, 0.0]




@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts what came from the disk")
def test_a_trainer_whose_memory_is_on_the_disk_is_not_hung(home: Home) -> None:
    """Three seconds without a sign of life, with a limit of one, in which every page has to be read from the disk first, as in a swap
    storm: it goes on, and nobody ends it."""
    supervisor = supervise_here(home, {**FAST, "at": 12, "do": "storm:3"}, config=config(hang=1))
    told = home.root / "storm.txt"
    assert told.exists(), journal(home)
    if int(told.read_text("ascii")) < 1000:
        pytest.skip("this folder's pages do not come from a disk (a file system in memory)")
    assert supervisor.result == status.COMPLETED and of(home, "hang") == [] and len(starts(home)) == 1
