"""A timeline that was played for one number of samples is told for another as it would have been played."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainerd.memory import losses, shared
from trainerd.memory.affine import Affine, NotAffine, Samples
from trainerd.memory.tape import Tape
from trainerd.memory.timeline import Setup, Timeline, of_model
from trainerd.tasks.cadence.blocks import CadenceTable, Sizes, _Training
from trainerd.tasks.cadence.settings import CadenceSettings

OPERATIONS: list[Callable[[Any, Any], Any]] = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod]
COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


def same(one: Timeline, other: Timeline) -> bool:
    """Whether both hold the same, whatever number a storage has: in births, ends, sizes, kinds, and all that is counted."""
    return _told(one) == _told(other)


def _told(of: Timeline) -> dict[str, Any]:
    events = _numbered(of.events, list(zip(of.sizes, of.kinds, strict=True)))
    found = {**vars(of), "events": events, "sizes": None, "kinds": None, "order": None, "ordered_sizes": None}
    if of.order is not None:
        sizes, replayed = of.order().written_out([*of.ordered_sizes, 1 << 23])
        found["order"] = _numbered(replayed, sizes)
    return found


def _numbered(events: list[int], about: Sequence[Any]) -> list[tuple[int, Any]]:
    """Each birth by its place in time, with what is known of it, and each end by that of its birth."""
    numbers: dict[int, int] = {}
    found: list[tuple[int, Any]] = []
    for event in events:
        if event >= 0:
            numbers[event] = len(found)
            found.append((len(found), about[event]))
        else:
            found.append((~numbers[~event], None))
    return found


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 7), st.booleans()), max_size=5),
    asked=st.lists(st.tuples(st.sampled_from(COMPARISONS), st.integers(-20, 60), st.integers(0, 2)), max_size=4),
    number=st.integers(1, 30),
    other=st.integers(1, 30),
)
def test_what_holds_for_another_number_of_samples_is_decided_as_with_that_number(
    steps: list[tuple[int, int, bool]], asked: list[tuple[Any, int, int]], number: int, other: int
) -> None:
    """Any arithmetic with whole numbers, any comparisons: if the samples hold for another number, the line there is the value computed
    with it, and every comparison has its result."""

    def computed(of: Any) -> tuple[list[Any], list[bool]]:
        values = [of]
        for what, by, turned in steps:
            operation = OPERATIONS[what]
            value = values[-1]
            if operation is operator.floordiv:
                value = operation(value, max(1, by))
            else:
                value = operation(by, value) if turned else operation(value, by)
            values.append(value)
        return values, [compared(values[-1], values[0] * times + by) for compared, by, times in asked]

    samples = Samples(number)
    values, seen = computed(Affine(samples, 0, 1))
    assert samples.holds(number)
    real, truth = computed(number)
    assert [one.at(number) if isinstance(one, Affine) else one for one in values] == real and seen == truth
    if samples.holds(other):
        real, truth = computed(other)
        assert [one.at(other) if isinstance(one, Affine) else one for one in values] == real and seen == truth


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        (lambda x: x == 7, [n for n in range(1, 40) if n != 7]),
        (lambda x: 2 * x != 8, [n for n in range(1, 40) if n != 4]),
        (lambda x: 3 * x == 9, [3]),
        (lambda x: x > 2, range(3, 40)),
        (lambda x: x >= 4, range(1, 4)),
        (lambda x: 3 * x - 20 < 0, range(1, 7)),
        (lambda x: 25 * x // 40, [2, 3]),
        (lambda x: -(-25 * x // 40), [2, 3]),
        (lambda x: min(5, x), range(1, 5)),
    ],
)
def test_up_to_where_a_decision_holds(asked: Callable[[Any], Any], held: Any) -> None:
    """Asked with three samples: exactly for these numbers the answer is the same one."""
    samples = Samples(3)
    asked(Affine(samples, 0, 1))
    assert [number for number in range(1, 40) if samples.holds(number)] == list(held)


@pytest.mark.parametrize(
    "use", [lambda x: x * x, lambda x: x // (x + 1), range, lambda x: [0][x], hash, lambda x: 1 // x, float, int, lambda x: [0] * x]
)
def test_what_is_no_line_is_not_taken_for_one(use: Callable[[Any], Any]) -> None:
    """It fails, so that each number of samples is played by itself: nothing goes on with the value of one of them."""
    with pytest.raises((NotAffine, TypeError)):
        use(Affine(Samples(3), 0, 1))


OWN = {"embedding": 32, "hidden": [64, 48], "attention": [32, 24], "context": 24}
MODELS: list[dict[str, Any]] = [{}, {"model": "gru-mn", "gru_mn": OWN}, {"model": "gru-mn", "gru_mn": {**OWN, "attention": []}}]


def told_and_played(table: CadenceTable, setup: Setup) -> bool:
    return same(table.timeline(setup), of_model(lambda tape: _Training(table, tape, setup), setup))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_told_is_what_is_played(device: str) -> None:
    """Both models, in fp32 and bf16, with blocks computed again, each offload and both losses, for numbers of samples on both sides of
    every border: births and ends in their order, sizes, kinds, peaks, work; and few have been played."""
    shared.forget()
    seen = 0
    ways = (("none", "none"), ("none", "zero2"), ("selective", "optimizer"), ("full", "none"))
    for place, (which, precision) in enumerate(product(MODELS, ("fp32", "bf16"))):
        table = CadenceTable(CadenceSettings.model_validate(which), Sizes(700, 600, 3), 10)
        for logits, (again, offload) in zip(("chunked", "full"), (ways[place % 4], ways[3 - place % 4]), strict=True):
            for samples, batch in ((5, 5), (6, 23), (40, 75), (7, 600), (9, 9), (1, 1)):
                setup = Setup(device, precision, samples, batch, "adamw", logits, offload, again if which else "none")
                assert told_and_played(table, setup), setup
                seen += 1
    assert sum(len(plays) for plays in shared._known.values()) < seen * 0.8 and not shared._alone
    shared.forget()


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    which=st.sampled_from(MODELS),
    places=st.integers(1, 30),
    samples=st.lists(st.integers(1, 3000), min_size=2, max_size=4),
    accumulation=st.sampled_from([1, 2, 100]),
    device=st.sampled_from(["cpu", "cuda"]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    again=st.sampled_from(["none", "selective", "full"]),
    logits=st.sampled_from(["full", "chunked"]),
    offload=st.sampled_from(["none", "optimizer", "zero2"]),
)
def test_any_training_is_told_as_it_is_played(which: dict[str, Any], places: int, samples: list[int], **other: Any) -> None:
    """As above, for any length of rows and up to thousands of samples."""
    table = CadenceTable(CadenceSettings.model_validate(which), Sizes(700, 600, 3), places)
    if "model" not in which:
        other["again"] = "none"
    for number in samples:
        batch = number * other["accumulation"]
        setup = Setup(
            other["device"],
            other["precision"],
            number,
            batch,
            logits=other["logits"],
            offload=other["offload"],
            checkpointing=other["again"],
        )
        assert told_and_played(table, setup), setup


class _Odd:
    """A model whose size is a square in the samples, or that makes one tensor for each of them."""

    def __init__(self, tape: Tape, makes: Callable[[Tape, Any], None]) -> None:
        self.tape, self.makes, self.weight = tape, makes, tape.parameter(3)

    def micro_batch(self, tape: Tape, samples: Any) -> Any:
        return samples

    def loss(self, batch: Any) -> Any:
        self.makes(self.tape, batch)
        return losses.cross_entropy(self.weight, self.weight)

    def evaluate(self, tape: Tape, samples: Any, *, worst: bool) -> None:
        return None


@pytest.mark.parametrize(
    "makes",
    [
        lambda tape, samples: tape.new((samples, samples), "fp32"),
        lambda tape, samples: [tape.new((4,), "fp32") for _ in range(samples)],
        lambda tape, samples: tape.new((1 << samples % 9,), "fp32"),
    ],
    ids=["squares", "numbers", "powers"],
)
def test_a_model_that_is_on_no_line_is_played_each_time(makes: Callable[[Tape, Any], None]) -> None:
    """The timeline is right for every number of samples, and nothing is kept."""
    shared.forget()

    def build(tape: Tape) -> Any:
        return _Odd(tape, makes)

    for samples in (2, 3, 5):
        setup = Setup("cuda", "fp32", samples, samples)
        assert same(shared.timeline(build, setup, "odd"), of_model(build, setup))
    assert not shared._known and len(shared._alone) == 1
    shared.forget()


def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training that was asked about longest ago goes first; of one training only a few plays are kept."""
    shared.forget()
    monkeypatch.setattr(shared, "_EVENTS", 3000)
    monkeypatch.setattr(shared, "_PLAYS", 2)
    table = CadenceTable(CadenceSettings(), Sizes(10_010, 10_006, 4), 16)
    for samples in (1, 20, 100, 200):
        table.timeline(Setup("cpu", "fp32", samples, samples))
    (plays,) = shared._known.values()
    assert len(plays) == 2
    for precision in ("bf16", "fp16", "fp32"):
        table.timeline(Setup("cpu", precision, 1, 1))
    assert {key[1].precision for key in shared._known} != {"bf16", "fp16", "fp32"} and (
        table.key,
        Setup(checkpointing="none"),
    ) in shared._known
    shared.forget()
