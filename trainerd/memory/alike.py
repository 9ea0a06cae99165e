"""Time steps that are all alike are not played one by one: some at the beginning and at the end are, and those between are written
down as they must have been. Must not know what a step does.

A recurrent layer asks Tape.places() which of its places to play. Of 25 those are 0, 1, 2 and 21 to 24: the first ones and the last
ones differ from others, the two at 21 and 22 are the pattern. Their events, forwards and on the way back, must be the same but for
which place they speak of, and sizes must lie on one line, which that of place 2 has to meet; else NotAlike is raised, and all is
played. tests/test_memory_speed.py holds what is written down against what is played, event by event.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from operator import add, sub
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainerd.memory.tape import Tape

_HEAD, _TAIL = 3, 4  # so many are played at either end; with fewer than so many between, all are
_LEAST = _HEAD + _TAIL + 2
FORWARD, BACKWARD = 0, 1
Turn = tuple[int, int]
"""A loop's number, and which of the places it plays."""


class NotAlike(Exception):
    """The pattern does not hold: play every place."""


@dataclass(frozen=True)
class Cut:
    """Where the events of one turn begin, or, without one, of what belongs to none; what was counted until then."""

    at: int
    storage: int
    flops: float
    products: int
    turn: Turn | None
    way: int


def played(number: int) -> list[int]:
    """Which of so many places are played."""
    return list(range(number)) if number < _LEAST else [*range(_HEAD), *range(number - _TAIL, number)]


def write_out(tape: Tape, began: int) -> None:
    """The events since `began`, with the places that were not played. Raises NotAlike."""
    cuts, tape.cuts = tape.cuts, []
    if any(tape.loops[cut.turn[0]] >= _LEAST for cut in cuts if cut.turn is not None):
        _Writing(tape, began, cuts).write()


@dataclass
class _Part:
    """The events from one cut to the next."""

    cut: Cut
    events: list[int]
    births: int


@dataclass
class _Pattern:
    """A loop on one way: the parts of places before, at and after the gap; how many copies go there, and their first storage."""

    missing: int
    parts: dict[int, _Part] = field(default_factory=dict)
    first: int = 0

    @property
    def births(self) -> int:
        return self.parts[_HEAD].births

    def number(self, place: int, index: int) -> int:
        """The storage that was born as the index-th at this place, of those that are played and those that are not."""
        if _HEAD <= place < _HEAD + self.missing:
            return self.first + (place - _HEAD) * self.births + index
        return self.parts[place if place < _HEAD else place - self.missing].cut.storage + index


_Home = tuple[int, int, int, int]
"""Of a storage: its loop, the way, which of the places that are played, and the how-manieth that was born there."""
_Shaped = tuple[bool, int, int, int, int]
"""An event without its place: whether something is born, whose loop and way, how many places away, and which."""


