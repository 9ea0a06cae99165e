"""An estimate costs next to nothing: what it imports, that it is remembered, and that the fast replay says what the plain one says."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from operator import invert
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.person import ROOT
from trainerd.memory import losses, native, playing, rounds, shared
from trainerd.memory.allocator import Allocator, replay
from trainerd.memory.estimate import estimate
from trainerd.memory.layers import SampleDropout
from trainerd.memory.profile import Profile
from trainerd.memory.tape import Tape
from trainerd.memory.timeline import Setup, Timeline
from trainerd.tasks.cadence.blocks import CadenceTable, Sizes, batch, build, table
from trainerd.tasks.cadence.settings import CadenceSettings

MB = 1 << 20
TINY_MN = {"model": "gru-mn", "vocabulary": 500, "max_words": 6, "gru_mn": {"embedding": 32, "hidden": [64, 48], "attention": [32, 24]}}


def test_an_estimate_imports_no_pydantic() -> None:
    """Everything the estimate and the planner are made of, and a task's table: standard library and ourselves."""
    code = (
        "import sys, pkgutil, importlib, trainerd.memory as m\n"
        "for found in pkgutil.iter_modules(m.__path__): importlib.import_module('trainerd.memory.' + found.name)\n"
        "import trainerd.tasks.cadence.blocks\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name for name in done.stdout.split() if not name.startswith("_") and name != "sitecustomize"}
    assert loaded == {"trainerd"}, loaded


BORDERS = [0, 1, 511, 512, 513, MB - 1, MB, MB + 1, 2 * MB, 10 * MB - 1, 10 * MB, 20 * MB, 19 * MB + 513]


def trace(draw: random.Random) -> tuple[list[int], list[int]]:
    """Sizes at every border of the rules, births and ends, the last in or any; what has ended is born again."""
    sizes: list[int] = []
    events: list[int] = []
    alive: list[int] = []
    for _ in range(draw.randrange(2, 500)):
        if alive and draw.random() < 0.47:
            events.append(~alive.pop(draw.randrange(len(alive)) if draw.random() < 0.5 else -1))
        elif len(sizes) > len(alive) and draw.random() < 0.3:
            events.append(draw.choice(sorted(set(range(len(sizes))).difference(alive))))
            alive.append(events[-1])
        else:
            events.append(len(sizes))
            alive.append(len(sizes))
            sizes.append(draw.choice([draw.choice(BORDERS), draw.randrange(MB), draw.randrange(40 * MB)]))
    return sizes, events


@pytest.mark.parametrize("seed", range(40))
def test_the_fast_replay_counts_what_the_plain_one_counts(seed: int) -> None:
    """Random traces: both counters equal, whatever is left alive."""
    sizes, events = trace(random.Random(seed))
    assert native.peaks(sizes, events) == replay(sizes, events, Allocator())


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.sampled_from(BORDERS) | st.integers(1, MB) | st.sampled_from([512 * n for n in (1, 2, 3, 4, 8, 4095)]), min_size=1),
    choices=st.lists(st.integers(0, 1 << 20), max_size=300),
)
def test_whatever_is_born_and_ends_the_fast_replay_counts_it(sizes: list[int], choices: list[int]) -> None:
    """Any order of births and ends, few sizes that fit into each other's holes: both counters equal."""
    alive: set[int] = set()
    events = []
    for choice in choices:
        number = choice % len(sizes)
        events.append(~number if number in alive else number)
        alive ^= {number}
    assert native.peaks(sizes, events) == replay(sizes, events, Allocator())


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.sampled_from(BORDERS) | st.integers(1, MB), min_size=8, max_size=40),
    before=st.lists(st.integers(0, 1 << 20), max_size=40),
    step=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=120),
    after=st.lists(st.integers(0, 1 << 20), max_size=60),
)
def test_what_leaves_nothing_behind_is_not_gone_through_twice(
    sizes: list[int], before: list[int], step: list[int], after: list[int]
) -> None:
    """Any step of which nothing stays, and which ends nothing that was there: both counters as if it had been replayed twice, whatever
    was there before and whatever comes after."""
    half = len(sizes) // 2
    begun, alive = _turns(before, range(half), set())
    once, left = _turns(step, range(half, len(sizes)), set())
    once += [~number for number in sorted(left)]
    rest, _ = _turns(after, range(len(sizes)), alive)
    events = [*begun, *once, *once, *rest]
    assert native.peaks(sizes, events, (len(begun), len(begun) + len(once))) == replay(sizes, events, Allocator())


