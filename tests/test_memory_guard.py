"""The watch over the limits: cleaning that pays or stops, the cap that follows the others, smaller parts, and leaving to make room."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.supervised import QUICK, journal, starts, supervise_here
from tests.test_memory_faults import Runs
from tests.toy import Script, Toy, config, lines, run, same
from tests.trainers import TASK, RunningTrainer, new_run, newest_step
from trainerd.config.model import MemoryConfig
from trainerd.contract import wire
from trainerd.contract.paths import Home
from trainerd.engine import cleaning, guard
from trainerd.engine.guard import DeviceUse, MemoryWatch, Senses
from trainerd.engine.pressure import LEAVE, NOTHING, SHRINK, Pressure
from trainerd.engine.spill import Evidence, SpillWatch
from trainerd.machine import gpu
from trainerd.machine.memory import RamFacts
from trainerd.supervisor.room import Room

GB = 1_000_000_000
CPU = torch.device("cpu")


@dataclass
class Machine:
    """What the guard sees, and what a cleaning does: `frees` bytes, `takes_back` of them within the next steps."""

    used: int = 4 * GB
    total: int = 16 * GB
    own: int = 2 * GB
    frees: int = 0
    vram: DeviceUse | None = None
    cap: float | None = None
    cleanings: int = 0

    def senses(self) -> Senses:
        return Senses(lambda: RamFacts(self.used, self.total), lambda: self.own, lambda: self.vram, self._cap)

    def _cap(self, share: float) -> None:
        self.cap = share

    def free(self) -> None:
        self.cleanings += 1
        self.used -= self.frees
        self.own -= self.frees
        if self.vram is not None:
            idle = self.vram.reserved_bytes - self.vram.allocated_bytes
            allocated = self.vram.allocated_bytes
            self.vram = DeviceUse(self.vram.used_bytes - idle, self.vram.total_bytes, allocated, allocated)


def watch(machine: Machine, link: Script, patch: pytest.MonkeyPatch, limit: str = "14GB", **more: Any) -> MemoryWatch:
    patch.setattr(cleaning.Cleaner.__init__, "__defaults__", (machine.free,))
    return MemoryWatch(MemoryConfig(ram_limit=limit, vram_limit="3.5GB"), CPU, link.send, senses=machine.senses(), **more)


def follow(found: MemoryWatch, seconds: int, each: Callable[[int], None] = lambda second: None, began: int = 0) -> list[tuple[int, str]]:
    """What is wanted, and at which second; ten steps a second."""
    wanted = []
    for tick in range(began * 10, (began + seconds) * 10):
        if tick % 10 == 0:
            each(tick // 10)
        want = found.look(tick / 10, tick)
        if want.what:
            wanted.append((tick // 10, want.what))
            found.done()
    return wanted


def notes(link: Script, kind: str) -> list[dict[str, Any]]:
    return [event for event in link.of("note") if event["kind"] == kind]


# --- cleaning


def test_cleaning_that_frees_nothing_backs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit with nothing to free: 2, 4, 8, … seconds apart, not every second."""
    machine, link = Machine(used=15 * GB), Script()
    found = watch(machine, link, monkeypatch)
    follow(found, 60)
    assert machine.cleanings == 5 == link.of("memory")[-1]["cleanups"]
    assert [note["next_in_seconds"] for note in notes(link, "cleanup")] == [2, 4, 8, 16, 32]


