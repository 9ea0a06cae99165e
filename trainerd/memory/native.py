"""The replay that every estimate needs, fast: torch's native allocator, without a limit, from empty. Must say what allocator.py says.

The rules are told there, in a form one can read beside torch's source; here they are one loop over integers. A test holds both
against each other, for random traces and for every table.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from trainerd.memory.allocator import Peaks, segment_bytes

_UNIT = 9  # all sizes are counted in 512 bytes
_SMALL = (1 << 20) >> _UNIT
_FAR = 34  # bits for an address
_ADDRESS = (1 << _FAR) - 1


def peaks(sizes: Sequence[int], events: Sequence[int]) -> Peaks:
    """The peaks after these events: n is the birth of storage n, ~n its end. What has ended may be born again."""
    units = [(size + 511) >> _UNIT for size in sizes]
    # Of each pool the free blocks: size and address as one number, sorted; and their sizes by where they begin, and where they end.
    small, large, begins, ends = list[int](), list[int](), dict[int, int](), dict[int, int]()
    places, wholes = [0] * len(sizes), dict[int, int]()
    allocated = reserved = most = address = 0
    for event in events:
        if event >= 0:
            size = units[event]
            if not size:
                continue
            keys, spare = (small, 0) if size <= _SMALL else (large, _SMALL)
            at = bisect_left(keys, size << _FAR)
            if at < len(keys):
                key = keys.pop(at)
                place, whole = key & _ADDRESS, key >> _FAR
                del begins[place]
            else:
                whole = segment_bytes(size << _UNIT) >> _UNIT
                reserved += whole
                place, address = address, address + whole + 1  # segments never touch
            rest = whole - size
            if rest > spare:
                start = place + size
                begins[start] = ends[place + whole] = rest
                insort(keys, rest << _FAR | start)
            else:
                ends.pop(place + whole, None)
                if rest:  # too little to be split off
                    wholes[event] = size = whole
            places[event] = place
            allocated += size
            if allocated > most:
                most = allocated
        elif size := units[~event]:
            keys = small
            if size > _SMALL:
                keys, size = large, wholes.pop(~event, size)
            allocated -= size
            place = places[~event]
            end = place + size
            if end in begins:
                more = begins.pop(end)
                del keys[bisect_left(keys, more << _FAR | end)]
                end += more
            if place in ends:
                more = ends.pop(place)
                place -= more
                del keys[bisect_left(keys, more << _FAR | place)]
            begins[place] = ends[end] = size = end - place
            insort(keys, size << _FAR | place)
    return Peaks(most << _UNIT, reserved << _UNIT)
