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
from itertools import pairwise
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
        self.homes: dict[int, _Home] = {}
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
            storage = part.cut.storage
            self.homes.update((storage + index, (*key, place, index)) for index in range(part.births))

    def _make_storages(self, key: tuple[int, int], pattern: _Pattern) -> None:
        """Sizes of what was born at the missing places, and the work done there: on the line through both patterns."""
        tape, parts = self.tape, pattern.parts
        if len(parts) < _HEAD + _TAIL:
            raise NotAlike
        one, other, before = parts[_HEAD], parts[_HEAD + 1], parts[_HEAD - 1]
        if not one.births == other.births == before.births:
            raise NotAlike
        sizes, more, less = (tape.sizes[p.cut.storage : p.cut.storage + p.births] for p in (one, other, before))
        steps = [y - x for x, y in zip(sizes, more, strict=True)]
        if less != [size - (pattern.missing + 1) * step for size, step in zip(sizes, steps, strict=True)]:
            raise NotAlike
        pattern.first = len(tape.sizes)
        kinds = tape.kinds[one.cut.storage : one.cut.storage + one.births]
        made, further = self._work(one), self._work(other)
        for back in range(pattern.missing, 0, -1):
            tape.sizes += [size - back * step for size, step in zip(sizes, steps, strict=True)]
            tape.kinds += kinds
            tape.flops += made[0] - back * (further[0] - made[0])
            tape.multiplied += [
                tuple(x - back * (y - x) for x, y in zip(a, b, strict=True)) for a, b in zip(made[1], further[1], strict=True)
            ]

    def _work(self, part: _Part) -> tuple[float, list[tuple[int, ...]]]:
        end = self.ends[id(part)]
        return end.flops - part.cut.flops, self.tape.multiplied[part.cut.products : end.products]

    def _copied(self, key: tuple[int, int]) -> list[list[int]]:
        """The events of every missing place, the first one first."""
        pattern = self.patterns[key]
        shape = self._shape(key, pattern.parts[_HEAD])
        if shape != self._shape(key, pattern.parts[_HEAD + 1]):
            raise NotAlike
        found: list[list[int]] = []
        steps = [(1 if born else -1) * self.patterns[loop, way].births for born, loop, way, _, _ in shape]
        least, most = min((away for *_, away, _ in shape), default=0), max((away for *_, away, _ in shape), default=0)
        for copy in range(pattern.missing):
            if found and copy - 1 + least >= 0 and copy + most < pattern.missing:
                found.append([event + step for event, step in zip(found[-1], steps, strict=True)])
                continue
            numbers = [self.patterns[loop, way].number(_HEAD + copy + away, index) for _, loop, way, away, index in shape]
            found.append([n if born else ~n for n, (born, *_) in zip(numbers, shape, strict=True)])
        return found

    def _shape(self, key: tuple[int, int], part: _Part) -> list[tuple[bool, int, int, int, int]]:
        """Its events without the place: born or ended, whose, how many places away, and which. Other loops must miss as many."""
        assert part.cut.turn is not None
        place, missing = part.cut.turn[1], self.patterns[key].missing
        found = []
        for event in part.events:
            home = self.homes.get(event if event >= 0 else ~event)
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
            home = self.homes.get(~event) if event < 0 else None
            if home is not None and (home[2] < _HEAD) != (place < _HEAD) and abs(home[2] - place) <= 2:
                pattern = self.patterns[home[0], home[1]]
                event = ~pattern.number(_real(place, pattern.missing) + home[2] - place, home[3])
            found.append(event)
        return found

    def _put_runs(self, part: _Part, written: list[int], moved: list[int]) -> None:
        """What ends the same of one place after the other ends that of the missing ones between."""
        before: _Home | None = None
        for event in part.events:
            home = self.homes.get(~event) if event < 0 else None
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
        ended, known = [event for event in written if event < 0], {~event for event in self.events if event < 0}
        more = sum(
            pattern.missing * sum(pattern.parts[_HEAD].cut.storage + index in known for index in range(pattern.births))
            for pattern in self.patterns.values()
        )
        if len(set(ended)) != len(ended) or len(ended) != len(known) + more:
            raise NotAlike


def _real(place: int, missing: int) -> int:
    return place if place < _HEAD else place + missing
