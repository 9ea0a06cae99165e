"""The replay that every estimate needs, fast: torch's native allocator, without a limit, from empty. Must say what allocator.py says.

The rules are told there, in a form one can read beside torch's source; here they are one loop over integers. A test holds both
against each other, for random traces and for every table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from trainerd.memory.allocator import Peaks, segment_bytes

_UNIT = 9  # all sizes are counted in 512 bytes
_SMALL = (1 << 20) >> _UNIT
_FAR = 40  # bits for a place within a segment
# A block is a list: it is made and changed a hundred thousand times. [size, block before, block behind, free?, place]
Block = list[Any]
Pool = tuple[list[int], list[Block]]
"""In step: size and place as one number, sorted; and the free block it belongs to."""


def peaks(sizes: Sequence[int], events: Sequence[int]) -> Peaks:
    """The peaks after these events: n is the birth of storage n, ~n its end."""
    pools: tuple[Pool, Pool] = (([], []), ([], []))
    shift = _FAR + (len(sizes) + 1).bit_length()  # no more segments than storages
    units = [(size + 511) >> _UNIT for size in sizes]
    held: list[Block | None] = [None] * len(sizes)
    allocated = reserved = most = num_segments = 0
    for event in events:
        if event >= 0:
            size = units[event]
            if not size:
                continue
            keys, blocks = pools[size > _SMALL]
            at = bisect_left(keys, size << shift)
            if at < len(keys):
                del keys[at]
                block = blocks.pop(at)
            else:
                num_segments += 1
                block = [segment_bytes(size << _UNIT) >> _UNIT, None, None, False, num_segments << _FAR]
                reserved += block[0]
            rest = block[0] - size
            if rest > (0 if size <= _SMALL else _SMALL):
                behind = block[2]
                cut = [rest, block, behind, True, block[4] + size]
                if behind is not None:
                    behind[1] = cut
                block[0], block[2] = size, cut
                key = rest << shift | cut[4]
                at = bisect_left(keys, key)
                keys.insert(at, key)
                blocks.insert(at, cut)
            block[3] = False
            held[event] = block
            allocated += block[0]
            if allocated > most:
                most = allocated
        elif (done := held[~event]) is not None:
            allocated -= done[0]
            _give_back(done, *pools[units[~event] > _SMALL], shift)
    return Peaks(most << _UNIT, reserved << _UNIT)


def _give_back(block: Block, keys: list[int], blocks: list[Block], shift: int) -> None:
    """The block is free, one with its free neighbours."""
    size, before, behind, _, place = block
    if before is not None and before[3]:
        at = bisect_left(keys, before[0] << shift | before[4])
        del keys[at], blocks[at]
        size, place, block = size + before[0], before[4], before
    if behind is not None and behind[3]:
        at = bisect_left(keys, behind[0] << shift | behind[4])
        del keys[at], blocks[at]
        size, behind = size + behind[0], behind[2]
    if behind is not None:
        behind[1] = block
    block[0], block[2], block[3] = size, behind, True
    key = size << shift | place
    at = bisect_left(keys, key)
    keys.insert(at, key)
    blocks.insert(at, block)
