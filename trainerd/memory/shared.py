"""A table's timeline for another number of samples, from what was played once: the same births and ends, with sizes on lines.

A model on a tape is played with a number of samples that remembers what was decided by it (affine.py). For every number for which all
of that would be decided in the same way, the timeline follows by a multiplication per size. Must not know any model.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from trainerd.memory.affine import Affine, NotAffine, Samples
from trainerd.memory.tape import Tape
from trainerd.memory.timeline import Built, Played, Setup, Timeline, of_model, play, told

_PLAYS = 8  # of one training
_FEW, _NARROW = 4, 2  # a play that holds for fewer numbers of samples is no gain; after so many of a table it is not tried again
_EVENTS = 1_000_000  # some 100 MB at most


@dataclass
class _Shared:
    """What was played, for some numbers of samples, and all lines that sizes are on."""

    played: Played
    samples: Samples
    lines: list[tuple[int, int]]

    def timeline(self, setup: Setup) -> Timeline:
        number = setup.micro_batch
        lines = [base + slope * number for base, slope in self.lines]
        return told(self.played, setup, lambda one: one.at(number) if isinstance(one, Affine) else one, lines)


_Key = tuple[str, Setup]
_known: OrderedDict[_Key, list[_Shared]] = OrderedDict()
_alone: set[_Key] = set()
_narrow: Counter[str] = Counter()
_lock = threading.Lock()


def timeline(build: Callable[[Tape], Built], setup: Setup, about: str) -> Timeline:
    """As of_model(). What `build` makes must depend on `about` and on `setup` alone, and on the micro-batch as it is given to its
    methods: `setup.micro_batch` and `setup.effective_batch` it must not read."""
    key = about, replace(setup, micro_batch=1, effective_batch=min(setup.accumulation, 2), allocator="", heap="")
    with _lock:
        known = _known.get(key, [])
        found = next((one for one in known if one.samples.holds(setup.micro_batch)), None)
        if found is not None:
            _known.move_to_end(key)
        plays = found is None and len(known) < _PLAYS and key not in _alone and _narrow[about] < _NARROW
    if plays:
        found = _play(build, setup)
        with _lock:
            if found is None:
                _alone.add(key)
            else:
                _keep(key, found)
                _narrow[about] += found.samples.most - found.samples.least < _FEW and setup.micro_batch > 1
    return of_model(build, setup) if found is None else found.timeline(setup)


def forget() -> None:
    """Begin anew."""
    with _lock:
        _known.clear()
        _alone.clear()
        _narrow.clear()


def _play(build: Callable[[Tape], Built], setup: Setup) -> _Shared | None:
    """None where a size is on no line."""
    samples = Samples(setup.micro_batch)
    try:
        played = play(build, setup, Affine(samples, 0, 1))
    except (NotAffine, TypeError):  # affine.py: whatever cannot compute with it fails
        return None
    places: dict[tuple[Any, Any], int] = {}
    lines = [(size.base, size.slope) if isinstance(size, Affine) else (size, 0) for size in played.tape.sizes]
    played.which = which = [places.setdefault(line, len(places)) for line in lines]
    played.codes = [which[event] if event >= 0 else ~which[~event] for event in played.events]
    return _Shared(played, samples, list(places))


def _keep(key: _Key, one: _Shared) -> None:
    _known.setdefault(key, []).append(one)
    _known.move_to_end(key)
    while len(_known) > 1 and sum(len(some.played.events) for plays in _known.values() for some in plays) > _EVENTS:
        _known.popitem(last=False)
