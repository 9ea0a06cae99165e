"""Collected rows in slices: the chosen ones, with their words' provisional numbers. Must not import torch or know the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainerd.tasks.cadence.collect import Collected

OUT, TRAIN, EVAL = 0, 1, 2
"""Where a row goes."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Chunk:
    """Some rows: their words, one after the other, and for each row its length, category, split and whether it was cut."""

    words: Ints
    lengths: Ints
    category: Ints
    split: npt.NDArray[np.uint8]
    cut: Bools

    @property
    def row_of_word(self) -> Ints:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def where(self, rows: Bools) -> Chunk:
        """Only these rows."""
        if rows.all():
            return self
        words = self.words[np.repeat(rows, self.lengths)]
        return Chunk(words, self.lengths[rows], self.category[rows], self.split[rows], self.cut[rows])

    def keeping(self, words: Bools) -> Chunk:
        """Only these words, and only rows that still have one."""
        lengths = np.bincount(self.row_of_word[words], minlength=len(self.lengths))
        rows = lengths > 0
        return Chunk(self.words[words], lengths[rows], self.category[rows], self.split[rows], np.zeros(int(rows.sum()), dtype=bool))


class ChosenRows:
    """The collected rows that belong to a split."""

    def __init__(self, found: Collected, folder: Path, split: npt.NDArray[np.uint8], category: npt.NDArray[np.int32]) -> None:
        self.total = found.rows
        self._found = found
        self._folder = folder
        self._split = split
        self._category = category

    def chunks(self) -> Iterator[tuple[int, Chunk]]:
        """Slices in the source's order, each with the number of rows gone by at its end."""
        first_word = 0
        for start in range(0, self.total, _CHUNK_ROWS):
            full = self._found.array(self._folder, "lengths", start, _CHUNK_ROWS).astype(np.int64)
            lengths = np.minimum(full, self._found.max_words)
            num_words = int(lengths.sum())
            words = self._found.array(self._folder, "words", first_word, num_words)
            first_word += num_words
            end = start + len(lengths)
            chunk = Chunk(words, lengths, self._category[start:end].astype(np.int64), self._split[start:end], full > lengths)
            yield end, chunk.where(chunk.split != OUT)

    def word_counts(self, split: int) -> Ints:
        """How often each provisional word occurs in the rows of a split."""
        counts = np.zeros(self._found.distinct_words + 1, dtype=np.int64)
        for _, chunk in self.chunks():
            counts += np.bincount(chunk.where(chunk.split == split).words, minlength=len(counts))
        return counts
