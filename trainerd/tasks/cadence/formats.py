"""Records of TSV, CSV, JSON, JSON lines and Parquet files, plain or gzipped, one at a time. Must not know what a column means.

What cannot be read is counted by reason, never raised: the only errors are those of a whole file (wrong encoding, not Parquet).
Memory stays constant whatever the file's size and however long its lines are.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

from trainerd.contract.errors import UsageError

MAX_LINE_BYTES = 1 << 20
_COUNT_BYTES = 1 << 20
MAX_QUOTED_LINES = 64
"""A quote that is not closed within this many lines was a character, not a quote."""

Record: TypeAlias = "list[str] | dict[str, Any]"

_SUFFIXES = {".tsv": "tsv", ".tab": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}


class Input:
    """One file being read: its records, what was dropped, and how far it has got."""

    def __init__(self, path: Path, dropped: Counter[str]) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        self.done_bytes = 0
        self.dropped = dropped
        self.format = kind_of(path)

    def records(self, columns: Callable[[list[str]], list[str]] | None = None) -> Iterator[Record]:
        """Lists of cells (TSV, CSV) or dictionaries (JSON, Parquet). `columns` picks from a Parquet file's column names."""
        if self.format == "parquet":
            yield from self._parquet(columns)
            return
        with self.path.open("rb") as raw:
            try:
                for number, record in enumerate(self._parse(_uncompressed(raw, self.path))):
                    if number % 1024 == 0:
                        self.done_bytes = raw.tell()
                    yield record
            except (EOFError, gzip.BadGzipFile, zlib.error):
                self.dropped["rest of a damaged gzip file"] += 1
        self.done_bytes = self.size_bytes

    def _parse(self, stream: IO[bytes]) -> Iterator[Record]:
        if self.format == "json":
            return _json_records(stream, self.dropped)
        lines = _lines(stream, self.dropped)
        if self.format == "jsonl":
            return _json_lines(lines, self.dropped)
        if self.format == "tsv":
            return (line.split("\t") for line in lines)
        return _csv_records(lines)

    def _parquet(self, columns: Callable[[list[str]], list[str]] | None) -> Iterator[Record]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UsageError(
                f"{self.path} is a Parquet file, and pyarrow, which reads it, is not installed.",
                'Install it with: pip install "trainerd[parquet]", or save the data as CSV.',
            ) from None
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                names = list(file.schema_arrow.names)
                total, seen = max(file.metadata.num_rows, 1), 0
                for batch in file.iter_batches(batch_size=8192, columns=columns(names) if columns else None):
                    yield from cast("list[dict[str, Any]]", batch.to_pylist())
                    seen += batch.num_rows
                    self.done_bytes = self.size_bytes * seen // total
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{self.path} cannot be read as Parquet: {error}.", "Write it again, or save the data as CSV.") from None


def records_at_most(path: Path, enough: int, until: float) -> int | None:
    """No fewer than the records of a file: its lines, of JSON the braces that open something. None: the time `until` (monotonic) came
    before they were counted, or before they were `enough`; or nobody can tell."""
    try:
        kind = kind_of(path)
        if kind == "parquet":
            import pyarrow.parquet

            with pyarrow.parquet.ParquetFile(path) as file:
                return int(file.metadata.num_rows)
        mark, count = (b"{", 0) if kind == "json" else (b"\n", 1)
        with path.open("rb") as raw:
            stream = _uncompressed(raw, path)
            while count < enough and (block := stream.read(_COUNT_BYTES)):
                if time.monotonic() >= until:
                    return None
                count += block.count(mark)
        return count
    except (OSError, EOFError, zlib.error, UsageError, ImportError):
        return None  # reading it will say what is wrong


def kind_of(path: Path) -> str:
    """tsv, csv, json, jsonl or parquet: by the name's ending, else by how the content begins."""
    suffixes = [s.lower() for s in path.suffixes[-2:]]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if suffixes and suffixes[-1] in _SUFFIXES:
        return _SUFFIXES[suffixes[-1]]
    with path.open("rb") as raw:
        if raw.peek(4)[:4] == b"PAR1":
            return "parquet"
        try:
            start = _uncompressed(raw, path).read(4096).lstrip(b"\xef\xbb\xbf \r\n\t")
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return "csv"
    if start[:1] in (b"[", b"{"):
        return "json"
    return "tsv" if b"\t" in start.partition(b"\n")[0] else "csv"


