"""Builds the tokenizer from counted words and writes the tokens of each split. Must not import torch.

A row on disk is its category's begin, its words, and its category's end; a row that was cut has no end, for it did not end there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from trainerd.tasks.cadence.collect import UNNUMBERED
from trainerd.tasks.cadence.rows import TRAIN, ChosenRows, Chunk, Ints
from trainerd.tasks.cadence.settings import CadenceSettings
from trainerd.tasks.cadence.vocabulary import NUM_SPECIAL, RARE, UNKNOWN, Vocabulary, piece_tokenizer, word_tokenizer

_BPE_ROWS = 1_000_000
_FEW_WORDS = 100
_MAX_PIECES = 16
"""Pieces of one word that are kept."""


class Encoder:
    """The tokens of each provisional word: those from start on, as many as its length."""

    def __init__(self, tokenizer: Tokenizer, tokens: Ints, lengths: Ints | None = None) -> None:
        self.tokenizer = tokenizer
        self._tokens = tokens
        self._lengths = lengths
        self._starts = None if lengths is None else np.cumsum(lengths) - lengths

    def encode(self, chunk: Chunk) -> tuple[Ints, Ints]:
        """The tokens of all rows, and how many each row has."""
        if self._lengths is None or self._starts is None:
            return self._tokens[chunk.words], chunk.lengths
        per_word = self._lengths[chunk.words]
        before = np.cumsum(per_word) - per_word
        places = np.repeat(self._starts[chunk.words] - before, per_word) + np.arange(int(per_word.sum()))
        per_row = np.bincount(chunk.row_of_word, weights=per_word, minlength=len(chunk.lengths)).astype(np.int64)
        return self._tokens[places], per_row


def encoder_for(rows: ChosenRows, counts: Ints, words: list[str], settings: CadenceSettings) -> Encoder:
    """The encoder the settings ask for, from the words counted in the training rows."""
    if settings.tokenizer == "bpe":
        tokenizer = piece_tokenizer(_texts(rows, words), settings.vocabulary)
        return _piece_encoder(tokenizer, words)
    ranked = np.lexsort((np.arange(len(counts)), -counts))
    ranked = ranked[(ranked != UNNUMBERED) & (counts[ranked] > 0)]
    frequent = settings.min_frequency
    while frequent > 1 and np.count_nonzero(counts[ranked] >= frequent) < min(_FEW_WORDS, len(ranked)):
        frequent -= 1  # so few rows that the usual bound would leave a model without words
    known = ranked[counts[ranked] >= frequent][: settings.vocabulary]
    numbers = np.full(len(counts), RARE, dtype=np.int64)
    numbers[counts <= 1] = UNKNOWN  # words seen once stand for those never seen: so `unknown` has a probability
    numbers[UNNUMBERED] = UNKNOWN
    numbers[known] = np.arange(len(known)) + NUM_SPECIAL
    return Encoder(word_tokenizer([words[number] for number in known.tolist()]), numbers)


def _texts(rows: ChosenRows, words: list[str]) -> Iterator[str]:
    """Training rows as text again, enough of them to learn pieces from."""
    given = 0
    for _, chunk in rows.chunks():
        train = chunk.where(chunk.split == TRAIN)
        ends = np.cumsum(train.lengths).tolist()
        numbers = train.words.tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            yield " ".join(words[number] for number in numbers[start:end])
        given += len(ends)
        if given >= _BPE_ROWS:
            return


def _piece_encoder(tokenizer: Tokenizer, words: list[str]) -> Encoder:
    tokens: list[npt.NDArray[np.int64]] = []
    lengths = np.empty(len(words), dtype=np.int64)
    for start in range(0, len(words), 10_000):
        encoded = tokenizer.encode_batch(words[start : start + 10_000], add_special_tokens=False)
        pieces = [one.ids[:_MAX_PIECES] or [UNKNOWN] for one in encoded]
        lengths[start : start + len(pieces)] = [len(some) for some in pieces]
        tokens.append(np.array([token for some in pieces for token in some], dtype=np.int64))
    return Encoder(tokenizer, np.concatenate(tokens), lengths)


class SplitWriter:
    """Appends rows to a split's files: <name>.tokens.raw, and at the end <name>.offsets.npy and <name>.categories.npy."""

    def __init__(self, folder: Path, name: str, encoder: Encoder, vocabulary: Vocabulary) -> None:
        self.name = name
        self.dtype = np.dtype(np.uint16 if vocabulary.num_tokens <= 2**16 else np.uint32)
        self.word_categories = np.zeros((vocabulary.num_words, len(vocabulary.categories)), dtype=np.uint32)
        self._folder = folder
        self._encoder = encoder
        self._begin = np.array([vocabulary.begin(number) for number in range(len(vocabulary.categories))])
        self._end = np.array([vocabulary.end(number) for number in range(len(vocabulary.categories))])
        self._lengths: list[npt.NDArray[np.uint16]] = []
        self._categories: list[npt.NDArray[np.uint16]] = []
        self._file = (folder / f"{name}.tokens.raw").open("wb")

    def add(self, chunk: Chunk) -> None:
        """Writes rows; counts in which categories each word occurs."""
        if not len(chunk.lengths):
            return
        tokens, per_row = self._encoder.encode(chunk)
        ended = ~chunk.cut
        lengths = per_row + 1 + ended
        ends = np.cumsum(lengths)
        row = np.empty(int(ends[-1]), dtype=self.dtype)
        inner = np.ones(len(row), dtype=bool)
        starts, last = ends - lengths, (ends - 1)[ended]
        inner[starts] = inner[last] = False
        row[inner] = tokens
        row[starts] = self._begin[chunk.category]
        row[last] = self._end[chunk.category[ended]]
        row.tofile(self._file)
        np.add.at(self.word_categories, (tokens, np.repeat(chunk.category, per_row)), 1)
        self._lengths.append(lengths.astype(np.uint16))
        self._categories.append(chunk.category.astype(np.uint16))

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def finish(self) -> int:
        """Writes where rows begin; returns how many there are."""
        self._file.flush()
        lengths = np.concatenate([np.zeros(1, dtype=np.uint16), *self._lengths])
        np.save(self._folder / f"{self.name}.offsets.npy", np.cumsum(lengths, dtype=np.int64))
        np.save(self._folder / f"{self.name}.categories.npy", np.concatenate([np.zeros(0, dtype=np.uint16), *self._categories]))
        return len(lengths) - 1