def test_cleaning_stops_below_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cleaning that helps is one cleaning, and what it was worth is an event, ten steps later."""
    machine, link = Machine(used=15 * GB, own=6 * GB, frees=4 * GB), Script()
    follow(watch(machine, link, monkeypatch), 20)
    assert machine.cleanings == 1
    first, lasted = notes(link, "cleanup")[0], notes(link, "cleanup_lasted")[0]
    assert first["freed_bytes"] == lasted["freed_bytes"] == lasted["still_free_bytes"] == 4 * GB
    assert first["milliseconds"] >= 0 and lasted["step"] == first["step"] + 10


@pytest.mark.parametrize("lasting", [True, False])
def test_what_is_taken_again_was_not_worth_cleaning(lasting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that the next steps fill again is emptied ever more rarely; bytes that stay free keep the pause short."""
    machine, link = Machine(used=15 * GB, own=8 * GB, frees=GB // 10), Script()

    def each(second: int) -> None:
        if not lasting:
            machine.own, machine.used = 8 * GB, 15 * GB
        else:
            machine.used = 15 * GB  # others keep it high

    follow(watch(machine, link, monkeypatch), 40, each)
    freed = [note["still_free_bytes"] for note in notes(link, "cleanup_lasted")]
    assert all(bytes_ >= GB // 10 for bytes_ in freed) if lasting else set(freed) == {0}
    assert machine.cleanings > 12 if lasting else machine.cleanings <= 5


def test_all_cleaning_together_stays_below_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second each, always worth it: in an hour no more than 0.2 % of it, by the engine's own counter."""
    machine, link = Machine(used=15 * GB, own=8 * GB, frees=GB // 10), Script()
    times = iter(range(10**6))
    monkeypatch.setattr(cleaning.time, "perf_counter", lambda: next(times) * 0.5)
    found = watch(machine, link, monkeypatch)
    follow(found, 3600, lambda second: setattr(machine, "used", 15 * GB))
    assert machine.cleanings > 5 and found.cleaner.seconds == machine.cleanings * 0.5 <= 3600 * 0.002
    assert link.of("memory")[-1]["cleanup_seconds"] == found.cleaner.seconds


def test_ordinary_steps_clean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred steps with evaluations and checkpoints: no collection, no empty_cache, no trim, and the counters say so."""
    calls: list[str] = []
    real = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *a: calls.append("collect") or real(*a))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(guard, "free", lambda: calls.append("free"))
    monkeypatch.setattr(cleaning, "free", lambda: calls.append("free"))
    during: list[int] = []

    class Counting(Toy):
        def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
            during.append(len(calls))
            return super().loss(model, batch, ctx)

    link = Script()
    run(tmp_path, config({"max_steps": 200, "epochs": 40, "eval_every_steps": 25}), link, Counting())
    assert len(during) > 200 and len(set(during)) == 1, calls
    assert all(event["cleanups"] == 0 and event["cleanup_seconds"] == 0 for event in link.of("memory"))


# --- pressure


def pressure(limit: int = 14 * GB, used: int = 4 * GB, *, may_leave: bool = True) -> Pressure:
    return Pressure("ram", limit, 16 * GB, used, may_leave=may_leave)


def judged(found: Pressure, seconds: int, used: int, own: int = 2 * GB, saving: int | None = None) -> list[tuple[int, str]]:
    wants = [(second, found.judge(float(second), used, own, saving).what) for second in range(seconds)]
    return [(second, what) for second, what in wants if what]


def test_growth_of_others_is_met_with_smaller_parts_within_two_seconds() -> None:
    """When those are enough; their effect is waited for, and then we go."""
    assert judged(pressure(), 13, 15 * GB, saving=2 * GB) == [(1, SHRINK), (11, SHRINK)]
    found = pressure()
    assert [found.judge(0, 15 * GB, GB, 2 * GB).what, found.judge(1, 15 * GB, GB, 2 * GB).what] == [NOTHING, SHRINK]
    assert [found.judge(n, 15 * GB, GB, None).what for n in (2, 10, 11)] == [NOTHING, NOTHING, LEAVE]


def test_where_smaller_parts_are_not_enough_the_training_leaves() -> None:
    """After ten seconds, with words for a person; it keeps its exactness."""
    found = pressure()
    assert judged(found, 11, 15 * GB, saving=GB // 2) == [(10, LEAVE)]
    want = found.judge(11, 15 * GB, 2 * GB, None)
    assert want.because == "RAM is short: 15.0 GB in use, 14.0 GB allowed" and want.own_bytes == 2 * GB


def test_a_short_peak_is_waited_out() -> None:
    """What is below the limit again within ten seconds was nothing."""
    found = pressure()
    for second in range(100):
        assert not found.judge(second, 13 * GB if second % 8 == 0 else 15 * GB, 2 * GB, None).what


def test_nobody_leaves_for_nothing() -> None:
    """One who is not started again, one who holds next to nothing, and one whose limit was passed before he came."""
    assert judged(pressure(may_leave=False), 60, 15 * GB) == []
    assert judged(pressure(), 60, 15 * GB, own=GB // 10) == []


def test_one_who_has_passed_the_limit_by_himself_does_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else has grown: started again it would come to the same place, and wait for ever for memory that it holds itself. It is said,
    once; when others grow as well, it leaves."""
    found = Pressure("ram", 14 * GB, 16 * GB, 4 * GB, GB, may_leave=True)
    assert judged(found, 100, 15 * GB, own=12 * GB) == [] and found.is_ours
    assert [found.judge(100.0 + n, 15 * GB, 10 * GB, None).what for n in range(2)] == [LEAVE] * 2
    machine, link = Machine(used=4 * GB, own=GB), Script()
    watching = watch(machine, link, monkeypatch, may_leave=True)
    follow(watching, 2)
    machine.used, machine.own = 15 * GB, 12 * GB
    assert follow(watching, 60, began=2) == []
    (said,) = link.of("warning")
    assert "The training itself takes more RAM (12.0 GB) than memory.ram_limit leaves it" in said["text"]


def test_what_is_kept_from_step_to_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM that grows evenly, far beyond what was foretold: said with what a step adds and how many times the estimate it is, in place of
    advice about the model; and one that starts anew needs what was foretold, or held at first."""
    machine, link = Machine(used=4 * GB, own=GB // 2), Script()
    watching = watch(machine, link, monkeypatch, may_leave=True)
    watching.foretold = lambda: GB // 2

    def each(second: int) -> None:  # ten steps a second, 20 MB each
        machine.used, machine.own = 4 * GB + second * GB // 5, GB // 2 + second * GB // 5

    follow(watching, 70, each)
    (said,) = link.of("warning")
    assert "its RAM grows by 20.0 MB a step" in said["text"] and "times what was foretold" in said["text"], said
    assert "keeps something from step to step" in said["text"] and "smaller model" not in said["text"] and len(said["text"]) < 330
    leak = watching.leak()
    assert leak is not None and leak.own_bytes > 10 * GB and leak.needs_bytes <= GB
    cache = Machine(used=4 * GB, own=GB // 2)
    settled = watch(cache, Script(), monkeypatch)
    settled.foretold = lambda: GB // 2
    follow(settled, 70, lambda second: setattr(cache, "own", GB // 2 + min(second, 20) * GB // 5))  # it fills, and then is full
    assert settled.leak() is None


def test_a_limit_that_was_passed_before_is_no_reason_to_leave() -> None:
    """What is there in the first minute, our own first steps included, is where growth is counted from."""
    found = pressure(limit=4 * GB, used=6 * GB)
    assert judged(found, 61, 8 * GB) == []
    assert [found.judge(61.0 + n, 8 * GB + GB // 2, 2 * GB, None).what for n in range(20)] == [NOTHING] * 20
    assert [found.judge(81.0 + n, 9 * GB, 2 * GB, None).what for n in range(11)] == [NOTHING] * 10 + [LEAVE]


def test_the_cap_follows_the_others_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A game takes 1.5 GB: within a second our blocks that lie idle are given back and the cap is lower; we stay as long as weights fit."""
    machine, link = Machine(vram=DeviceUse(2 * GB, 4 * GB, int(1.5 * GB), GB)), Script()
    found = watch(machine, link, monkeypatch, may_leave=True)
    assert follow(found, 5) == [] and machine.cap == pytest.approx((3.5 - 0.5 - 0.067) / 4, abs=0.001)
    machine.vram = DeviceUse(int(3.6 * GB), 4 * GB, int(1.5 * GB), GB)
    assert follow(found, 3, began=5) == []
    assert machine.cleanings == 1 and machine.cap == pytest.approx((3.5 - 2.1 - 0.067) / 4, abs=0.001)


def test_when_not_even_the_weights_fit_beside_the_others_the_training_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """After ten seconds; nothing smaller would help."""
    machine, link = Machine(vram=DeviceUse(2 * GB, 4 * GB, int(1.5 * GB), GB)), Script()
    found = watch(machine, link, monkeypatch, may_leave=True)
    follow(found, 2)
    machine.vram = DeviceUse(int(3.9 * GB), 4 * GB, GB, GB)
    assert follow(found, 14, began=2)[0] == (12, LEAVE)
    assert "GPU memory is short" in found.look(20.0, 1000).because


def test_what_smaller_parts_leave_free_goes_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heap keeps it otherwise, and the training would leave for memory that it does not use: cleaned at the next look."""
    machine, link = Machine(frees=0), Script()
    found = watch(machine, link, monkeypatch, may_leave=True)
    found.saving = lambda: 2 * GB
    follow(found, 5)
    machine.used, machine.own = 15 * GB, 4 * GB
    began = machine.cleanings
    monkeypatch.setattr(cleaning.time, "perf_counter", iter(range(10**6)).__next__)  # a second each: more than the share allows
    assert follow(found, 2, began=5) == [(6, SHRINK)]
    machine.frees = 2 * GB
    assert follow(found, 20, began=7) == [] and machine.cleanings == began + 2 and machine.used == 13 * GB


def test_needed_cleanings_pass_once_in_ten_seconds_and_are_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take a little more of the GPU every second, and each time the cap falls: beyond the share one cleaning in ten seconds
    passes, nothing is forgotten, and what has passed is charged: the threshold's own have to wait for it."""
    machine, link = Machine(vram=DeviceUse(2 * GB, 4 * GB, int(1.5 * GB), GB // 2)), Script()
    times = iter(range(10**6))
    monkeypatch.setattr(cleaning.time, "perf_counter", lambda: next(times) * 0.1)
    found = watch(machine, link, monkeypatch)

    def each(second: int) -> None:
        reserved = int(1.5 * GB)
        machine.vram = DeviceUse(int(3.51 * GB) + second * GB // 10, 10 * GB, reserved, GB // 2)

    follow(found, 40, each)
    assert 4 <= machine.cleanings <= 5 and found.cleaner.seconds == pytest.approx(machine.cleanings * 0.1)
    machine.used, machine.vram = 15 * GB, DeviceUse(2 * GB, 4 * GB, GB, GB)
    began = machine.cleanings
    follow(found, 150, began=40)
    assert machine.cleanings == began, "0.2 % of three minutes are spent"


# --- in a training


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine for the engine, whose seconds pass with the steps."""
    found = Machine()
    monkeypatch.setattr(guard, "_senses", lambda device: found.senses())
    monkeypatch.setattr(guard, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr("trainerd.engine.pressure._PATIENCE_SECONDS", 0.0)
    return found


class Growing(Toy):
    """Another program takes 11 GB when the fourth step begins."""

    machine: Machine
    grows_at = 3

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        if ctx.training and ctx.step == self.grows_at:
            self.machine.used = 15 * GB
        return super().loss(model, batch, ctx)


def test_a_training_shrinks_when_others_grow(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named event, the plan, since when it is not exact; and the bits are those of a run with that micro-batch from there on."""
    asked = config({"max_steps": 7, "micro_batch": 4}, checkpoint={"every_steps": 2, "exact": True})

    class Relieved(Script):
        def send(self, event: str, **fields: Any) -> None:
            super().send(event, **fields)
            if event == wire.PLAN and fields["micro_batch"] == 2:
                machine.used = 4 * GB

    task, link = Growing(), Relieved()
    task.machine = machine
    monkeypatch.setattr("trainerd.engine.relief.saving_bytes", lambda training: 2 * GB)
    run(tmp_path / "tight", asked, link, task)
    note = notes(link, "shrunk")[0]
    assert len(notes(link, "shrunk")) == 1 and note["micro_batch"] == 2 and "RAM is short" in note["text"]
    assert link.of("plan")[-1]["micro_batch"] == 2 and link.of("exact")[-1]["since_step"] == note["step"]
    assert same(Runs(tmp_path, asked).calm((note["step"], 2), monkeypatch), tmp_path / "tight")


def test_after_the_last_step_nothing_is_made_smaller(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others grow while the last step is taken: every step of the run was exact, and it is not said of one that there is not."""

    class Late(Growing):
        def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
            if ctx.training and ctx.step == 6:
                self.machine.used = 15 * GB
            return Toy.loss(self, model, batch, ctx)

    task, link = Late(), Script()
    task.machine = machine
    monkeypatch.setattr("trainerd.engine.relief.saving_bytes", lambda training: 2 * GB)
    assert run(tmp_path, config({"max_steps": 7, "micro_batch": 4}), link, task).outcome == "finished"
    assert not notes(link, "shrunk") and link.of("exact")[-1]["since_step"] is None


def test_a_training_that_leaks_is_started_anew_for_what_it_needs(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving, it tells that it keeps something and what one without that needs; that is what is waited for, not the leak."""

    class Leaking(Growing):
        def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
            self.machine.own += GB // 10
            return super().loss(model, batch, ctx)

    monkeypatch.setattr("trainerd.engine.relief._foretold_bytes", lambda training: GB)
    task, link = Leaking(), Script()
    task.machine, link.starts_again = machine, True
    asked = config({"max_steps": 20, "micro_batch": 4})
    monkeypatch.setattr(Growing, "grows_at", 10)
    assert run(tmp_path, asked, link, task).outcome == "made room"
    (told,) = link.of(wire.NO_ROOM)
    assert told["own_bytes"] > 4 * GB and told["needs_bytes"] < 3 * GB and "keeps something from step to step" in told["reason"]
    room = Room(15.0, lambda resource: (21 * GB // 2, 16 * GB))
    room.made(told, 0.0)
    assert "stays so" in str(room.waits(1.0)), "10.5 GB of others and what it needs are below the limit"


def test_a_training_leaves_when_others_grow_and_goes_on_later(machine: Machine, tmp_path: Path) -> None:
    """It saves first; started again it goes on, and the bits are those of a run that nobody disturbed."""
    asked = config({"max_steps": 7, "micro_batch": 4})
    task, link = Growing(), Script()
    task.machine, link.starts_again = machine, True
    result = run(tmp_path / "tight", asked, link, task)
    assert result.outcome == "made room" and 3 <= result.step < 7
    told = link.of(wire.NO_ROOM)
    assert len(told) == 1 and told[0]["own_bytes"] == 2 * GB and told[0]["ceiling_bytes"] == 14 * GB
    assert link.of("checkpoint")[-1]["step"] == result.step
    machine.used = 4 * GB
    run(tmp_path / "tight", asked)
    machine.used = 4 * GB
    run(tmp_path / "ample", asked)
    assert same(tmp_path / "ample", tmp_path / "tight")
    assert not [line for line in lines(tmp_path / "tight") if line.get("epoch") is None and "loss" in line]


def test_a_step_that_fits_no_more_beside_others_is_left_for_later(machine: Machine, tmp_path: Path) -> None:
    """Not even one sample fits while another program is there: saved, left, and the same bits in the end. Without others it is an error."""

    class Starved(Growing):
        def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
            found = super().loss(model, batch, ctx)
            if ctx.training and self.machine.used > 14 * GB:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return found

    class Whole(Toy):
        splittable = False

    asked = config({"max_steps": 7}, memory={"ram_limit": "14GB"})
    task, link = type("One", (Starved,), {"splittable": False})(), Script()
    task.machine, link.starts_again = machine, True
    assert run(tmp_path / "tight", asked, link, task).outcome == "made room"
    machine.used = 4 * GB
    run(tmp_path / "tight", asked, task=Whole())
    run(tmp_path / "ample", asked, task=Whole())
    assert same(tmp_path / "ample", tmp_path / "tight")


_SHORT = (
    TASK
    + """
from trainerd.engine import guard, pressure
from trainerd.machine.memory import RamFacts

guard._LOOK_SECONDS = pressure._PATIENCE_SECONDS = 0.0
looks = []

def ram():
    looks.append(1)
    return RamFacts(15_000_000_000 if len(looks) > 20 else 4_000_000_000, 16_000_000_000)

guard._senses = lambda device: guard.Senses(ram, lambda: 2_000_000_000, lambda: None, lambda share: None)
"""
)


def test_a_real_trainer_says_why_it_leaves(tmp_path: Path) -> None:
    """A process with its pipes: a checkpoint first, the event with what is needed, and an exit code of its own."""
    paths = new_run(tmp_path, source=_SHORT, train={"micro_batch": 8})
    trainer = RunningTrainer(paths)
    assert trainer.exit_code() == wire.EXIT_NO_ROOM, trainer.text()[-2000:]
    told, saved = trainer.of(wire.NO_ROOM)[0], trainer.of(wire.CHECKPOINT)[-1]
    assert told["resource"] == "ram" and told["own_bytes"] == 2 * GB and told["ceiling_bytes"] == 14 * GB
    assert saved["step"] == newest_step(paths) >= 10 and not (paths.model / "result.json").exists()


# --- the supervisor's part


def test_a_trainer_that_made_room_is_started_again_when_there_is_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`waiting` with the reason, no death, no restart counted; the wait ends when there has been enough for a while."""
    home = Home(tmp_path / "home")
    looks: list[int] = []

    def ram() -> RamFacts:
        looks.append(1)
        return RamFacts(15 * GB if len(looks) < 6 else 4 * GB, 16 * GB)

    monkeypatch.setattr("trainerd.supervisor.room.memory.ram", ram)
    supervisor = supervise_here(home, {"steps": 12, "at": 6, "do": "no-room"}, {"steps": 12}, timing=QUICK)
    assert supervisor.result == "completed" and len(starts(home)) == 2
    assert supervisor.report.status.trainer.restarts == 0
    kinds = [event["kind"] for event in journal(home)]
    assert "made room" in kinds and "death" not in kinds and len(looks) >= 7


def test_there_must_be_room_for_a_while() -> None:
    """Enough for the training, with something to spare, without a break; after a quick return the next wait is twice as long."""
    used = [15 * GB]
    room = Room(15.0, lambda resource: (used[0], 16 * GB))
    assert room.waits(0.0) is None, "nobody has left"
    room.made({"resource": "ram", "own_bytes": 2 * GB, "ceiling_bytes": 14 * GB}, 0.0)
    assert "15.0 GB of RAM are in use by others" in str(room.waits(1.0))
    used[0] = 12 * GB
    assert room.waits(2.0) is not None, "it would be over again at once"
    used[0] = 11 * GB
    assert "if it stays so for 15 s" in str(room.waits(3.0)) and room.waits(17.0) is not None
    used[0] = 15 * GB
    assert room.waits(18.0) is not None
    used[0] = 11 * GB
    assert room.waits(19.0) is not None and room.waits(33.0) is not None and room.waits(34.0) is None
    room.made({"resource": "ram", "own_bytes": 2 * GB, "ceiling_bytes": 14 * GB}, 100.0)
    assert "for 30 s" in str(room.waits(101.0))


# --- spill


class Steps:
    """Steps of a chosen length, on a clock of their own; `shared` is what the system counts of ours in RAM."""

    def __init__(self, evidence: Evidence = Evidence(), shared: int | None = 50 << 20) -> None:  # noqa: B008 - frozen
        self.link, self.evidence, self.shared, self.now, self.cpu = Script(), evidence, shared, 0.0, 0.0
        self.looks = self.asked = 0
        self.watch = SpillWatch(self._shared, self._look, self.link.send, r"C:\Python\python.exe")
        self.asked = 0

    def _look(self) -> Evidence:
        self.looks += 1
        return self.evidence

    def _shared(self) -> int | None:
        self.asked += 1
        return self.shared

    def take(self, number: int, seconds: float = 0.1, tokens: int = 1000, busy: float = 1.0) -> list[str | None]:
        found = []
        for _ in range(number):
            self.now += seconds
            self.cpu += seconds * busy
            found.append(self.watch.step(self.now, tokens, self.cpu))
        return found


SPILL = 900 << 20


@pytest.mark.parametrize("seconds", [0.001, 0.1, 10.0])
@pytest.mark.parametrize("begins", [0, 1, 3, 4, 5, 7, 14, 20, 24, 25, 26, 27, 33, 200])
def test_a_spill_is_named_within_five_steps_whenever_it_begins(begins: int, seconds: float) -> None:
    """Before the first step, while nothing is known of the steps' length, and later; with the driver's setting, and once."""
    steps = Steps()
    assert set(steps.take(begins, seconds)) <= {None}
    steps.shared = SPILL
    assert "spilled" in steps.take(5, seconds * 3)
    text = steps.link.of("warning")[0]["text"]
    assert "CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback" in text and r"C:\Python\python.exe" in text
    assert "NVIDIA Control Panel > Manage 3D settings > Program settings" in text
    assert set(steps.take(15, seconds * 3)) == {None} and len(steps.link.of("warning")) == 1, "said once"


def test_a_spill_is_named_within_five_steps_although_they_are_slow_already() -> None:
    """Heat, looked into a moment ago, does not hide it."""
    for wait in range(1, 8):
        steps = Steps(Evidence(throttled=True))
        steps.take(50, 0.01)
        assert "throttled" in steps.take(5, 0.03)
        steps.take(wait, 0.03)
        steps.shared = SPILL
        assert "spilled" in steps.take(5, 0.09), wait


def test_what_lay_in_ram_before_the_model_is_no_spill() -> None:
    """The driver's own, pinned copies for the bus: what is there before, or stays below 128 MB, is not named, however long it is there."""
    steps = Steps(shared=SPILL)
    assert set(steps.take(200)) == {None} and steps.asked <= 8, "asked only while it learns"
    steps = Steps()
    steps.shared = (50 + 100) << 20
    assert set(steps.take(200)) == {None}
    steps = Steps(shared=None)
    assert set(steps.take(200)) == {None}, "nobody tells"


def test_the_speed_is_kept_with_the_run() -> None:
    """A trainer that crawls from its first step on knows by its predecessor that it does; one learned in a spill is not kept."""
    steps = Steps()
    steps.take(100)
    learned = steps.watch.learned()
    assert learned == pytest.approx(0.1 / 1000)
    again = Steps(Evidence(throttled=True))
    again.watch.know(learned)
    assert "throttled" in again.take(15, 0.3) and again.watch.learned() == learned
    spilled = Steps()
    spilled.shared = SPILL
    spilled.take(100, 0.3)
    assert spilled.watch.learned() is None


def test_a_run_keeps_its_speed_in_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same plan it is known after a resume; another micro-batch is another speed."""
    watches: list[SpillWatch] = []

    def watch(*given: Any, **more: Any) -> SpillWatch:
        watches.append(SpillWatch(lambda: 0, Evidence, lambda *a, **b: None, "python"))
        return watches[-1]

    monkeypatch.setattr("trainerd.engine.building._spill_watch", watch)
    run(tmp_path, config({"max_steps": 60, "epochs": 20}))
    assert watches[0].learned() is not None
    run(tmp_path, config({"max_steps": 61, "epochs": 20}))
    assert watches[1]._known == watches[0].learned()
    run(tmp_path, config({"max_steps": 62, "epochs": 20}), too_large_micro_batch=8)
    assert watches[2]._known is None


@pytest.mark.parametrize(
    ("evidence", "busy", "cause"),
    [
        (Evidence(throttled=True), 1.0, "throttled"),
        (Evidence(False, others_gpu_percent=80.0), 1.0, "busy gpu"),
        (Evidence(False, 0.0), 0.1, "starved"),
        (Evidence(), 1.0, "unknown"),
    ],
)
def test_other_causes_are_told_apart(evidence: Evidence, busy: float, cause: str) -> None:
    """Heat, another program on the GPU, a processor that others use: an event, and no advice about a driver."""
    steps = Steps(evidence)
    steps.take(50)
    assert cause in steps.take(5, 0.3, busy=busy)
    assert [note["cause"] for note in notes(steps.link, "slow")] == [cause] and not steps.link.of("warning")


def test_longer_batches_and_pauses_are_no_slow_steps() -> None:
    """Ten times the tokens may take ten times as long; an evaluation or a save is not the step's; one slow step is none."""
    steps = Steps(shared=SPILL)
    steps.take(50)
    asked = steps.asked
    assert set(steps.take(20, 1.0, tokens=10_000)) == {None}
    for _ in range(10):
        steps.now += 30
        steps.watch.pause()
        assert set(steps.take(3)) == {None}
    for _ in range(10):
        assert set(steps.take(1, 5.0) + steps.take(4)) == {None}
    assert steps.looks == 0 and steps.asked == asked, "only what is slow is looked into"


class Nvml:
    """As much of pynvml as load() asks."""

    class NVMLError(Exception):
        pass

    def __init__(self, reasons: int, samples: list[tuple[int, int]] | None) -> None:
        self.reasons, self.samples = reasons, samples

    def nvmlDeviceGetProcessUtilization(self, handle: int, since: int) -> list[Any]:
        if self.samples is None:
            raise self.NVMLError
        return [type("Sample", (), {"pid": pid, "smUtil": percent}) for pid, percent in self.samples]

    def __getattr__(self, name: str) -> Any:
        answers = {"nvmlDeviceGetCount": 1, "nvmlDeviceGetUUID": "GPU-1", "nvmlDeviceGetCurrentClocksThrottleReasons": self.reasons}
        return lambda *arguments: answers.get(name, 0)


def test_the_driver_tells_heat_and_other_programs() -> None:
    """The power cap of a laptop is no throttling; under Windows nobody tells the others' share."""
    assert gpu.load(0, 7, Nvml(0x40, [(7, 90), (8, 30)])) == gpu.GpuLoad(True, 30.0)
    assert gpu.load(0, 7, Nvml(0x04, None)) == gpu.GpuLoad(False, None)
    assert gpu.load(3, 7, Nvml(0, [])) == gpu.GpuLoad()


@pytest.mark.parametrize("had_frozen", [True, False])
def test_what_a_training_freezes_is_let_go_unless_somebody_else_has_frozen(had_frozen: bool) -> None:
    """In a library user's process: his own stays frozen; where there was nothing, the collector has everything back."""
    gc.unfreeze()
    if had_frozen:
        gc.freeze()
    with cleaning.settled():
        assert gc.get_freeze_count() > 0
    assert (gc.get_freeze_count() > 0) is had_frozen
