"""Cleaning of product titles: words that say nothing about their category are taken out. Must not import torch or touch files.

A word spread evenly over the categories (high entropy), or seldomer in the title's own than elsewhere (low pointwise mutual
information), goes. Rare words, mostly article numbers, name one product and stay, but give way first where a title is too long.
With one category there is nothing to tell apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainerd.tasks.cadence.collect import UNNUMBERED
from trainerd.tasks.cadence.rows import TRAIN, Bools, ChosenRows, Chunk, Ints
from trainerd.tasks.cadence.settings import CleanSettings

Floats = npt.NDArray[np.float32]

_MAX_CELLS = 20_000_000
"""Bound on words times categories, so that the table fits in memory."""


class TitleCleaner:
    """Learns from the training rows which words stay in which category, then takes the others out of any row."""

    def __init__(self, rows: ChosenRows, counts: Ints, settings: CleanSettings, min_frequency: int, num_categories: int) -> None:
        self._max_words = settings.max_words
        ranked = np.argsort(-counts, kind="stable")
        ranked = ranked[(counts[ranked] >= min_frequency) & (ranked != UNNUMBERED)][: _MAX_CELLS // num_categories]
        self._place = np.full(len(counts), len(ranked), dtype=np.int64)
        self._place[ranked] = np.arange(len(ranked))
        table = np.zeros((len(ranked) + 1, num_categories), dtype=np.int64)  # the last row: all rare words
        for _, chunk in rows.chunks():
            train = chunk.where(chunk.split == TRAIN)
            np.add.at(table, (self._place[train.words], np.repeat(train.category, train.lengths)), 1)
        self._scores = word_scores(table, settings)
        self._scores[-1] = settings.min_pmi

    def clean(self, chunk: Chunk) -> Chunk:
        """The rows with only their best words; rows with none left are gone."""
        row = chunk.row_of_word
        scores = self._scores[self._place[chunk.words], chunk.category[row]]
        return chunk.keeping(best_words(row, scores, self._max_words))


def word_scores(counts: Ints, settings: CleanSettings) -> Floats:
    """The pointwise mutual information of each word (row) with each category (column); -inf where the word is taken out."""
    per_category = np.maximum(counts.sum(0, keepdims=True), 1).astype(np.float64)
    totals = np.maximum(counts.sum(1, keepdims=True), 1).astype(np.float64)
    # Categories differ in size: a word used alike in all must have the highest entropy, so its rates are compared, not its counts.
    rates = counts / per_category
    rates /= np.maximum(rates.sum(1, keepdims=True), 1e-300)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(rates > 0, rates * np.log(rates), 0.0).sum(1, keepdims=True)
        pmi = np.log(counts / totals) - np.log(per_category / per_category.sum())
    kept = counts > 0
    if counts.shape[1] > 1:
        kept &= (entropy <= settings.max_entropy * np.log(counts.shape[1])) & (pmi >= settings.min_pmi)
    return np.where(kept, pmi, -np.inf).astype(np.float32)


def best_words(row: Ints, score: Floats, at_most: int) -> Bools:
    """Which words stay: those with a finite score, per row the `at_most` highest. `row` is the row of each word, ascending."""
    order = np.lexsort((-score, row))  # by row, within it the best first; stable, so of equals the earlier
    rank = np.empty(len(row), dtype=np.int64)
    rank[order] = np.arange(len(row)) - np.searchsorted(row, row)
    return np.asarray(np.isfinite(score) & (rank < at_most))
