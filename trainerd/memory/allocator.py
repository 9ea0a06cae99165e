"""torch's CUDA caching allocator, replayed: from births and deaths of storages to allocated and reserved bytes.

The rules are those of c10/cuda/CUDACachingAllocator.cpp (one stream): malloc, round_size, roundup_power2_next_division,
get_free_block, should_split, get_allocation_size, alloc_found_block, free_block, try_merge_blocks, release_available_cached_blocks,
release_cached_blocks, garbage_collect_cached_blocks; find_expandable_block and map_block for expandable segments. Written from that
source and not yet compared with a GPU; tests/test_memory_gpu.py does so where there is one. Must not know what the storages hold.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

_MIN_BLOCK = 512
_SMALL = 1 << 20  # at most this comes from the small pool
_SMALL_SEGMENT = 2 << 20
LARGE_SEGMENT = 20 << 20
_LEAST_OWN_SEGMENT = 10 << 20  # from here on a request has a segment of its own
_ROUND_LARGE = 2 << 20
_FIRST_POWER = 20  # below 1 MiB it is divided as from there on
_FAR = 1 << 50  # address space between segments: they never touch


class OutOfMemory(Exception):
    """The limit does not allow this request, even with every cached segment given back."""

    def __init__(self, wanted: int, reserved: int) -> None:
        super().__init__(f"{wanted} bytes more than {reserved} reserved ones")
        self.wanted, self.reserved = wanted, reserved


@dataclass(frozen=True)
class Peaks:
    """The highest of both counters, and how often cached segments had to be given back to go on."""

    allocated: int
    reserved: int
    retries: int = 0


class _Block:
    """A stretch of one segment; neighbours in address order."""

    __slots__ = ("address", "born", "free", "mapped", "next", "pool", "prev", "size")

    def __init__(self, pool: _Pool, address: int, size: int, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.mapped = pool, address, size, mapped
        self.prev: _Block | None = None
        self.next: _Block | None = None
        self.free = True
        self.born = 0

    def cut(self, size: int) -> _Block:
        """The rest behind the first `size` bytes becomes a block of its own."""
        rest = _Block(self.pool, self.address + size, self.size - size, self.mapped)
        rest.prev, rest.next = self, self.next
        if rest.next is not None:
            rest.next.prev = rest
        self.next, self.size = rest, size
        return rest


class _Pool:
    """Free blocks of one kind, the smallest first and of equal ones the lowest; `unmapped` only by address."""

    def __init__(self, small: bool, page: int) -> None:
        self.small, self.page = small, page
        self.order: list[tuple[int, int]] = []
        self.blocks: dict[int, _Block] = {}
        self.unmapped: list[int] = []
        self.calls = 0

    def put(self, block: _Block) -> None:
        self.blocks[block.address] = block
        if block.mapped:
            block.born = self.calls
            insort(self.order, (block.size, block.address))
        else:
            insort(self.unmapped, block.address)

    def take(self, block: _Block) -> None:
        del self.blocks[block.address]
        if block.mapped:
            del self.order[bisect_left(self.order, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, block.address)]


class Allocator:
    """Counts what torch would have allocated and reserved. `limit` is the process's cap, `device_bytes` the whole device; the others
    are the variable's (allocator_settings.py), in bytes: `rounding` is max_non_split_rounding_mb, `divisions` are by powers of two."""

    def __init__(
        self,
        *,
        expandable: bool = False,
        limit: int | None = None,
        collect_at: float = 0.0,
        device_bytes: int = 1 << 42,
        max_split: float = math.inf,
        rounding: int = LARGE_SEGMENT,
        large_segment: int = LARGE_SEGMENT,
        divisions: Sequence[int] = (),
    ) -> None:
        self.expandable, self.limit, self.collect_at = expandable, limit, collect_at
        self.device_bytes, self.max_split, self.rounding = device_bytes, max_split, rounding
        self.large_segment, self.divisions = large_segment, divisions
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = self.retries = 0
        self._pools = (_Pool(True, _SMALL_SEGMENT), _Pool(False, large_segment))
        self._next_address = _FAR

    def malloc(self, size: int) -> _Block | None:
        """A block for `size` bytes; nothing for none, as in torch."""
        if size <= 0:
            return None
        size = self._rounded(size)
        pool = self._pools[size > _SMALL]
        pool.calls += 1
        block = self._cached(pool, size) or self._fresh(pool, size)
        rest = block.size - size
        if rest >= _MIN_BLOCK if pool.small or self.expandable else rest > _SMALL and size < self.max_split:
            pool.put(block.cut(size))
        block.free = False
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: _Block | None) -> None:
        """The block is cached, one with its free neighbours."""
        if block is None:
            return
        self.allocated -= block.size
        block.free = True
        block.pool.put(self._merged(block))

    def empty_cache(self) -> None:
        """Segments (expandable: pages) that hold nothing go back to the driver."""
        for pool in self._pools:
            for _, address in list(pool.order):
                block = pool.blocks[address]
                if self.expandable:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    pool.take(block)
                    self.reserved -= block.size

    def _rounded(self, size: int) -> int:
        """To 512 bytes; where powers of two are divided, to the next of these parts."""
        if self.divisions and size >= _MIN_BLOCK:
            power = size.bit_length() - 1
            times = self.divisions[min(max(0, power - _FIRST_POWER), len(self.divisions) - 1)]
            if times > 1 and size > _MIN_BLOCK * times:
                part = (1 << power) // times
                return -(-size // part) * part
        return -(-size // _MIN_BLOCK) * _MIN_BLOCK

    def _merged(self, block: _Block) -> _Block:
        """`block` with the free neighbours that are mapped like it; those leave the pool."""
        for other in (block.prev, block.next):
            if other is None or not other.free or other.mapped != block.mapped:
                continue
            block.pool.take(other)
            first, second = (other, block) if other is block.prev else (block, other)
            first.size += second.size
            first.next = second.next
            if first.next is not None:
                first.next.prev = first
            block = first
        return block

    def _cached(self, pool: _Pool, size: int) -> _Block | None:
        """The smallest free block that is large enough."""
        place = bisect_left(pool.order, (size, 0))
        if place == len(pool.order):
            return None
        block = pool.blocks[pool.order[place][1]]
        if self.expandable:
            # What can still grow is as large as it can become: a larger block that cannot is the better fit.
            for _, address in pool.order[place + 1 :]:
                other = pool.blocks[address]
                if _reach(other) >= _reach(block):
                    break
                block = other
        if size < self.max_split <= block.size or self.max_split <= size <= block.size - self.rounding:
            return None  # what is never split goes to requests of nearly its own size
        pool.take(block)
        return block

    def _fresh(self, pool: _Pool, size: int) -> _Block:
        """Memory from the driver; at the limit, after giving back what is cached."""
        if self.collect_at and self.limit is not None:
            self._collect(int(self.collect_at * self.limit))
        whole = segment_bytes(size, self.large_segment)
        if not self._allows(whole) and not (self._gave_up_oversize(pool, size) and self._allows(whole)):
            self.retries += 1
            self.empty_cache()
            if not self._allows(whole):
                raise OutOfMemory(size, self.reserved)
        if self.expandable:
            return self._expanded(pool, size)
        block = _Block(pool, self._next_address, whole)
        self._next_address += _FAR
        self._reserve(whole)
        return block

    def _gave_up_oversize(self, pool: _Pool, size: int) -> bool:
        """With max_split_size: one block that is never split and large enough goes back, else the largest of them until it is enough."""
        if self.max_split == math.inf or self.expandable:
            return False
        wanted = max(size, int(self.max_split))
        place = bisect_left(pool.order, (wanted, 0))
        given = 0
        going = pool.order[place : place + 1] or pool.order[::-1]
        for held, address in list(going):
            if given >= wanted or held < self.max_split:
                break
            pool.take(pool.blocks[address])
            self.reserved -= held
            given += held
        return given >= wanted

    def _allows(self, more: int) -> bool:
        return self.limit is None or self.reserved + more <= self.limit

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _collect(self, threshold: int) -> None:
        """garbage_collection_threshold: unsplit large blocks older than the average go, until enough is free."""
        pool = self._pools[1]
        missing = self.reserved - threshold
        idle = [b for b in (pool.blocks[address] for _, address in pool.order) if b.prev is None and b.next is None]
        while missing > 0 and idle:
            average = sum(pool.calls - b.born for b in idle) / len(idle)
            old = [b for b in idle if pool.calls - b.born >= average]
            if not old:
                return
            for block in old:
                pool.take(block)
                self.reserved -= block.size
                missing -= block.size
            idle = [b for b in idle if b not in old]

    # Expandable segments

    def _expanded(self, pool: _Pool, size: int) -> _Block:
        block = self._with_room(pool, size)
        if not block.mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            assert block.next is not None
            block = self._map(block.next, min(size - block.size, block.next.size))
        pool.take(block)
        return block

    def _with_room(self, pool: _Pool, size: int) -> _Block:
        """Unmapped address space, with the free block before it, that can hold `size`; else a new segment."""
        for address in pool.unmapped:
            block = pool.blocks[address]
            start = block.prev if block.prev is not None and block.prev.free else block
            room = 0
            here: _Block | None = start
            while room < size and here is not None and here.free:
                room += here.size
                here = here.next
            if room >= size:
                return start
        space = -(-self.device_bytes * 9 // 8 // pool.page) * pool.page
        base = -(-self._next_address // pool.page) * pool.page
        block = _Block(pool, base, space, mapped=False)
        self._next_address = base + max(_FAR, 2 * space)
        pool.put(block)
        return block

    def _map(self, block: _Block, size: int) -> _Block:
        """Whole pages for the first `size` bytes of an unmapped block; one with its free neighbours, and in the pool."""
        pool = block.pool
        size = min(-(-size // pool.page) * pool.page, block.size)
        pool.take(block)
        if size < block.size:
            pool.put(block.cut(size))
        block.mapped = True
        self._reserve(size)
        block = self._merged(block)
        pool.put(block)
        return block

    def _unmap(self, block: _Block) -> None:
        """The whole pages inside a free block go back."""
        page = block.pool.page
        start = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if end <= start:
            return
        block.pool.take(block)
        if start > block.address:
            rest = block.cut(start - block.address)
            block.pool.put(block)
            block = rest
        if end < block.address + block.size:
            block.pool.put(block.cut(end - block.address))
        block.mapped = False
        self.reserved -= block.size
        block.pool.put(self._merged(block))


def replay(sizes: Sequence[int], events: Sequence[int], allocator: Allocator) -> Peaks:
    """The peaks after these events: n is the birth of storage n, ~n its end. Raises OutOfMemory at the allocator's limit."""
    held: dict[int, _Block | None] = {}
    malloc, free = allocator.malloc, allocator.free
    for event in events:
        if event >= 0:
            held[event] = malloc(sizes[event])
        else:
            free(held.pop(~event))
    return Peaks(allocator.peak_allocated, allocator.peak_reserved, allocator.retries)


def segment_bytes(size: int, large_segment: int = LARGE_SEGMENT) -> int:
    """What is asked of the driver for a request of this size."""
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _LEAST_OWN_SEGMENT:
        return large_segment
    return -(-size // _ROUND_LARGE) * _ROUND_LARGE


def _reach(block: _Block) -> int:
    """What a block of an expandable segment can grow to."""
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)
