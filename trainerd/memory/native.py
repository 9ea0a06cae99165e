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


def peaks(sizes: Sequence[int], events: Sequence[int]) -> Peaks:  # noqa: C901 - a call for each event would cost as much as the rest
    """The peaks after these events: n is the birth of storage n, ~n its end. What has ended may be born again."""
    units = [(size + 511) >> _UNIT for size in sizes]
    # The small pool's free blocks: size and address as one number, sorted; the same number is in a block's first and last cell.
    free, cells, segment = [_NO_BLOCK, _END], list[int](), [0] * (_SEGMENT + 1)  # one cell more: segments never touch
    large, places = _Large(), [0] * len(sizes)
    allocated = most = 0
    for event in events:
        if event >= 0:
            size = units[event]
            if size > _SMALL:
                allocated += large.born(event, size)
            elif size:
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
        elif (size := units[~event]) > _SMALL:
            allocated -= large.ended(~event)
        elif size:
            allocated -= size
            place = places[~event]
            end = place + size
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
    return Peaks(most << _UNIT, len(cells) // len(segment) * _SEGMENT + large.reserved << _UNIT)


class _Large:
    """The large pool: segments of any size, and what is too little to be split off stays with its block."""

    def __init__(self) -> None:
        self.reserved = 0
        self._address = 0
        self._free: list[int] = []
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._held: dict[int, tuple[int, int]] = {}

    def born(self, number: int, size: int) -> int:
        """What this storage takes."""
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
        return size

    def ended(self, number: int) -> int:
        """What this storage gives back."""
        free, begins, ends = self._free, self._begins, self._ends
        place, size = self._held.pop(number)
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
        return size
