"""The replay that every estimate needs, fast: torch's native allocator, without a limit, from empty. Must say what allocator.py says.

The rules are told there, in a form one can read beside torch's source; here they are a loop over integers for each pool. A test holds
both against each other, for random traces and for every table. All but few events are of the small pool: its blocks are always split,
so that it holds what was asked for and all there is to know is how many segments it has, and a cell for each 512 bytes says what lies
beside a block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence
from itertools import accumulate, chain
from operator import neg

from trainerd.memory.allocator import Peaks, segment_bytes

_UNIT = 9  # all sizes are counted in 512 bytes
_SMALL = (1 << 20) >> _UNIT
_SEGMENT = segment_bytes(1) >> _UNIT
_FAR = 34  # bits for an address
_ADDRESS = (1 << _FAR) - 1
_NO_BLOCK, _END = -1, 1 << 60  # before and behind all free blocks


class Order:
    """Births and ends one after the other, without what is as large as that: the same for many replays.

    `events`: n is the birth of storage n, ~n its end. What has ended may be born again. `codes`: where the size of each one's storage
    stands in the list of sizes, of an end ~ that; None: every storage has its own place there. `again`: the events from there to there
    happen twice, the second time right after the first, where they are not written down again; they leave nothing behind, and end
    nothing that was there before.
    """

    def __init__(self, events: Sequence[int], codes: Sequence[int] | None = None, again: tuple[int, int] | None = None) -> None:
        self.events, self.codes, self.again = events, events if codes is None else codes, again
        self.begin, self.end = again or (0, len(events))
        self.num_storages = max(events, default=-1) + 1
        self._by_size: dict[int, list[int]] = {}
        for at, code in enumerate(() if codes is None else codes):
            self._by_size.setdefault(code if code >= 0 else ~code, []).append(at)

    def of_sizes(self, places: Collection[int]) -> list[int]:
        """Which events are of the sizes that stand there. Looked up, where few sizes are those of many storages."""
        if self._by_size:
            return sorted(chain.from_iterable(self._by_size.get(place, ()) for place in places))
        return [at for at, event in enumerate(self.codes) if event in places or ~event in places] if places else []

    def written_out(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The size of each storage, and all events: what happens twice, twice."""
        own = {event: sizes[code] for event, code in zip(self.events, self.codes, strict=True) if event >= 0}
        again = self.events[self.begin : self.end] if self.again is not None else ()
        return [own.get(number, 0) for number in range(self.num_storages)], [*self.events[: self.end], *again, *self.events[self.end :]]


def peaks(sizes: Sequence[int], events: Sequence[int], again: tuple[int, int] | None = None) -> Peaks:
    """The peaks after these events, of which those that happen again are written down twice."""
    if again is not None:
        begin, end = again
        events = [*events[:end], *events[end + end - begin :]]
    return replayed(sizes, Order(events, again=again))


def replayed(sizes: Sequence[int], order: Order) -> Peaks:
    """The peaks with these sizes.

    After a step that leaves nothing behind the small pool is as it was before, but for segments that are empty now. Those are taken when
    new ones would be asked for, in the same order, because they are the largest blocks there are and the highest ones; so the second
    time is the first, and what comes afterwards goes on from before. In the large pool a block that is left may fit better than a new
    one: there all of it is gone through.
    """
    changes, pools = _Changes(sizes, order), _Pools()
    pools.run(order, changes, 0, order.begin)
    before = pools.small.copy()
    pools.run(order, changes, order.begin, order.end)
    if order.again is not None:
        pools.run_large(order, changes, order.begin, order.end)
        before.had, pools.small = pools.small.segments, before
        pools.run(order, changes, order.end, len(order.events))
    return Peaks(pools.most << _UNIT, pools.reserved << _UNIT)


class _Changes:
    """What each event changes of what is held, in units: in all, and of the small pool; and which events are of the large one, with what
    they ask for."""

    def __init__(self, sizes: Sequence[int], order: Order) -> None:
        units = [(size + 511) >> _UNIT for size in sizes]
        large = {place for place, unit in enumerate(units) if unit > _SMALL}
        small = [0 if place in large else unit for place, unit in enumerate(units)]
        # An end's is looked up from the back.
        self.small = list(map([*small, *map(neg, reversed(small))].__getitem__, order.codes))
        self.all = self.small[:]
        self.of_large = order.of_sizes(large)
        self.large = list(map([*units, *map(neg, reversed(units))].__getitem__, map(order.codes.__getitem__, self.of_large)))
        for at, change in zip(self.of_large, self.large, strict=True):
            self.all[at] = change


