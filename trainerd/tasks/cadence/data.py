"""Rows of (category, words, group) from a file, a folder or the built-in generator, streamed. Must not import torch or numpy.

Usable rows are used, the others counted by reason: every row met is in `usable` or in one of `dropped`. Problems of a whole file
(missing, empty, no usable row, no such column) are UsageErrors that say what to do; `check` finds them before anything starts.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from trainerd.config.model import DataConfig
from trainerd.contract.errors import UsageError
from trainerd.tasks.cadence import formats, generator
from trainerd.tasks.cadence.columns import EVERYTHING, ColumnFinder, Columns, Row
from trainerd.tasks.cadence.settings import CadenceSettings
from trainerd.tasks.cadence.text import words

_WHOLE_HASH_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20


class Source(Protocol):
    """Rows that can be walked once, with what was met on the way."""

    usable: int
    dropped: Counter[str]

    def __iter__(self) -> Iterator[Row]: ...

    def progress(self) -> tuple[int, int, str]:
        """How far it has got, of how much, in which unit."""


def check(data: DataConfig, settings: CadenceSettings) -> dict[str, Any]:
    """The data's fingerprint, after reading up to the first usable row. Raises UsageError when there is none."""
    if data.path is None:
        return {"kind": "generated", "name": f"built-in queries, version {generator.VERSION}", "size_bytes": None, "sha256": None}
    source = FileSource(data, settings)
    if next(iter(source), None) is None:
        raise source.nothing_usable()
    kind, digest = _fingerprint(source.paths)
    return {"kind": kind, "name": Path(data.path).name, "size_bytes": source.size_bytes, "sha256": digest}


def rows_at_most(data: DataConfig, enough: int, seconds: float) -> tuple[int | None, bool]:
    """No fewer than the rows of the configured data, counted until they are `enough` or the time is over (None); and whether it is just
    their number."""
    if data.path is None:
        return min(data.size or generator.DEFAULT_ROWS, generator.TOTAL_ROWS), True
    count, until = 0, time.monotonic() + seconds
    try:
        paths = _paths(Path(data.path).expanduser())
    except UsageError:
        return None, False
    for path in paths:
        found = formats.records_at_most(path, enough - count, until)
        if found is None:
            return None, False
        count += found
        if count >= enough:
            break
    return count, False


def open_source(data: DataConfig, settings: CadenceSettings, seed: int) -> Source:
    """The rows of the configured data; of generated data, only the first `data.size` of the seeded shuffle."""
    return GeneratedSource(data.size, seed, settings) if data.path is None else FileSource(data, settings)


class GeneratedSource:
    """The built-in queries. The data themselves never change; the seed says in which order they come."""

    def __init__(self, size: int | None, seed: int, settings: CadenceSettings) -> None:
        self.usable = 0
        self.dropped: Counter[str] = Counter()
        self._total = min(size or generator.DEFAULT_ROWS, generator.TOTAL_ROWS)
        self._seed = seed
        self._conditioned = settings.conditioned

    def __iter__(self) -> Iterator[Row]:
        for number in generator.order(self._total, self._seed):
            category, text = generator.row(number)
            self.usable += 1
            yield Row(category if self._conditioned else EVERYTHING, words(text), None)

    def progress(self) -> tuple[int, int, str]:
        return self.usable, self._total, "rows"


class FileSource:
    """The rows of a file, or of the files of a folder in the order of their names."""

    def __init__(self, data: DataConfig, settings: CadenceSettings) -> None:
        self.paths = _paths(Path(str(data.path)).expanduser())
        self.size_bytes = sum(path.stat().st_size for path in self.paths)
        self.usable = 0
        self.dropped: Counter[str] = Counter()
        self._finder = ColumnFinder(data.columns, conditioned=settings.conditioned)
        self._done_bytes = 0
        self._input: formats.Input | None = None

    def __iter__(self) -> Iterator[Row]:
        for path in self.paths:
            self._input = formats.Input(path, self.dropped)
            yield from self._rows(self._input)
            self._done_bytes += self._input.size_bytes
            self._input = None

    def progress(self) -> tuple[int, int, str]:
        return self._done_bytes + (self._input.done_bytes if self._input else 0), self.size_bytes, "bytes"

    def nothing_usable(self) -> UsageError:
        """The error for data in which no row can be used, saying why each was not."""
        why = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.most_common()) or "there is nothing after its header"
        where = self.paths[0] if len(self.paths) == 1 else self.paths[0].parent
        return UsageError(f"{where} has no usable row ({why}).", "A usable row has a text and a category.")

    def _rows(self, file: formats.Input) -> Iterator[Row]:
        columns: Columns | None = None
        first: list[str] | None = None
        for record in file.records(lambda names: self._finder.find(names, file.path, by_name=True).keys()):
            if columns is None:
                names = list(record)
                first = first or names
                if isinstance(record, dict):
                    columns = self._finder.search(names, by_name=True)  # an object without the columns is only dirt: try the next
                else:
                    columns = self._finder.find(names, file.path, by_name=False)
                    if columns.header:
                        continue
            found = columns.pick(record) if columns is not None else "no text"
            if isinstance(found, Row):
                self.usable += 1
                yield found
            else:
                self.dropped[found] += 1
        if columns is None and first is not None:
            self._finder.find(first, file.path, by_name=True)  # raises: not one object had them


def _paths(path: Path) -> list[Path]:
    """The files to read. Raises UsageError when there is none, or when they are empty."""
    try:
        if path.is_dir():
            found = sorted(child for child in path.iterdir() if child.is_file() and formats.known(child))
            if not found:
                raise UsageError(f"The folder {path} holds no TSV, CSV, JSON, JSONL or Parquet file.", "Give a file, or another folder.")
        elif path.exists() and not path.is_file():
            raise UsageError(f"{path} is a pipe or a device, and is read more than once.", "Give a file, or a folder of files.")
        else:
            found = [path]
        if not any(child.stat().st_size for child in found):
            raise UsageError(f"{path} is empty.", "Give a file with rows of category and text.")
        for child in found:
            with child.open("rb"):
                pass
    except FileNotFoundError:
        raise UsageError(f"There is no data file {path}.", "Check --data, or leave it out to learn from the built-in queries.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.", "Check its permissions.") from None
    return [child for child in found if child.stat().st_size]


def _fingerprint(paths: list[Path]) -> tuple[str, str]:
    """SHA-256 of the whole content, or of blocks spread over it when that is large: `start` must not wait for a 10 GB file.

    A sampled fingerprint can miss an edit that keeps the size, but not harm a run: what was prepared once is what is used.
    """
    digest = hashlib.sha256()
    whole = sum(path.stat().st_size for path in paths) <= _WHOLE_HASH_BYTES
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as file:
            if whole:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                continue
            for number in range(64):
                file.seek(number * max(size - _BLOCK_BYTES, 0) // 63)
                digest.update(file.read(_BLOCK_BYTES))
    return ("file" if whole else "file, sampled"), digest.hexdigest()
