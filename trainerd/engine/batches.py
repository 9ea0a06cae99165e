"""The order of samples: a pure function of (seed, epoch), cut into batches of like length. Must not read a sample.

An epoch is every sample exactly once, the last short batch included. Samples are shuffled, sorted by length inside
stretches of many batches, cut, and the batches shuffled: random enough to learn from, with little padding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
# Batches per stretch inside which samples are sorted: longer pads less, shorter mixes more.
_STRETCH = 64
_ORDER, _BATCH_ORDER, _SUBSET = 1, 2, 3  # separate streams of one seed


class Batches:
    """The batches of every epoch. `lengths` None: no buckets. `limit`: use that many samples of a seeded shuffle."""

    def __init__(self, num_samples: int, batch_size: int, seed: int, *, lengths: Ids | None = None, limit: int | None = None) -> None:
        self.batch_size = batch_size
        self._seed = seed
        self._lengths = lengths
        self._ids: Ids | None = None
        if limit is not None and limit < num_samples:
            self._ids = np.sort(_permutation(num_samples, seed, _SUBSET)[:limit])
            num_samples = limit
        self.num_samples = num_samples
        self.steps_per_epoch = -(-num_samples // batch_size)
        self._epoch: tuple[int, Ids, Ids] | None = None

    def ids(self, step: int) -> list[int]:
        """The samples of a step, the first being 0; sorted by length, so that its micro-batches pad little too."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._order(epoch))
        _, order, starts = self._epoch
        start = int(starts[batch])
        chosen: list[int] = order[start : start + self.batch_size].tolist()
        return chosen

    def _order(self, epoch: int) -> tuple[Ids, Ids]:
        """The samples of an epoch in order, and where each of its batches begins."""
        order = _permutation(self.num_samples, self._seed, _ORDER, epoch)
        if self._ids is not None:
            order = self._ids[order]
        if self._lengths is not None:
            stretch = self.batch_size * _STRETCH
            for start in range(0, len(order), stretch):
                part = order[start : start + stretch]
                order[start : start + stretch] = part[np.argsort(self._lengths[part], kind="stable")]
        starts = np.arange(0, self.num_samples, self.batch_size)
        if self._lengths is not None:
            starts = starts[_permutation(len(starts), self._seed, _BATCH_ORDER, epoch)]
        return order, starts


def split(ids: list[int], micro_batch: int) -> list[list[int]]:
    """The micro-batches of one batch."""
    return [ids[i : i + micro_batch] for i in range(0, len(ids), micro_batch)]


def _permutation(length: int, *words: int) -> Ids:
    """A permutation named by the words. Raw Philox output and a stable sort are specified: the same with every numpy."""
    raw = np.random.Philox(np.random.SeedSequence(list(words))).random_raw(length)
    return np.argsort(raw, kind="stable").astype(np.int64)