def known(path: Path) -> bool:
    """Whether the name ends like a file this module reads (used to pick files out of a folder)."""
    name = path.name.lower().removesuffix(".gz")
    return any(name.endswith(suffix) for suffix in _SUFFIXES)


def _uncompressed(raw: io.BufferedReader, path: Path) -> io.BufferedReader:
    """The content's bytes; gzip is known by its first two bytes, whatever the name says."""
    stream = raw
    if raw.peek(2)[:2] == b"\x1f\x8b":
        stream = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), 1 << 18)
    if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UsageError(f"{path} is UTF-16.", "Save it again as UTF-8.")
    return stream


def _lines(stream: IO[bytes], dropped: Counter[str]) -> Iterator[str]:
    """Lines as text, split at LF only: a line separator (U+2028) inside a text is a blank, not an end."""
    start = b"\xef\xbb\xbf"
    while line := stream.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and line[-1:] != b"\n":
            while (more := stream.readline(MAX_LINE_BYTES)) and more[-1:] != b"\n":
                pass
            dropped["too long"] += 1
            continue
        try:
            text = line.removeprefix(start).decode("utf-8")
        except UnicodeDecodeError:
            dropped["not UTF-8"] += 1
            continue
        start = b""
        text = text.rstrip("\r\n")
        if not text or text.isspace():
            dropped["blank"] += 1
        elif "\0" in text:
            dropped["NUL byte"] += 1
        else:
            yield text


def _csv_records(lines: Iterator[str]) -> Iterator[Record]:
    """Comma-separated cells. Lines without a quote, nearly all, take the fast way."""
    pending: deque[str] = deque()
    while (line := pending.popleft() if pending else next(lines, None)) is not None:
        yield _quoted_record(line, lines, pending) if '"' in line else line.split(",")


def _quoted_record(first: str, lines: Iterator[str], pending: deque[str]) -> list[str]:
    """A record with quotes, which may go on over several lines; lines taken in vain are given back through `pending`."""
    text = first
    taken: list[str] = []
    while True:
        try:
            return next(csv.reader([text], strict=True))
        except csv.Error as error:
            if "unexpected end" not in str(error) or len(taken) >= MAX_QUOTED_LINES:
                break
        more = pending.popleft() if pending else next(lines, None)
        if more is None:
            break
        taken.append(more)
        text += "\n" + more
    pending.extendleft(reversed(taken))
    try:
        return next(csv.reader([first], quoting=csv.QUOTE_NONE))
    except csv.Error:  # a lone carriage return, or a field beyond csv's own limit
        return first.split(",")


def _json_lines(lines: Iterator[str], dropped: Counter[str]) -> Iterator[Record]:
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            dropped["not JSON"] += 1
            continue
        if isinstance(value, dict):
            yield value
        else:
            dropped["not an object"] += 1


def _json_records(stream: IO[bytes], dropped: Counter[str]) -> Iterator[Record]:
    """The objects of a JSON array (or of a row of objects), decoded one by one from a window on the file."""
    decoder = json.JSONDecoder()
    window, position, ended = "", 0, False
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    while True:
        while position < len(window) and window[position] in " \t\r\n,[]":
            position += 1
        if not ended and len(window) - position < MAX_LINE_BYTES:
            chunk = stream.read(MAX_LINE_BYTES)
            ended = not chunk
            window, position = window[position:] + decode(chunk, final=ended), 0
            continue
        if position >= len(window):
            return
        try:
            value, position = decoder.raw_decode(window, position)
        except (ValueError, RecursionError):
            dropped["not JSON"] += 1
            position = _next_object(window, position)
            continue
        if isinstance(value, dict):
            yield value
        else:
            dropped["not an object"] += 1


def _next_object(window: str, position: int) -> int:
    """Where the next object seems to begin after one that could not be read."""
    found = window.find("{", position + 1)
    return len(window) if found < 0 else found
