"""Places of a recurrent layer that are not played are written down as they would have been: event by event, or everything is played."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainerd.memory import alike, ops, shared, timeline
from trainerd.memory.tape import Tape, Tensor
from trainerd.memory.timeline import Setup, Timeline
from trainerd.tasks.cadence.blocks import CadenceTable, Sizes
from trainerd.tasks.cadence.settings import CadenceSettings


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


def played(table: CadenceTable, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> tuple[Timeline, Timeline]:
    """With places left out, without a way back to playing all; and every place played."""
    shared.forget()
    with monkeypatch.context() as patch:
        patch.setattr(timeline, "NotAlike", ZeroDivisionError)
        short = table.timeline(setup)
    shared.forget()
    with monkeypatch.context() as patch:
        patch.setattr(alike, "_LEAST", 1 << 30)
        whole = table.timeline(setup)
    shared.forget()
    return short, whole


SHAPES = st.fixed_dictionaries(
    {
        "embedding": st.sampled_from([1, 16, 33]),
        "context": st.sampled_from([4, 16]),
        "dropout": st.sampled_from([0.0, 0.1]),
        "hidden": st.lists(st.sampled_from([1, 8, 40, 300]), min_size=1, max_size=3),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    attention=st.sampled_from([0, 1, 12]),
    places=st.integers(1, 33),
    samples=st.sampled_from([1, 2, 64]),
    accumulation=st.sampled_from([1, 3]),
    device=st.sampled_from(["cpu", "cuda"]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    again=st.sampled_from(["none", "selective", "full"]),
    logits=st.sampled_from(["full", "chunked"]),
    offload=st.sampled_from(["none", "optimizer"]),
)
def test_what_is_left_out_is_written_down_as_it_would_be_played(
    shape: dict[str, Any],
    attention: int,
    places: int,
    samples: int,
    accumulation: int,
    device: str,
    precision: str,
    again: str,
    logits: str,
    offload: str,
) -> None:
    """The paper's model in any size and setup: every birth and end in its order, sizes, kinds, work, peaks and phases; never by falling
    back to playing everything."""
    own = {**shape, "attention": [attention] * len(shape["hidden"]) if attention else []}
    made = CadenceSettings.model_validate({"model": "gru-mn", "vocabulary": 500, "gru_mn": own})
    setup = Setup(device, precision, samples, samples * accumulation, "adamw", logits, offload, again)
    with pytest.MonkeyPatch.context() as patch:
        short, whole = played(CadenceTable(made, Sizes(510, 506, 4), places), setup, patch)
    assert same(short, whole)


def test_most_places_are_left_out() -> None:
    """Seven of twenty-five are played, which is what makes an answer fast."""
    tape = Tape("cpu")
    tape.skips = True
    assert list(tape.turns(25)) == [0, 1, 2, 21, 22, 23, 24] == list(tape.places(25))
    assert list(tape.turns(8)) == list(range(8))
    assert list(Tape("cpu").turns(25)) == list(range(25))


class _Loop:
    """A recurrent layer whose places make one result each, as `size` and `number` say."""

    def __init__(self, tape: Tape, size: Any, number: Any) -> None:
        self.tape, self.size, self.number = tape, size, number
        self.weight = tape.parameter(7)

    def micro_batch(self, tape: Tape, samples: int) -> None:
        return None

    def loss(self, batch: None) -> Tensor:
        x = ops.tanh(self.weight)
        for place in self.tape.turns(20):
            for _ in range(self.number(place)):
                self.tape.new((self.size(place),), "fp32")
            x = ops.tanh(x)
        return ops.total(x)

    def evaluate(self, tape: Tape, samples: int, *, worst: bool) -> None:
        return None


@pytest.mark.parametrize("size", [lambda place: place * place, lambda place: 5 if place < 10 else 6], ids=["squares", "a step"])
def test_sizes_that_are_on_no_line_are_played(size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pattern does not hold, and nothing is guessed."""
    _is_played_whole(size, lambda place: 1, monkeypatch)


@pytest.mark.parametrize("number", [lambda place: place, lambda place: 1 + place % 2, lambda place: 1 + (place == 16)])
def test_places_that_differ_are_played(number: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More and more at each place, every other place another number, one place that is not like those beside it."""
    _is_played_whole(lambda place: 4, number, monkeypatch)


def _is_played_whole(size: Any, number: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(tape: Tape) -> _Loop:
        return _Loop(tape, size, number)

    setup = Setup("cuda", "fp32", 1, 2)
    with pytest.raises(alike.NotAlike):
        timeline._of_model(build, setup, 1, skips=True)
    found = timeline.of_model(build, setup)
    monkeypatch.setattr(alike, "_LEAST", 1 << 30)
    assert same(found, timeline.of_model(build, setup))
