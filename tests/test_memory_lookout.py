"""RAM that becomes short in the middle of something long: seen at once, met at the edge of a micro-batch, or by preparing later."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.supervised import wait_for
from tests.toy import Script, Toy, config, run
from tests.trainers import PREPARING, RunningTrainer, new_run, outcome
from trainerd.contract import wire
from trainerd.contract.paths import RunPaths
from trainerd.engine import aside, pressure
from trainerd.engine.lookout import Growing
from trainerd.machine.memory import RamFacts

GB = 1_000_000_000
# The trainer's machine has 16 GB, of which as many are in use as a file says.
_MACHINE = (
    PREPARING
    + '''
from pathlib import Path
from trainerd.engine import aside, guard, pressure
from trainerd.machine import memory

_FOLDER = Path(__file__).parent
pressure._PATIENCE_SECONDS = 2.0
aside._HOLD_SECONDS = 1.0
memory.ram = lambda pid=None: memory.RamFacts(int((_FOLDER / "used.txt").read_text() or 0), 16_000_000_000)
memory.process_tree_bytes = lambda pid: int((_FOLDER / "own.txt").read_text())
guard._senses = lambda device: guard.Senses(memory.ram, lambda: 2_000_000_000, lambda: None, lambda share: None)

class Long(Tiny):
    """A micro-batch takes five seconds once a file says so."""

    def loss(self, model, batch, ctx):
        if (_FOLDER / "long.txt").exists():
            (_FOLDER / "began.txt").touch()
            time.sleep(5)
        return super().loss(model, batch, ctx)
'''
)


class Machine:
    """Writes what is in use, whole at once."""

    def __init__(self, paths: RunPaths, used: float = 4, own: float = 2) -> None:
        self._folder = paths.task
        self.uses(used)
        (self._folder / "own.txt").write_text(str(int(own * GB)), "ascii")

    def uses(self, gigabytes: float) -> float:
        """From now on; returns the time."""
        new = self._folder / "used.new"
        new.write_text(str(int(gigabytes * GB)), "ascii")
        new.replace(self._folder / "used.txt")
        return time.monotonic()


def note(trainer: RunningTrainer, kind: str) -> dict[str, Any]:
    return trainer.wait_for(wire.NOTE, lambda message: message["kind"] == kind)


def test_in_a_long_micro_batch_a_shortage_is_seen_within_two_seconds(tmp_path: Path) -> None:
    """Five seconds each: told within two, that it is nearly the end at once, too; and left at the first edge, not the one after."""
    paths = new_run(tmp_path, source=_MACHINE, class_name="Long", train={"micro_batch": 8, "epochs": 50})
    machine = Machine(paths)
    trainer = RunningTrainer(paths)
    trainer.wait_for_step(3)
    (paths.task / "long.txt").touch()
    wait_for((paths.task / "began.txt").exists, 10, "a long micro-batch to begin")
    began = machine.uses(15)
    assert note(trainer, "ram_short")["monotonic"] - began < 4.0
    machine.uses(15.6)
    time.sleep(1.1)  # one look at it, so that the next one sees it grow
    grew = machine.uses(15.7)
    assert note(trainer, "ram_at_its_last")["monotonic"] - grew < 4.0
    assert "hardly any RAM left" in trainer.wait_for(wire.WARNING)["text"]
    assert trainer.exit_code() == wire.EXIT_NO_ROOM
    assert trainer.of(wire.NO_ROOM)[0]["monotonic"] - began < 9.0


def test_preparing_steps_aside_for_others_and_goes_on_later(tmp_path: Path) -> None:
    """`waiting`, with the reason; what was prepared is not lost to it, and the result is that of a run nobody disturbed."""
    paths = new_run(tmp_path / "tight", source=_MACHINE, class_name="Prepares", train={"epochs": 1})
    machine = Machine(paths)
    trainer = RunningTrainer(paths, TINY_PREPARE="600")
    trainer.wait_for(wire.PHASE, lambda message: message["name"] == "preparing" and (message["done"] or 0) > 5)
    machine.uses(15)
    waiting = trainer.wait_for(wire.WAITING)
    assert "Preparing the data waits for memory: RAM is short: 15.0 GB in use, 14.0 GB allowed" in waiting["reason"]
    told = note(trainer, "stepped_aside")
    assert (told["own_bytes"], told["ceiling_bytes"]) == (2 * GB, 14 * GB)
    (paths.task / "own.txt").write_text("0", "ascii")
    machine.uses(11)
    assert trainer.exit_code() == wire.EXIT_FINISHED, trainer.text()[-2000:]
    assert trainer.text().count("preparing ") == 2
    ample = new_run(tmp_path / "ample", source=_MACHINE, train={"epochs": 1})
    Machine(ample)
    assert RunningTrainer(ample).exit_code() == wire.EXIT_FINISHED
    assert outcome(paths) == outcome(ample)


def test_a_preparation_that_needs_more_than_the_limit_goes_on(tmp_path: Path) -> None:
    """Nobody else would gain: it is said, once, and it is prepared."""
    paths = new_run(tmp_path, source=_MACHINE, class_name="Prepares", train={"epochs": 1})
    machine = Machine(paths, own=11)
    trainer = RunningTrainer(paths, TINY_PREPARE="600")
    trainer.wait_for(wire.PHASE, lambda message: message["name"] == "preparing" and (message["done"] or 0) > 5)
    machine.uses(15)
    assert "memory.ram_limit is 14.0 GB" in trainer.wait_for(wire.WARNING)["text"]
    machine.uses(4)
    assert trainer.exit_code() == wire.EXIT_FINISHED and not trainer.of(wire.WAITING)
    assert len(trainer.of(wire.WARNING)) == 1


def test_a_preparation_comes_back_by_the_rule_of_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room with something to spare for 15 seconds without a break; short again within ten minutes of that, 30, and 15 minutes at most;
    later 15 again. It says meanwhile what it waits for."""
    now, link, short = [0.0], Script(), list[tuple[float, float]]()
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(aside, "time", clock)

    def ram() -> RamFacts:
        return RamFacts(int(11.9 * GB) if any(begin <= now[0] < end for begin, end in short) else 11 * GB, 16 * GB)

    monkeypatch.setattr(aside.memory, "ram", ram)
    waiting, wanted = aside.Waiting(link.send), pressure.Want(pressure.LEAVE, "RAM is short", "ram", 14 * GB, 2 * GB)

    def seconds_until_room(at: float, *shortages: tuple[float, float]) -> float:
        now[0], short[:] = at, [(at + begin, at + end) for begin, end in shortages]
        waiting.until_room(wanted)
        return now[0] - at

    assert seconds_until_room(0, (0, 5), (12, 13)) == 28
    assert seconds_until_room(100) == 30 and seconds_until_room(200) == 60
    assert [seconds_until_room(1000.0 * number) for number in range(1, 3)] == [15, 15]
    quick = [seconds_until_room(now[0] + 1) for _ in range(8)]
    assert quick == [30, 60, 120, 240, 480, 900, 900, 900]
    assert {event["reason"] for event in link.of(wire.WAITING)} == {"Preparing the data waits for memory: RAM is short."}


