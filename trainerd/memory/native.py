"""The replay that every estimate needs, fast: torch's native allocator, without a limit, from empty. Must say what allocator.py says.

The rules are told there, in a form one can read beside torch's source; here they are one loop over integers. A test holds both
against each other, for random traces and for every table. All but few events are of the small pool: its blocks are always split, and
a cell for each 512 bytes says what lies beside one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from trainerd.memory.allocator import Peaks, segment_bytes

_UNIT = 9  # all sizes are counted in 512 bytes
_SMALL = (1 << 20) >> _UNIT
_SEGMENT = segment_bytes(1) >> _UNIT
_FAR = 34  # bits for an address
_ADDRESS = (1 << _FAR) - 1
_NO_BLOCK, _END = -1, 1 << 60  # before and behind all free blocks


def peaks(sizes: Sequence[int], events: Sequence[int], again: tuple[int, int] | None = None) -> Peaks:
    """The peaks after these events: n is the birth of storage n, ~n its end. What has ended may be born again.

    `again`: the events from there to there happen a second time, right after; they leave nothing behind, and end nothing that was
    there before. The small pool is then as it was before them, but for segments that are empty now. Those are taken when the first
    time would have asked for new ones, in the same order, because they are the largest blocks there are and the highest ones; so the
    second time is the first. In the large pool a block that is left may fit better than a new one: there it is gone through.
    """
    pools = _Pools(sizes)
    if again is None:
        pools.run(events)
    else:
        begin, end = again
        pools.run(events[:begin])
        pools.run_twice(events[begin:end])
        pools.run(events[end + end - begin :])
    return Peaks(pools.most << _UNIT, pools.reserved << _UNIT)


class _Pools:
    """Both pools. `most` is the highest they have held together."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.most = 0
        units = [(size + 511) >> _UNIT for size in sizes]
        self._units, self._places = [*units, *reversed(units)], [0] * len(sizes)  # an end is looked up from the back
        # The small pool's free blocks: size and address as one number, sorted; the same number is in a block's first and last cell.
        self._free, self._cells, self._held = [_NO_BLOCK, _END], list[int](), 0
        self._large = _Large()
        self._passed: list[tuple[int, int]] = []
        """What has come by of the large pool, and the most that the small one held since what came before it."""

    @property
    def reserved(self) -> int:
        return len(self._cells) // (_SEGMENT + 1) * _SEGMENT + self._large.reserved

    def run_twice(self, events: Sequence[int]) -> None:
        """The second time only in the large pool."""
        del self._passed[:]
        highest = self.run(events)
        for event, held in self._passed:
            self.most = max(self.most, held + self._large.held)
            self._large.take(event, self._units)
        self.most = max(self.most, highest + self._large.held)

    def run(self, events: Sequence[int]) -> int:  # noqa: C901 - a call for each event would cost as much as the rest
        """One event after the other; the most that the small pool has held since the last one of the large pool."""
        units, places, free, cells, large = self._units, self._places, self._free, self._cells, self._large
        segment = [0] * (_SEGMENT + 1)  # one cell more: segments never touch
        allocated = most = self._held
        for event in events:
            size = units[event]
            if size > _SMALL:
                self.most = max(self.most, most + large.held)
                self._passed.append((event, most))
                large.take(event, units)
                most = allocated
            elif not size:
                continue
            elif event >= 0:
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
                allocated += size
                if allocated > most:
                    most = allocated
            else:
                allocated -= size
                end = (place := places[~event]) + size
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
        self._held = allocated
        self.most = max(self.most, most + large.held)
        return most


class _Large:
    """The large pool: segments of any size, and what is too little to be split off stays with its block."""

    def __init__(self) -> None:
        self.reserved = self.held = 0
        self._address = 0
        self._free: list[int] = []
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._held: dict[int, tuple[int, int]] = {}

    def take(self, event: int, units: Sequence[int]) -> None:
        """This birth or end."""
        if event >= 0:
            self._born(event, units[event])
        else:
            self._ended(~event)

    def _born(self, number: int, size: int) -> None:
        at = bisect_left(self._free, size << _FAR)
        if at < len(self._free):
            block = self._free.pop(at)
            place, whole = block & _ADDRESS, block >> _FAR
            del self._begins[place]
        else:
            whole = segment_bytes(size << _UNIT) >> _UNIT
            self.reserved += whole
            place, self._address = self._address, self._address + whole + 1  # segments never touch
        rest = whole - size
        if rest > _SMALL:
            self._begins[place + size] = self._ends[place + whole] = block = rest << _FAR | place + size
            insort(self._free, block)
        else:
            self._ends.pop(place + whole, None)
            size = whole
        self._held[number] = place, size
        self.held += size

    def _ended(self, number: int) -> None:
        free, begins, ends = self._free, self._begins, self._ends
        place, size = self._held.pop(number)
        self.held -= size
        end = place + size
        if end in begins:
            block = begins.pop(end)
            del free[bisect_left(free, block)]
            end += block >> _FAR
        if place in ends:
            block = ends.pop(place)
            del free[bisect_left(free, block)]
            place -= block >> _FAR
        begins[place] = ends[end] = block = end - place << _FAR | place
        insort(free, block)
