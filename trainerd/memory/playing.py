"""Plays a table's timeline and its replay, and remembers what was played: the same question is answered at once. Must not judge it."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from trainerd.memory import allocator_settings
from trainerd.memory.allocator import Peaks
from trainerd.memory.timeline import Setup, Table, Timeline

_REMEMBERED = 512  # some kilobytes each: without its events a timeline is a few numbers


@dataclass(frozen=True)
class Played:
    """A timeline without its events, and on a GPU the allocator's peaks."""

    timeline: Timeline
    peaks: Peaks


_Key = tuple[str | int, Setup, int]
_known: OrderedDict[_Key, tuple[Table, Played]] = OrderedDict()
_latest: list[tuple[_Key, Table, Timeline]] = []
"""The last one that was not replayed: most likely that is asked for next."""
_lock = threading.Lock()


def played(table: Table, setup: Setup, workspace_bytes: int, *, replays: bool = True) -> Played:
    """What this setup allocates, and on a GPU what the allocator makes of it with cuBLAS's workspace of that size; without the replay,
    what it holds at least: its tensors."""
    # A table that does not say what it depends on is known by itself; it is kept, so that its number is nobody else's.
    key = (getattr(table, "key", id(table)), setup, workspace_bytes if setup.device == "cuda" else 0)
    with _lock:
        kept = _known.get(key)
        if kept is not None:
            _known.move_to_end(key)
            return kept[1] if replays else _unreplayed(kept[1].timeline)  # the same, whatever was asked before
        latest = next((timeline for known, _, timeline in _latest if known == key), None)
    timeline = _timeline(table, setup) if latest is None else latest
    if not replays:
        with _lock:
            _latest[:] = [(key, table, timeline)]
        return _unreplayed(timeline)
    made = _replayed(timeline, setup, workspace_bytes)
    with _lock:
        _known[key] = (table, made)
        while len(_known) > _REMEMBERED:
            _known.popitem(last=False)
    return made


def forget() -> None:
    """Begin anew: for measuring how long it takes."""
    with _lock:
        _known.clear()
        _latest.clear()


def _unreplayed(timeline: Timeline) -> Played:
    return Played(timeline, Peaks(timeline.peak, timeline.peak))


def _timeline(table: Table, setup: Setup) -> Timeline:
    with _without_collecting():
        return table.timeline(setup)


def _replayed(timeline: Timeline, setup: Setup, workspace_bytes: int) -> Played:
    peaks = Peaks(0, 0)
    if timeline.order is not None:
        with _without_collecting():
            peaks = allocator_settings.peaks([*timeline.ordered_sizes, workspace_bytes], timeline.order(), setup.allocator)
    return Played(replace(timeline, sizes=[], kinds=[], events=[], marks=[], order=None, ordered_sizes=[]), peaks)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Hundred thousands of small objects come and go, and none is circular."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