class _Writing:
    def __init__(self, tape: Tape, began: int, cuts: list[Cut]) -> None:
        self.tape, self.began = tape, began
        self.events = tape.events[began:]
        first = Cut(began, cuts[0].storage - sum(event >= 0 for event in tape.events[began : cuts[0].at]), 0.0, 0, None, FORWARD)
        last = Cut(len(tape.events), len(tape.sizes), tape.flops, len(tape.multiplied), None, FORWARD)
        borders = [first, *cuts, last]
        self.parts = [_Part(cut, tape.events[cut.at : end.at], end.storage - cut.storage) for cut, end in pairwise(borders)]
        self.ends = {id(part): end for part, end in zip(self.parts, borders[1:], strict=True)}
        self.patterns: dict[tuple[int, int], _Pattern] = {}
        self.homes: list[_Home | None] = [None] * len(tape.sizes)
        """Of each storage, if it was born around a gap."""
        self.copies: dict[tuple[int, int], list[list[int]]] = {}

    def write(self) -> None:
        """Find the patterns, make what is missing, and put it in its place."""
        for part in self.parts:
            self._file(part)
        for key, pattern in self.patterns.items():
            self._make_storages(key, pattern)
        for key in self.patterns:
            self.copies[key] = self._copied(key)
        written: list[int] = []
        moved: list[int] = []
        for part in self.parts:
            self._put(part, written, moved)
        self._check(written)
        moved.append(len(written))
        given = self.tape.given
        for place, (at, number, kind) in enumerate(given):
            if at >= self.began:
                given[place] = (self.began + moved[at - self.began], number, kind)
        self.tape.events[self.began :] = written

    def _file(self, part: _Part) -> None:
        """Which storages were born around the gap, by loop and way."""
        turn = part.cut.turn
        if turn is None or self.tape.loops[turn[0]] < _LEAST:
            return
        loop, place = turn
        key = (loop, part.cut.way)
        pattern = self.patterns.setdefault(key, _Pattern(self.tape.loops[loop] - _HEAD - _TAIL))
        if place in pattern.parts:
            if _HEAD - 1 <= place <= _HEAD + 1:
                raise NotAlike
            return
        pattern.parts[place] = part
        if 1 <= place <= _HEAD + 2:
            first, births = part.cut.storage, part.births
            self.homes[first : first + births] = zip(repeat(loop, births), repeat(part.cut.way), repeat(place), range(births), strict=False)

    def _make_storages(self, key: tuple[int, int], pattern: _Pattern) -> None:
        """Sizes of what was born at the missing places, and the work done there: on the line through both patterns."""
        tape, parts = self.tape, pattern.parts
        if len(parts) < _HEAD + _TAIL:
            raise NotAlike
        one, other, before = parts[_HEAD], parts[_HEAD + 1], parts[_HEAD - 1]
        if not one.births == other.births == before.births:
            raise NotAlike
        sizes, more, less = (tape.sizes[p.cut.storage : p.cut.storage + p.births] for p in (one, other, before))
        steps = list(map(sub, more, sizes))
        pattern.first = len(tape.sizes)
        made, further = self._work(one), self._work(other)
        for back in range(pattern.missing, 0, -1):
            less = list(map(add, less, steps))
            tape.sizes += less
            tape.flops += made[0] - back * (further[0] - made[0])
        if list(map(add, less, steps)) != sizes:
            raise NotAlike
        tape.kinds += tape.kinds[one.cut.storage : one.cut.storage + one.births] * pattern.missing
        for a, b in zip(made[1], further[1], strict=True):
            if a != b:  # else no other shape than those that are known
                tape.multiplied += [tuple(x - back * (y - x) for x, y in zip(a, b, strict=True)) for back in range(1, pattern.missing + 1)]

    def _work(self, part: _Part) -> tuple[float, list[tuple[int, ...]]]:
        end = self.ends[id(part)]
        return end.flops - part.cut.flops, self.tape.multiplied[part.cut.products : end.products]

    def _copied(self, key: tuple[int, int]) -> list[list[int]]:
        """The events of every missing place, the first one first."""
        pattern = self.patterns[key]
        shape = self._shape(key, pattern.parts[_HEAD])
        if shape != self._shape(key, pattern.parts[_HEAD + 1]):
            raise NotAlike
        # Each copy is the one before, a place further; what speaks of a place beyond the gap is put right afterwards.
        here, steps, beyond = list[int](), list[int](), list[int]()
        for at, (born, loop, way, away, index) in enumerate(shape):
            other = self.patterns[loop, way]
            number, step = other.first + away * other.births + index, other.births
            here.append(number if born else ~number)
            steps.append(step if born else -step)
            if away:
                beyond.append(at)
        found = [here]
        for _ in range(1, pattern.missing):
            here = list(map(add, here, steps))
            found.append(here)
        for at in beyond:
            born, loop, way, away, index = shape[at]
            for copy in range(pattern.missing - away, pattern.missing) if away > 0 else range(-away):
                number = self.patterns[loop, way].number(_HEAD + copy + away, index)
                found[copy][at] = number if born else ~number
        return found

    def _shape(self, key: tuple[int, int], part: _Part) -> list[_Shaped]:
        """Its events without the place: born or ended, whose, how many places away, and which. Other loops must miss as many."""
        assert part.cut.turn is not None
        place, missing = part.cut.turn[1], self.patterns[key].missing
        found = []
        for event in part.events:
            home = self.homes[event if event >= 0 else ~event]
            if home is None or self.patterns[home[0], home[1]].missing != missing:
                raise NotAlike
            found.append((event >= 0, home[0], home[1], home[2] - place, home[3]))
        return found

    def _put(self, part: _Part, written: list[int], moved: list[int]) -> None:
        """This part's events, and the missing places' where they belong."""
        turn, way = part.cut.turn, part.cut.way
        pattern = None if turn is None else self.patterns.get((turn[0], way))
        if pattern is None or turn is None:
            self._put_runs(part, written, moved)
            return
        copies = self.copies[turn[0], way]
        if turn[1] == _HEAD and way == FORWARD:
            for copy in copies:
                written += copy
        moved.extend(range(len(written), len(written) + len(part.events)))
        written += self._across(part, turn[1])
        if turn[1] == _HEAD and way == BACKWARD:
            for copy in reversed(copies):
                written += copy

    def _across(self, part: _Part, place: int) -> Iterable[int]:
        """What ends something of a place beyond the gap means the place that is really so far away."""
        if not 0 < place < _HEAD + 2:
            return part.events
        found = []
        for event in part.events:
            home = self.homes[~event] if event < 0 else None
            if home is not None and (home[2] < _HEAD) != (place < _HEAD) and abs(home[2] - place) <= 2:
                pattern = self.patterns[home[0], home[1]]
                event = ~pattern.number(_real(place, pattern.missing) + home[2] - place, home[3])
            found.append(event)
        return found

    def _put_runs(self, part: _Part, written: list[int], moved: list[int]) -> None:
        """What ends the same of one place after the other ends that of the missing ones between."""
        before: _Home | None = None
        for event in part.events:
            home = self.homes[~event] if event < 0 else None
            if home is not None and before is not None and home[:2] == before[:2] and home[3] == before[3]:
                pattern = self.patterns[home[0], home[1]]
                gap = range(_HEAD, _HEAD + pattern.missing)
                if (before[2], home[2]) == (_HEAD - 1, _HEAD):
                    written += [~pattern.number(place, home[3]) for place in gap]
                elif (before[2], home[2]) == (_HEAD, _HEAD - 1):
                    written += [~pattern.number(place, home[3]) for place in reversed(gap)]
            before = home
            moved.append(len(written))
            written.append(event)

    def _check(self, written: list[int]) -> None:
        """Nothing ends twice, and what was born at a missing place ends as it does at the pattern's."""
        known, more = set(self.events), 0
        for pattern in self.patterns.values():
            first = pattern.parts[_HEAD].cut.storage
            ended = sum(map(known.__contains__, range(~first, ~first - pattern.births, -1)))
            more += pattern.missing * (pattern.births + ended)
        if len(set(written)) != len(written) or len(written) != len(known) + more:
            raise NotAlike


def _real(place: int, missing: int) -> int:
    return place if place < _HEAD else place + missing
