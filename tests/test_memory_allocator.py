"""The replay of torch's CUDA allocator: traces worked out by hand from its source, and what must hold for any trace."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainerd.memory.allocator import Allocator, OutOfMemory, replay

MIB = 1 << 20


def test_sizes_are_rounded_to_512_bytes() -> None:
    """Three numbers cost as much as a hundred; nothing costs nothing."""
    a = Allocator()
    assert a.malloc(0) is None
    for size, held in ((1, 512), (512, 512), (513, 1024)):
        before = a.allocated
        a.malloc(size)
        assert a.allocated - before == held


@pytest.mark.parametrize(
    ("size", "reserved"),
    [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB + 1, 12 * MIB)],
)
def test_segments_come_in_three_kinds(size: int, reserved: int) -> None:
    """2 MiB for small requests, 20 MiB below 10 MiB, above that the request rounded up to 2 MiB."""
    a = Allocator()
    a.malloc(size)
    assert a.reserved == reserved


def test_a_large_block_is_split_only_when_more_than_one_mebibyte_is_left() -> None:
    """A remainder of 1 MiB stays with the block, and counts as allocated."""
    a = Allocator()
    block = a.malloc(12 * MIB)
    a.free(block)
    a.malloc(11 * MIB)
    assert a.allocated == 12 * MIB
    b = Allocator()
    block = b.malloc(12 * MIB)
    b.free(block)
    b.malloc(11 * MIB - 512)
    assert b.allocated == 11 * MIB - 512
    b.malloc(MIB + 512)  # the remainder serves the next request without asking the driver
    assert b.reserved == 12 * MIB


def test_the_smallest_block_that_fits_is_taken_and_neighbours_grow_together_again() -> None:
    """Best fit, split, coalesce: three pieces of one segment become one free block."""
    a = Allocator()
    pieces = [a.malloc(5 * MIB) for _ in range(4)]
    assert a.reserved == 20 * MIB
    other = a.malloc(6 * MIB)
    assert a.reserved == 40 * MIB
    a.free(pieces[1])
    a.free(other)
    small = a.malloc(4 * MIB)  # from the 5 MiB hole, not from the 20 MiB that is free as a whole
    a.malloc(20 * MIB)
    assert a.reserved == 40 * MIB
    a.free(small)
    for piece in (pieces[0], pieces[2], pieces[3]):
        a.free(piece)
    a.malloc(20 * MIB)
    assert a.reserved == 40 * MIB


def test_at_the_limit_cached_segments_go_back_first() -> None:
    """What is cached and unsplit is given to the driver and the request tried again; only then it is out of memory."""
    a = Allocator(limit=40 * MIB)
    a.free(a.malloc(30 * MIB))
    a.malloc(34 * MIB)
    assert (a.reserved, a.peak_reserved, a.retries) == (34 * MIB, 34 * MIB, 1)
    with pytest.raises(OutOfMemory) as refused:
        a.malloc(12 * MIB)
    assert refused.value.reserved == 34 * MIB


def test_fragments_keep_a_segment() -> None:
    """A segment with one living block cannot go back."""
    a = Allocator(limit=40 * MIB)
    blocks = [a.malloc(4 * MIB) for _ in range(5)]
    for block in blocks[1:]:
        a.free(block)
    with pytest.raises(OutOfMemory):
        a.malloc(24 * MIB)
    assert a.reserved == 20 * MIB


def test_the_collection_threshold_gives_back_the_oldest() -> None:
    """Above the share of the limit, blocks that have not been used for longer than the average go first."""
    a = Allocator(limit=200 * MIB, collect_at=0.5)
    old = a.malloc(30 * MIB)
    a.malloc(60 * MIB)
    a.free(old)
    a.free(a.malloc(32 * MIB))
    a.malloc(40 * MIB)
    assert a.reserved == (60 + 32 + 40) * MIB


def test_an_expandable_segment_grows_by_pages() -> None:
    """Pages of 20 MiB (small: 2 MiB) are mapped one after another, and a request may reach over their border."""
    a = Allocator(expandable=True)
    a.malloc(15 * MIB)
    a.malloc(15 * MIB)
    assert a.reserved == 40 * MIB
    a.malloc(10 * MIB)
    assert a.reserved == 40 * MIB
    a.malloc(100)
    assert a.reserved == 42 * MIB


def test_expandable_segments_leave_no_holes_between_requests_of_many_sizes() -> None:
    """The same trace needs less with them than without."""
    sizes = [n * MIB for n in (11, 23, 31, 47)]
    events = [0, ~0, 1, ~1, 2, ~2, 3, ~3]
    assert replay(sizes, events, Allocator()).reserved == (12 + 24 + 32 + 48) * MIB
    assert replay(sizes, events, Allocator(expandable=True)).reserved == 60 * MIB


def test_pages_that_hold_nothing_go_back() -> None:
    """empty_cache() on an expandable segment gives back whole pages and keeps those in use."""
    a = Allocator(expandable=True)
    first, second = a.malloc(20 * MIB), a.malloc(40 * MIB)
    a.free(second)
    a.empty_cache()
    assert a.reserved == 20 * MIB
    a.free(first)
    a.empty_cache()
    assert a.reserved == 0


TRACES = st.lists(st.tuples(st.integers(1, 48 * MIB), st.integers(0, 1 << 30)), min_size=1, max_size=120)


@settings(max_examples=120, deadline=None)
@given(TRACES, st.booleans())
def test_what_holds_for_any_trace(requests: list[tuple[int, int]], expandable: bool) -> None:
    """Allocated is what the living blocks hold; blocks never overlap; everything freed and emptied is nothing."""
    a = Allocator(expandable=expandable, device_bytes=4 << 30)
    living = []
    for size, number in requests:
        if number % 5 < 2 and living:
            a.free(living.pop(number % len(living)))
        else:
            block = a.malloc(size)
            assert block is not None and block.size >= size and block.size % 512 == 0
            living.append(block)
        assert a.allocated == sum(block.size for block in living) <= a.reserved
        spans = sorted((block.address, block.address + block.size) for block in living)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert a.reserved % (2 * MIB) == 0
    for block in living:
        a.free(block)
    assert a.allocated == 0
    a.empty_cache()
    assert a.reserved == 0


@settings(max_examples=60, deadline=None)
@given(TRACES)
def test_a_limit_that_was_enough_is_enough(requests: list[tuple[int, int]]) -> None:
    """Played again with its own peak as the limit, a trace goes through without giving anything back."""
    sizes = [size for size, _ in requests]
    events = list(range(len(sizes))) + [~n for n in range(len(sizes))]
    free = replay(sizes, events, Allocator())
    again = replay(sizes, events, Allocator(limit=free.reserved))
    assert again == free
