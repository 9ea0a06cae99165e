"""The one pass over the source: words become provisional numbers, written to disk as they come. Must not import torch.

Nothing here grows with the number of rows, and with the number of distinct words only up to a bound. Which rows are used, what
the vocabulary is and how rows are cleaned is decided afterwards, on arrays.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainerd.contract.files import write_json
from trainerd.tasks.cadence.data import Source

MAX_DISTINCT_WORDS = 2_000_000
"""A word first met after this many others has no number of its own: it would be rare, and the table must fit in memory."""
MAX_DISTINCT_CATEGORIES = 50_000
UNNUMBERED = 0
_FLUSH_ROWS = 16_384

Progress = Callable[[int, "int | None", str], None]


class Numbering(dict[str, int]):
    """Words in the order they were first met, from 1 on; 0 for those beyond the bound."""

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_DISTINCT_WORDS:
            return UNNUMBERED
        number = self[word] = len(self) + 1
        return number


@dataclass
class Collected:
    """What the pass found. The arrays lie beside it, one entry per usable row (or word), in the source's order."""

    rows: int
    distinct_words: int
    categories: list[str]
    grouped: bool
    """Whether the rows have groups."""
    max_words: int
    dropped: dict[str, int]

    def array(self, folder: Path, name: str, start: int = 0, count: int = -1) -> npt.NDArray[Any]:
        """A part of one of the arrays, read (not mapped, so that it does not stay in memory)."""
        dtype = np.dtype(_ARRAYS[name])
        return np.fromfile(folder / f"{name}.raw", dtype, count, offset=start * dtype.itemsize)


_ARRAYS = {"words": "i", "lengths": "H", "category": "H", "text": "I", "group": "I"}
"""Type codes that Python's array and numpy share."""


def collect(source: Source, folder: Path, max_words: int, progress: Progress) -> Collected:
    """Reads the source once, unless a pass that ended before an interruption left its result here."""
    done = folder / "collected.json"
    if done.exists():
        return Collected(**json.loads(done.read_text(encoding="utf-8")))
    for name in _ARRAYS:
        (folder / f"{name}.raw").unlink(missing_ok=True)
    numbering = Numbering()
    categories: dict[str, int] = {}
    found = Collected(0, 0, [], False, max_words, {})
    overflow: Counter[str] = Counter()
    columns = {name: array(code) for name, code in _ARRAYS.items()}
    words, lengths, category_of = columns["words"], columns["lengths"], columns["category"]
    for category, row_words, group in source:
        number = categories.get(category)
        if number is None:
            if len(categories) >= MAX_DISTINCT_CATEGORIES:
                overflow[f"more than {MAX_DISTINCT_CATEGORIES} categories"] += 1
                continue
            number = categories[category] = len(categories)
        words.extend([numbering[word] for word in row_words[:max_words]])
        lengths.append(min(len(row_words), 65535))
        category_of.append(number)
        text = zlib.crc32(" ".join(row_words).encode())
        columns["text"].append(text)
        columns["group"].append(text if group is None else zlib.crc32(group.encode("utf-8", "surrogateescape")))
        found.grouped |= group is not None
        if len(lengths) >= _FLUSH_ROWS:
            _flush(columns, folder, found)
            progress(*source.progress())
    _flush(columns, folder, found)
    progress(*source.progress())
    found.categories, found.distinct_words = list(categories), len(numbering)
    found.dropped = dict(source.dropped + overflow)
    with (folder / "words.txt").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{word}\n" for word in numbering)
    write_json(done, asdict(found))
    return found


def read_words(folder: Path) -> list[str]:
    """The words by provisional number; the first stands for those without one."""
    with (folder / "words.txt").open(encoding="utf-8", newline="\n") as file:
        return ["", *(line.rstrip("\n") for line in file)]


def discard(folder: Path) -> None:
    """Removes what only the preparation needed."""
    (folder / "collected.json").unlink(missing_ok=True)
    for path in [folder / "words.txt", *(folder / f"{name}.raw" for name in _ARRAYS)]:
        path.unlink(missing_ok=True)


def _flush(columns: dict[str, array[int]], folder: Path, found: Collected) -> None:
    found.rows += len(columns["lengths"])
    for name, column in columns.items():
        with (folder / f"{name}.raw").open("ab") as file:
            column.tofile(file)
        del column[:]
