"""A played timeline as a GPU's allocator meets it: for the replay, and for many numbers of samples alike. Must not replay it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainerd.memory.native import Order

if TYPE_CHECKING:
    from trainerd.memory.timeline import Played


def of(played: Played, number: int) -> Order:
    """cuBLAS takes its workspace with the first product of a step, from the same allocator, and keeps it: a storage beside the others,
    whose size stands behind those of the others, of which there are that number. Made once, when it is needed."""
    if played.order is None:
        played.order = _made(played, number)
    return played.order


def _made(played: Played, number: int) -> Order:
    events, second, codes, again = played.events, played.second, played.codes, None
    if second:
        again = played.began + 1, played.ended + 1
    if played.left_out:  # another step than the first
        again, codes = None, None if codes is None else _after(codes, played.ended, _found(codes, events, second))
        events = _after(events, played.ended, second)
    return Order(
        _after(events, played.began, [len(played.tape.sizes)]),
        None if codes is None else _after(codes, played.began, [number]),
        again,
    )


def _after(events: Sequence[int], at: int, more: Sequence[int]) -> list[int]:
    return [*events[:at], *more, *events[at:]]


def _found(codes: Sequence[int], events: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The codes of these events, all of which happened before."""
    known = dict(zip(events, codes, strict=True))
    return list(map(known.__getitem__, wanted))