class _Pools:
    """Both pools. `most` is the highest they have held together."""

    def __init__(self) -> None:
        self.most = self._held = 0
        self.small, self._large = _Small(), _Large()

    @property
    def reserved(self) -> int:
        return self.small.segments * _SEGMENT + self._large.reserved

    def run(self, order: Order, changes: _Changes, begin: int, end: int) -> None:
        """The events from there to there, in either pool."""
        self.run_large(order, changes, begin, end)
        self.small.run(order.num_storages, order.events[begin:end], changes.small[begin:end])

    def run_large(self, order: Order, changes: _Changes, begin: int, end: int) -> None:
        """The same in the large one, with what both hold together."""
        which = changes.of_large
        first, last = bisect_left(which, begin), bisect_left(which, end)
        self._large.run(order.events, which[first:last], changes.large[first:last], changes.all)
        some = changes.all[begin:end]
        self.most = max(self.most, max(accumulate(some, initial=self._held)))
        self._held += sum(some)


class _Small:
    """The small pool: segments of one size, in which every rest is split off."""

    def __init__(self) -> None:
        # The free blocks: size and address as one number, sorted; the same number is in a block's first and last cell.
        self._free, self._cells, self._places = [_NO_BLOCK, _END], list[int](), list[int]()
        self.had = 0
        """So many segments it has had before: they are empty, and taken before new ones are asked for."""

    @property
    def segments(self) -> int:
        return max(self.had, len(self._cells) // (_SEGMENT + 1))

    def copy(self) -> _Small:
        """The same, to be gone on from. Cells are many, and all but those of free blocks are nothing."""
        made = _Small()
        made._free, made._places = self._free[:], self._places[:]
        made._cells = cells = [0] * len(self._cells)
        for block in self._free[1:-1]:
            place = block & _ADDRESS
            cells[place] = cells[place + (block >> _FAR) - 1] = block
        return made

    def run(self, num_storages: int, events: Sequence[int], changes: Sequence[int]) -> None:
        """One event after the other, and by how much each changes what is held: by nothing, if it is not of this pool."""
        places, free, cells = self._places, self._free, self._cells
        places += [0] * (num_storages - len(places))
        segment = [0] * (_SEGMENT + 1)  # one cell more: segments never touch
        for event, size in zip(events, changes, strict=True):
            if size > 0:
                at = bisect_left(free, size << _FAR)
                block = free[at]
                if block == _END:
                    block = _SEGMENT << _FAR | len(cells)
                    free.insert(at, block)
                    cells += segment
                places[event] = place = block & _ADDRESS
                last = place + (block >> _FAR) - 1
                cells[place] = cells[last] = 0
                place += size
                if place <= last:
                    cells[place] = cells[last] = block = last + 1 - place << _FAR | place
                    if block > free[at - 1]:
                        free[at] = block
                    else:
                        del free[at]
                        insort(free, block)
                else:
                    del free[at]
            elif size:
                end = (place := places[~event]) - size
                before, after = cells[place - 1], cells[end]  # before the first of all: the last, which is between segments
                if before:
                    cells[place - 1] = 0
                    place -= before >> _FAR
                if after:
                    cells[end] = 0
                    end += after >> _FAR
                    if before:
                        del free[bisect_left(free, after)]
                cells[place] = cells[end - 1] = block = end - place << _FAR | place
                if grown := before or after:
                    at = bisect_left(free, grown)
                    if block < free[at + 1]:
                        free[at] = block
                        continue
                    del free[at]
                insort(free, block)


class _Large:
    """The large pool: segments of any size, and what is too little to be split off stays with its block."""

    def __init__(self) -> None:
        self.reserved = self._address = 0
        self._free = [_NO_BLOCK, _END]
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._places: dict[int, int] = {}
        self._wholes: dict[int, int] = {}

    def run(self, events: Sequence[int], which: Sequence[int], wanted: Sequence[int], changes: list[int]) -> None:
        """Those of the events that are of this pool, and what is asked for with each. What it really changes, with what stays with its
        block, is written down."""
        free, begins, ends, places, wholes = self._free, self._begins, self._ends, self._places, self._wholes
        for index, size in zip(which, wanted, strict=True):
            event = events[index]
            if event >= 0:
                at = bisect_left(free, size << _FAR)
                block = free[at]
                if block != _END:
                    del free[at]
                    place, whole = block & _ADDRESS, block >> _FAR
                    del begins[place]
                else:
                    whole = segment_bytes(size << _UNIT) >> _UNIT
                    self.reserved += whole
                    place, self._address = self._address, self._address + whole + 1  # segments never touch
                rest = whole - size
                if rest > _SMALL:
                    begins[place + size] = ends[place + whole] = block = rest << _FAR | place + size
                    insort(free, block)
                    whole = size
                else:
                    ends.pop(place + whole, None)
                places[event], wholes[event] = place, whole
                changes[index] = whole
            else:
                place, whole = places[~event], wholes[~event]
                changes[index] = -whole
                end = place + whole
                if after := begins.pop(end, 0):
                    del free[bisect_left(free, after)]
                    end += after >> _FAR
                if before := ends.pop(place, 0):
                    del free[bisect_left(free, before)]
                    place -= before >> _FAR
                begins[place] = ends[end] = block = end - place << _FAR | place
                insort(free, block)