@settings(max_examples=150, deadline=None)
@given(
    step=st.lists(st.integers(MB // 2, MB), min_size=1, max_size=12),
    sizes=st.lists(st.sampled_from(BORDERS) | st.integers(1, MB), min_size=2, max_size=24),
    after=st.lists(st.integers(0, 1 << 20), max_size=60),
)
def test_what_comes_after_a_step_takes_the_segments_it_has_left_empty(step: list[int], sizes: list[int], after: list[int]) -> None:
    """Steps that leave few and many empty segments, and whatever comes afterwards: both counters as if it had been replayed."""
    once = [*range(len(step)), *map(invert, range(len(step)))]
    rest, _ = _turns(after, range(len(step), len(step) + len(sizes)), set())
    assert native.peaks(step + sizes, [*once, *once, *rest], (0, len(once))) == replay(step + sizes, [*once, *once, *rest], Allocator())


def test_room_for_all_of_it_is_no_room_when_it_lies_in_between() -> None:
    """Two empty segments of 4096 units hold less than 2600 each, and yet no 1500 in one piece: a third is asked for."""
    units = [2048] * 4 + [599, 83] * 6 + [1400, 650, 1400, 640, 1500]
    sizes = [512 * number for number in units]
    fillers, begun = range(4, 16, 2), [*range(4), *map(invert, range(4))] * 2
    rest = [*range(4, 16), *map(invert, fillers), 16, 17, 18, 19, ~16, ~18, 20]
    found = native.peaks(sizes, [*begun, *rest], (0, 8))
    assert found == replay(sizes, [*begun, *rest], Allocator()) and found.reserved == 3 * 2 * MB


@pytest.mark.parametrize(
    ("sizes", "step"),
    [
        ([23, 5, 21, 11, 13], [1, 3, 4, ~1, ~3, ~4]),
        ([9, 19, 0.5, 23], [2, 3, ~3, 1, 0, ~1, ~0, ~2]),
        ([9, 19, 0.5, 23], [3, ~3, 1, 2, ~2, 0, ~1, ~0]),
    ],
)
def test_what_a_first_step_leaves_in_the_large_pool_matters_to_the_second(sizes: list[float], step: list[int]) -> None:
    """Sizes in MiB: once more it takes another segment, or whole blocks of more than it wants; so there it is gone through."""
    whole = [int(size * MB) for size in sizes]
    twice = native.peaks(whole, step * 2, (0, len(step)))
    assert twice == replay(whole, step * 2, Allocator()) != replay(whole, step, Allocator())


def _turns(choices: list[int], numbers: range, alive: set[int]) -> tuple[list[int], set[int]]:
    """Of these storages one after the other is born, or ends if it is there; and what is there in the end."""
    alive, events = set(alive), []
    for choice in choices:
        number = numbers[choice % len(numbers)]
        events.append(~number if number in alive else number)
        alive ^= {number}
    return events, alive


def test_random_traces_take_every_line_of_the_fast_replay() -> None:
    """Else the tests above would not hold its shortcuts: blocks that grow or shrink in their place, or elsewhere, on both sides."""
    codes = [native._Small.run.__code__, native._Large.run.__code__]
    lines = {(code, line) for code in codes for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno}
    taken = set()

    def told(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code in codes:
            taken.add((frame.f_code, frame.f_lineno))
            return told
        return None

    before = sys.gettrace()
    sys.settrace(told)
    try:
        for seed in range(8):
            native.peaks(*trace(random.Random(seed)))
    finally:
        sys.settrace(before)
    assert not lines - taken, sorted(line for _, line in lines - taken)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("settings", [{}, TINY_MN], ids=["gru", "gru-mn"])
def test_the_fast_replay_of_a_training_is_that_of_the_plain_one(settings: dict[str, object], accumulation: int) -> None:
    """CADENCE's two models: the events of real tables, two steps long."""
    timeline = table(CadenceSettings.model_validate(settings)).timeline(Setup("cuda", "bf16", 5, 5 * accumulation))
    counted = replay(timeline.sizes, timeline.events, Allocator())
    assert native.peaks(timeline.sizes, timeline.events) == native.peaks(timeline.sizes, timeline.events, timeline.again) == counted
    # The second step is the first, and leaves nothing behind.
    begin, end = timeline.again or (0, 0)
    step, live = timeline.events[begin:end], set(timeline.events[:begin]).difference(map(invert, timeline.events[:begin]))
    assert len(step) > 100 and step == timeline.events[end : end + len(step)] and live.isdisjoint(map(invert, step))
    assert sorted(filter((0).__le__, step)) == sorted(~event for event in step if event < 0)
    # What a timeline says of itself, counted one event after another.
    live = highest = 0
    phases: dict[str, int] = {}
    for (begin, phase), (end, _) in pairwise([*timeline.marks, (len(timeline.events), "")]):
        phases[phase] = max(live, phases.get(phase, 0))
        for event in timeline.events[begin:end]:
            live += timeline.sizes[event] if event >= 0 else -timeline.sizes[~event]
            phases[phase] = max(phases[phase], live)
        highest = max(highest, phases[phase])
    assert timeline.peaks == phases and timeline.peak == highest == max(timeline.peaks.values()) == sum(timeline.breakdown.values())
    assert timeline.resting_bytes == live


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_second_step_that_is_another_one_is_gone_through(accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step that leaves something, as dropout did that numbered its units then: the second is not taken for the first."""
    monkeypatch.setattr(SampleDropout, "lay_out", lambda drop, tape: None)
    shared.forget()
    timeline = table(CadenceSettings.model_validate(TINY_MN)).timeline(Setup("cuda", "bf16", 5, 5 * accumulation))
    shared.forget()
    assert timeline.again is None
    assert native.peaks(timeline.sizes, timeline.events, timeline.again) == replay(timeline.sizes, timeline.events, Allocator())


@pytest.mark.parametrize("settings", [{}, TINY_MN], ids=["gru", "gru-mn"])
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("again", ["none", "selective", "full"])
def test_a_second_micro_batch_follows_from_the_first(settings: dict[str, object], precision: str | None, again: str) -> None:
    """It is not played but copied, with its gradients added to those that are there: the same storages, kinds and order as played."""
    made = CadenceSettings.model_validate(settings)

    def tape(copied: bool) -> Tape:
        found = Tape("cuda", precision)
        model = build(found, made, Sizes(700, 600, 3))
        for _ in range(1 if copied else 2):
            began, given = found.here(), batch(found, 3, 6, 14)
            with found.autocast():
                loss = model.loss(given, Setup("cuda", checkpointing=again if settings else "none"))
            del given
            found.backward(loss)
            del loss
        if copied:
            rounds.follow(found, began)
        return found

    one, other = tape(copied=True), tape(copied=False)
    assert _told(one) == _told(other)
    assert (one.peak, one.live, one.breakdown()) == (other.peak, other.live, other.breakdown())


def _told(tape: Tape) -> list[tuple[int, int, str]]:
    """Births and ends in their order, whatever number a storage has."""
    numbers: dict[int, int] = {}
    found = []
    for event in tape.events:
        if event >= 0:
            numbers[event] = len(found)
            found.append((len(found), tape.sizes[event], tape.kinds[event]))
        else:
            found.append((~numbers[~event], 0, ""))
    return found


class Counted(CadenceTable):
    """Counts how often it is played."""

    plays = 0

    def timeline(self, setup: Setup) -> Timeline:
        type(self).plays += 1
        return super().timeline(setup)


def test_the_same_question_is_answered_from_memory() -> None:
    """By what the table depends on, not by which object asks; another setup, model or workspace is another question."""
    playing.forget()
    Counted.plays = 0
    settings, sizes = CadenceSettings(), Sizes(700, 600, 3)
    setup = Setup("cuda", "bf16", 4, 8)
    first = estimate(Counted(settings, sizes, 9), setup)
    assert estimate(Counted(settings.model_copy(deep=True), sizes, 9), setup) == first and Counted.plays == 1
    estimate(Counted(settings, sizes, 10), setup)
    estimate(Counted(settings, sizes, 9), replace(setup, micro_batch=8))
    estimate(Counted(CadenceSettings.model_validate({"gru": {"hidden": 32}}), sizes, 9), setup)
    assert Counted.plays == 4
    larger = estimate(Counted(settings, sizes, 9), setup, Profile(workspace_bytes=32 * MB))
    assert Counted.plays == 5 and larger.raw["allocated_bytes"] - first.raw["allocated_bytes"] == 32 * MB - Profile().workspace_bytes


def test_only_so_much_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest question goes first; one that was asked again is young."""
    playing.forget()
    monkeypatch.setattr(playing, "_REMEMBERED", 3)
    model = Counted(CadenceSettings(), Sizes(50, 40, 2), 4)
    for samples in (1, 2, 3, 1, 4):
        estimate(model, Setup("cpu", "fp32", samples, samples))
    Counted.plays = 0
    estimate(model, Setup("cpu", "fp32", 1, 1))
    assert Counted.plays == 0
    estimate(model, Setup("cpu", "fp32", 2, 2))
    assert Counted.plays == 1


@pytest.mark.parametrize("offload", ["none", "optimizer", "zero2"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("settings", [{}, TINY_MN], ids=["gru", "gru-mn"])
def test_an_answer_leaves_nothing_for_the_collector(settings: dict[str, object], device: str, offload: str) -> None:
    """Tapes go as soon as they are played: what is left in circles would be found in the middle of a later answer."""
    model = table(CadenceSettings.model_validate(settings))
    playing.forget()
    gc.collect()
    gc.disable()
    try:
        estimate(model, Setup(device, "bf16", 3, 6, offload=offload, checkpointing="full" if settings else "none"))
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("words", [24, 512])
def test_a_long_model_is_played_within_a_budget_of_work(words: int) -> None:
    """Without a clock, which other programs disturb: so many storages and events, and no more, for the paper's model, however long."""
    timeline = table(CadenceSettings(model="gru-mn", max_words=words)).timeline(Setup("cuda", "bf16", 32, 32))
    assert len(timeline.events) < 4_000 and len(timeline.sizes) < 2_000


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pieces_of_a_loss_that_are_alike_are_counted_not_played(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million samples cost no more work than thousands, and not one number of an estimate is another for it."""
    model = table(CadenceSettings())
    timeline = model.timeline(Setup(device, "fp32", 1_000_000, 1_000_000))
    assert len(timeline.events) < 5_000
    short = Setup(device, "bf16", 30_000, 90_000)
    counted = estimate(model, short)
    monkeypatch.setattr(losses, "_PLAYED", 1 << 30)
    playing.forget()
    shared.forget()
    assert len(model.timeline(short).events) > 2 * len(timeline.events) and estimate(model, short) == counted
    shared.forget()