def test_what_is_told_of_a_shortage_is_told_once_for_each() -> None:
    """An event when it begins, not in every second of it, and none of two within a minute; the last of the RAM only while it grows."""
    link = Script()
    growing = Growing(link.send)

    def looks(seconds: int, used: float, began: int) -> list[str]:
        before = len(link.of(wire.NOTE))
        for second in range(began, began + seconds):
            growing.seen(float(second), RamFacts(int(used * GB), 16 * GB), over=used > 14, ceiling_bytes=14 * GB)
        return [event["kind"] for event in link.of(wire.NOTE)[before:]]

    assert looks(10, 4, 0) == [] and looks(30, 15, 10) == ["ram_short"]
    assert looks(5, 4, 40) == [] and looks(10, 15, 45) == [], "within a minute"
    assert looks(30, 4, 55) == [] and looks(1, 15, 85) == ["ram_short"]
    assert looks(1, 15.8, 86) == ["ram_at_its_last"] and looks(100, 15.8, 87) == [], "it does not grow"
    assert looks(1, 15.9, 200) == ["ram_at_its_last"]
    assert len({event["text"] for event in link.of(wire.WARNING)}) == 1


def test_the_thread_that_looks_ends_with_the_training(tmp_path: Path) -> None:
    """Whether it ends well or badly."""

    class Failing(Toy):
        def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
            assert [thread.name for thread in threading.enumerate()].count("lookout") == 1
            if ctx.step == 3:
                raise KeyError("in the middle")
            return super().loss(model, batch, ctx)

    try:
        run(tmp_path, config({"max_steps": 5}), task=Failing())
    except KeyError:
        pass
    assert "lookout" not in [thread.name for thread in threading.enumerate()]
