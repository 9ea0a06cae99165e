"""The prepared rows as a map-style dataset over memory maps, and micro-batches of them. Must not know the model.

Nothing is made per sample on the way to a micro-batch: indices go in, arrays come out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from trainerd.tasks.cadence.model import Batch

Ints = npt.NDArray[np.int64]


class TokenRows:
    """The rows of one split. `rows[i]` is the i-th row's tokens, from its begin to its end."""

    def __init__(self, folder: Path, split: str, first_begin: int) -> None:
        self.folder = folder
        self.split = split
        self.first_begin = first_begin
        """The begin token of category 0."""
        about = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
        self._dtype = np.dtype(about["dtype"])
        self._open()

    def _open(self) -> None:
        path = self.folder / f"{self.split}.tokens.raw"
        empty: npt.NDArray[Any] = np.zeros(0, self._dtype)
        self.tokens = np.asarray(np.memmap(path, self._dtype, mode="r")) if path.stat().st_size else empty
        self.offsets: Ints = np.load(self.folder / f"{self.split}.offsets.npy", mmap_mode="r")
        self.categories: npt.NDArray[np.uint16] = np.load(self.folder / f"{self.split}.categories.npy", mmap_mode="r")
        """The category of each row in the data, also when the model is not told."""

    @property
    def lengths(self) -> Ints:
        """Inputs per row: for buckets."""
        return np.diff(self.offsets) - 1

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __getitems__(self, indices: Sequence[int]) -> Picked:
        return Picked(self, np.asarray(indices, dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: a worker opens them itself instead of receiving a copy of the data."""
        return {key: value for key, value in self.__dict__.items() if key not in ("tokens", "offsets", "categories")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class Picked(Sequence[npt.NDArray[Any]]):
    """Some rows, not read yet: a sequence of samples that batch() turns into arrays in one go."""

    def __init__(self, rows: TokenRows, indices: Ints) -> None:
        self.rows = rows
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Picked: ...
    def __getitem__(self, index: int | slice) -> npt.NDArray[Any] | Picked:
        return Picked(self.rows, self.indices[index]) if isinstance(index, slice) else self.rows[int(self.indices[index])]

    def batch(self) -> Batch:
        """The micro-batch: padded inputs, and for each real place the next token."""
        starts = self.rows.offsets[self.indices]
        return _batch(self.rows.tokens, starts, self.rows.offsets[self.indices + 1] - starts, self.rows.first_begin)


def collate(samples: Sequence[Any], first_begin: int) -> Batch:
    """A micro-batch from what the dataset gave: in one go when it comes from __getitems__, else from single rows."""
    if isinstance(samples, Picked):
        return samples.batch()
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    return _batch(np.concatenate(list(samples)), np.cumsum(lengths) - lengths, lengths, first_begin)


def _batch(tokens: npt.NDArray[Any], starts: Ints, lengths: Ints, first_begin: int) -> Batch:
    inputs_per_row = lengths - 1
    width = int(inputs_per_row.max())
    steps = np.arange(width)
    real = steps < inputs_per_row[:, None]
    where = starts[:, None] + np.where(real, steps, 0)  # padding repeats the row's first token; nothing reads what comes of it
    inputs = tokens[where].astype(np.int64)
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(inputs[:, 0] - first_begin),
        torch.from_numpy(np.flatnonzero(real)),
        torch.from_numpy(tokens[where[real] + 1].astype(np.int64)),
    )
