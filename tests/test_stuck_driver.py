"""A driver that never answers again: nobody waits for it. And GPU memory of a dead trainer that the driver has not taken back yet."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import diagnosis, gpu_driver, outlook
from tests.supervised import QUICK, Daemon, journal, starts, supervise_here, wait_for
from tests.test_machine import FakeNvml
from trainerd.config.load import resolve
from trainerd.contract import status
from trainerd.contract.paths import Home
from trainerd.contract.status import Status
from trainerd.engine import locks
from trainerd.machine import gpu, memory
from trainerd.machine.asking import Asking
from trainerd.supervisor import reclaim
from trainerd.supervisor.reclaim import Reclaim, Seen
from trainerd.supervisor.room import Room, _Used
from trainerd.supervisor.sensors import Sensors

GB = 10**9
_STUCK = '''
"""In place of pynvml: a driver that takes the first call and never answers."""
import time

class NVMLError(Exception):
    pass

def nvmlInit():
    open({mark!r}, "w").close()
    time.sleep(10**6)
'''
ON_A_GPU = {"device": "cuda:0"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pynvml for the processes started from now on; the mark is there once it was asked."""
    folder, mark = tmp_path / "stuck", tmp_path / "asked"
    folder.mkdir()
    (folder / "pynvml.py").write_text(_STUCK.format(mark=str(mark)), "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return mark


def test_with_a_driver_that_never_answers_everything_else_goes_on(home: Home, stuck: Path) -> None:
    """Status, save, stop, and the end of the process, with a supervisor whose driver is stuck."""
    script = {"steps": 100_000, "every": 5, "pause": 0.01, **ON_A_GPU}
    with Daemon(home, script) as daemon:
        daemon.until(lambda reading: stuck.exists())
        first = daemon.until_step(30).status
        assert first is not None and first.memory.vram.used_bytes is None and first.memory.ram.used_bytes
        daemon.until(lambda reading: reading.status is not None and reading.status.updated_at >= first.updated_at + 2, 4)
        assert daemon.outcome(daemon.ask("save")) == "done"
        began = time.monotonic()
        daemon.ask("stop")
        daemon.until_state(status.STOPPED)
        assert daemon.process.wait(60) == 0 and time.monotonic() - began < 30


def test_a_trainer_that_hangs_is_found_while_the_driver_is_stuck(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very case: both hang in the driver. Found, ended, started again after the driver had its chance to answer, finished."""
    gate = threading.Event()

    def never() -> None:
        gate.wait(60)
        raise OSError("the driver has gone")

    monkeypatch.setattr(gpu, "_load", lambda: SimpleNamespace(nvmlInit=never, nvmlShutdown=never, NVMLError=OSError))
    monkeypatch.setattr(Asking.__init__, "__defaults__", (0.3,))
    script = {"steps": 20, "every": 5, "pause": 0.001, **ON_A_GPU}
    faults = {"task": "fake", "seed": 1, "faults": {"hang": 1}}
    supervisor = supervise_here(home, {**script, "at": 12, "do": "hang"}, script, config=faults)
    gate.set()
    assert supervisor.result == status.COMPLETED and len(starts(home)) == 2
    (hang,) = (event for event in journal(home) if event["kind"] == "hang")
    assert 1.0 <= float(str(hang["silent_seconds"])) < 10


def test_a_question_without_an_answer_is_answered_by_nothing() -> None:
    """The newest answer counts; while one is owed no other is asked; after five seconds (here a tenth) the old one is none any more; one
    that comes late is the newest again."""
    gates = [threading.Event() for _ in range(3)]
    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        gates[number].wait(10)
        return number * 10

    asking = Asking(ask, 0.1)
    assert asking.answer(0) is None and not asking.is_open and not asking.has_begun
    asking.want(0)
    assert asking.is_open and asking.has_begun
    gates[0].set()
    wait_for(lambda: asking.answer(0) == 0 and not asking.is_open, 5, "the first answer")
    asking.want(1)
    asking.want(2)
    assert asking.answer(1) is None and asking.is_open
    wait_for(lambda: not asking.is_open, 5, "patience to end")
    assert asking.answer(0) is None, "an old answer is no answer"
    gates[1].set()
    wait_for(lambda: asking.answer(1) == 10, 5, "the late answer")
    gates[2].set()
    asking.want(2)
    wait_for(lambda: asking.answer(2) == 20, 5, "the next answer")
    assert asked == [0, 1, 2] and asking.answer(1) is None, "the answer to another question"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_odd_driver_is_not_asked_in_every_second() -> None:
    """One that fails in a way nobody foresaw ends the thread, not the supervisor; it is asked again a minute later."""
    asked: list[int] = []

    def ask() -> int:
        asked.append(1)
        raise AttributeError("no such function")

    asking = Asking(ask, 0.05)
    for _ in range(20):
        asking.want()
        time.sleep(0.01)
    wait_for(lambda: not asking.is_open, 5, "the end of patience")
    assert asked == [1] and asking.answer() is None


@pytest.mark.parametrize(("plan", "expected"), [({"device": "cuda:1"}, "cuda:1"), (None, "cuda:0"), ({"device": "cpu"}, "cpu")], ids=str)
def test_a_trainer_whose_driver_is_stuck_still_takes_a_lock(
    plan: dict[str, str] | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of its plan's GPU by torch's name, of the first without a plan; never the CPU's, and who trains there asks nobody."""
    answers = threading.Event()

    class Silent(FakeNvml):
        def nvmlInit(self) -> None:
            assert plan != {"device": "cpu"} and answers.wait(60)
            super().nvmlInit()

    monkeypatch.setattr(locks, "_DRIVER_SECONDS", 0.1)
    began = time.monotonic()
    assert locks.device_name(plan, Silent("GPU-a", "GPU-b")) == expected
    assert time.monotonic() - began < 20.0
    answers.set()


def test_what_the_driver_told_last_is_unknown_once_it_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperature, load and used memory become n/a after five seconds (here a tenth), never stay as they were; RAM goes on."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("trainerd.supervisor.sensors._SECOND", 0.0)
    monkeypatch.setattr(Asking.__init__, "__defaults__", (0.1,))
    gate = threading.Event()
    gate.set()

    class Nvml(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:
            gate.wait(10)
            return super().nvmlDeviceGetCount()

    sensors, shown = Sensors({}, gpu.GpuReader(Nvml("GPU-a"))), Status()
    shown.trainer.pid, shown.plan.device = 1, "cuda"

    def sampled(known: bool) -> bool:
        sensors.sample(shown)
        return (shown.gpu.temperature_c is not None) == known

    wait_for(lambda: sampled(True), 5, "the first answer")
    assert shown.memory.vram.used_bytes is not None
    gate.clear()
    wait_for(lambda: sampled(False), 5, "the answer to become unknown")
    assert shown.memory.vram.used_bytes is None and shown.memory.ram.used_bytes
    gate.set()
    wait_for(lambda: sampled(True), 5, "the driver's return")


def test_a_process_that_cannot_be_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the memory of a trainer that is stuck in the kernel may never end."""
    gate = threading.Event()
    monkeypatch.setattr(memory, "process_tree_bytes", lambda pid: gate.wait(10) and 7)
    monkeypatch.setattr("trainerd.supervisor.sensors._YOUNG_TREE_SECONDS", 0.0)
    sensors, shown = Sensors({}), Status()
    shown.trainer.pid, shown.trainer.started_at = 1, time.time()
    began = time.monotonic()
    for _ in range(20):
        sensors.sample(shown)
    assert time.monotonic() - began < 8 and shown.memory.ram.trainer_bytes is None
    gate.set()

    def sampled() -> bool:
        sensors.sample(shown)
        return shown.memory.ram.trainer_bytes == 7

    wait_for(sampled, 5, "the answer")


def test_waiting_for_memory_of_the_gpu_waits_for_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked, not waited for; a driver that does not answer in time tells nothing, and the trainer finds out by itself."""
    gate = threading.Event()
    monkeypatch.setattr(gpu, "devices", lambda: gate.wait(10) and [])
    monkeypatch.setattr(Asking.__init__, "__defaults__", (0.1,))
    waiting = Room(15.0, _Used())
    waiting.made({"resource": "vram", "own_bytes": GB, "ceiling_bytes": 3 * GB}, 0.0)
    assert "the GPU's driver is asked" in str(waiting.waits(1.0))
    wait_for(lambda: waiting.waits(2.0) is None, 5, "patience to end")
    gate.set()


# --- GPU memory after a death


def _status(device: str = "cuda:0", used: int | None = 3 * GB, reserved: int | None = 2 * GB) -> Status:
    shown = Status()
    shown.plan.device, shown.memory.vram.used_bytes, shown.memory.vram.reserved_bytes = device, used, reserved
    return shown


def _until_free(found: Reclaim, seen: list[Seen | None], now: float) -> str | None:
    """One look at what `seen` says, with its answer."""
    said = found.waits(now)
    if said is not None:
        wait_for(lambda: not found._asking.is_open, 5, "the answer")
    return said


def test_the_next_trainer_waits_until_the_driver_has_the_memory_back() -> None:
    """The process is off its list, and what its allocator had is free; a trainer on the CPU is not waited for."""
    seen: list[Seen | None] = [Seen(3 * GB, frozenset({7, 8}))]
    found = Reclaim(lambda kind, **facts: None, lambda device: seen[0])
    assert found.waits(0.0) is None, "nobody has left"
    found.left(7, _status("cpu"))
    assert found.waits(0.0) is None and not found.is_waiting
    found.left(7, _status())
    assert "taken back the GPU memory" in str(_until_free(found, seen, 1.0))
    assert _until_free(found, seen, 2.0) is not None
    seen[0] = Seen(3 * GB, frozenset({8}))
    assert _until_free(found, seen, 3.0) is not None
    assert _until_free(found, seen, 4.0) is not None, "off the list, and its memory still in use"
    seen[0] = Seen(GB + GB // 10, frozenset({8}))
    assert _until_free(found, seen, 5.0) is not None
    assert _until_free(found, seen, 6.0) is None and not found.is_waiting


@pytest.mark.parametrize("seen", [Seen(3 * GB, frozenset({7})), Seen(3 * GB, frozenset())])
def test_memory_that_never_comes_back_is_waited_for_twenty_seconds(seen: Seen) -> None:
    """Then somebody else has it, or the driver keeps it: an event, and the trainer finds out."""
    told: list[dict[str, Any]] = []
    found = Reclaim(lambda kind, **facts: told.append({"kind": kind, **facts}), lambda device: seen)
    found.left(7, _status())
    assert all(_until_free(found, [seen], float(second)) is not None for second in range(20))
    assert _until_free(found, [seen], 20.0) is None and not found.is_waiting
    assert told == [{"kind": "vram not given back", "seconds": 20.0, "used_bytes": 3 * GB, "trainer": 7}]


def test_where_the_driver_tells_nothing_nobody_waits() -> None:
    """No driver, or one that tells no numbers: the list of processes has to do, or nothing."""
    for seen in (None, Seen(None, frozenset())):
        found = Reclaim(lambda kind, **facts: None, lambda device, seen=seen: seen)
        found.left(7, _status(used=None))
        assert _until_free(found, [seen], 1.0) is not None and found.waits(2.0) is None


def test_a_supervisor_starts_the_next_trainer_when_the_memory_is_back(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed trainer whose memory the driver keeps for half a second: started after that, one death, and the run is finished."""
    died: list[float] = []

    def look(device: int) -> Seen:
        died.append(time.monotonic())
        held = time.monotonic() - died[0] < 0.5
        return Seen(None, frozenset({starts(home)[0][1]} if held else set()))

    monkeypatch.setattr(reclaim, "_look", look)
    monkeypatch.setattr(gpu, "_load", lambda: None)
    first = {"steps": 12, "at": 6, "do": "signal:9", **ON_A_GPU}
    supervisor = supervise_here(home, first, {"steps": 12, **ON_A_GPU}, timing=QUICK)
    assert supervisor.result == "completed" and len(starts(home)) == 2
    assert starts(home)[1][0] - died[0] >= 0.5
    assert [event["kind"] for event in journal(home)].count("death") == 1


def test_no_command_waits_for_a_driver_that_is_stuck(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` and `doctor` answer about the CPU and say why, and wait once, not for every question; when it answers again, so does it."""
    gate, asked = threading.Event(), []

    def never() -> None:
        asked.append(1)
        gate.wait(30)
        raise OSError("the driver has gone")

    monkeypatch.setattr(gpu, "_load", lambda: SimpleNamespace(nvmlInit=never, nvmlShutdown=never, NVMLError=OSError))
    monkeypatch.setattr(gpu_driver, "_driver", gpu_driver.Driver(0.2))
    began = time.monotonic()
    found = outlook.look(home, resolve("cadence"))
    assert isinstance(found, outlook.Outlook) and found.place.device == "cpu"
    assert any(gpu_driver.STUCK in note and "about the CPU" in note for note in found.notes), found.notes
    examined = diagnosis.examine(home)
    assert any(one.level == "problem" and one.text == gpu_driver.STUCK for one in examined)
    assert len(asked) == 1 and time.monotonic() - began < 10
    gate.set()
    wait_for(lambda: gpu_driver.devices() == [] and not gpu_driver.is_stuck(), 10, "the driver to answer again")
