"""Finds the sample that needs most memory, for a trace: by its length where the task tells that, else by the bytes of its batch.

A dataset may be slow, and endless for us: so many samples are looked at, spread over all of it, and for so long. Must not keep what it
reads, nor disturb what it draws: whoever calls puts random states back (trace.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from trainerd.engine.loader import Fetch
from trainerd.engine.task import MapDataset, Task

_LENGTHS, _BATCHES = 2048, 64  # samples whose length is asked for, or of which a batch is made
_SECONDS = 3.0


@dataclass(frozen=True)
class Largest:
    """Where it is, and in words what was done to find it."""

    index: int
    assumed: str


def largest(task: Task, dataset: MapDataset, beat: Callable[[], None] = lambda: None) -> Largest:
    """The sample that needs most, as far as a bounded look tells. Raises what the dataset and the task raise."""
    known = getattr(dataset, "lengths", None)
    if known is not None and len(known):
        return Largest(int(np.asarray(known).argmax()), "every sample as large as the longest one, by the dataset's lengths")
    if type(task).length is not Task.length:
        index, most, looked = _most(len(dataset), _LENGTHS, lambda place: task.length(dataset[place]), beat)
        if most > 0:
            return Largest(index, f"every sample as large as the longest {_of(looked, len(dataset))}, by the task's length()")
    index, _, looked = _most(len(dataset), _BATCHES, lambda place: _bytes(Fetch(task, dataset)[0, 0, [place]]), beat)
    return Largest(index, f"every sample as large as the largest {_of(looked, len(dataset))}; the task tells no length()")


def _most(samples: int, looks: int, of: Callable[[int], int], beat: Callable[[], None]) -> tuple[int, int, int]:
    """The place of the most, the most, and how many were looked at."""
    until = time.monotonic() + _SECONDS
    best = most = looked = 0
    for place in _spread(samples, looks):
        found = of(place)
        if looked == 0 or found > most:
            best, most = place, found
        looked += 1
        beat()
        if time.monotonic() > until:
            break
    return best, most, looked


def _spread(samples: int, looks: int) -> Iterator[int]:
    """Places from the first to the last; the ends, then what lies between ever finer, so that few looks are spread as well."""
    number = min(samples, looks)
    order = sorted(range(number), key=lambda rank: _reversed_bits(rank, number))
    last = [number - 1] if number > 1 else []
    for rank in dict.fromkeys([0, *last, *order]):
        yield rank * (samples - 1) // max(1, number - 1)


def _reversed_bits(rank: int, number: int) -> int:
    width = max(1, (number - 1).bit_length())
    return int(f"{rank:0{width}b}"[::-1], 2)


def _of(looked: int, samples: int) -> str:
    if looked >= samples:
        return f"of all {samples:,}"
    return f"of {looked:,} samples that were looked at of {samples:,}"


def _bytes(batch: Any) -> int:
    """Of all tensors, as loader.move() finds them."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, dict):
        return sum(map(_bytes, batch.values()))
    if isinstance(batch, (list, tuple)):
        return sum(map(_bytes, batch))
    return 0
