"""Plays a table's timeline and its replay, and remembers what was played: the same question is answered at once. Must not judge it."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

from trainerd.memory import allocator_settings
from trainerd.memory.allocator import Peaks
from trainerd.memory.timeline import STEP, Setup, Table, Timeline

_REMEMBERED = 512  # some kilobytes each: without its events a timeline is a few numbers


@dataclass(frozen=True)
class Played:
    """A timeline without its events, and on a GPU the allocator's peaks."""

    timeline: Timeline
    peaks: Peaks


_Key = tuple[str | int, Setup, int]
_known: OrderedDict[_Key, tuple[Table, Played]] = OrderedDict()
_lock = threading.Lock()


def played(table: Table, setup: Setup, workspace_bytes: int) -> Played:
    """What this setup allocates, and on a GPU what the allocator makes of it with cuBLAS's workspace of that size."""
    # A table that does not say what it depends on is known by itself; it is kept, so that its number is nobody else's.
    key = (getattr(table, "key", id(table)), setup, workspace_bytes if setup.device == "cuda" else 0)
    with _lock:
        kept = _known.get(key)
        if kept is not None:
            _known.move_to_end(key)
            return kept[1]
    made = _play(table, setup, workspace_bytes)
    with _lock:
        _known[key] = (table, made)
        while len(_known) > _REMEMBERED:
            _known.popitem(last=False)
    return made


def forget() -> None:
    """Begin anew: for measuring how long it takes."""
    with _lock:
        _known.clear()


def _play(table: Table, setup: Setup, workspace_bytes: int) -> Played:
    collecting = gc.isenabled()
    gc.disable()  # hundred thousands of small objects come and go, and none is circular
    try:
        timeline = table.timeline(setup)
        peaks = Peaks(0, 0)
        if setup.device == "cuda":
            sizes, events, again = [*timeline.sizes, workspace_bytes], _with_workspace(timeline, len(timeline.sizes)), timeline.again
            # A second step comes after the workspace.
            peaks = allocator_settings.peaks(sizes, events, setup.allocator, again and (again[0] + 1, again[1] + 1))
    finally:
        if collecting:
            gc.enable()
    return Played(replace(timeline, sizes=[], kinds=[], events=[], marks=[]), peaks)


def _with_workspace(timeline: Timeline, number: int) -> list[int]:
    """cuBLAS takes its workspace with the first product, from the same allocator, and keeps it."""
    at = next((at for at, phase in timeline.marks if phase == STEP), len(timeline.events))
    return [*timeline.events[:at], number, *timeline.events[at:]]
