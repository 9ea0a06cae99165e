"""The trainer's log files: a new one per start, the old ones thrown away, a long one cut, the end of one read.

Must not write a line into them, and must not make the trainer wait: it writes through its own handle, always at the end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO

from trainerd.contract import files
from trainerd.contract.paths import Home
from trainerd.machine import append
from trainerd.supervisor import journal

KEEP_LOGS = 20
LOG_BYTES = 4 << 20
"""A log longer than this is cut: with the part before, at most twice as much for each start of a trainer."""
_COPY_BYTES = 256 * 1024
_TAIL_BYTES = 16 * 1024


def open_new(home: Home) -> tuple[Path, IO[bytes]]:
    """A new log, named after the local time, opened for appending; the oldest beyond KEEP_LOGS are removed. Raises OSError."""
    home.logs.mkdir(parents=True, exist_ok=True)
    stem = time.strftime("training_%Y%m%d_%H%M%S")
    for number in range(1, 1000):
        path = home.logs / (f"{stem}.log" if number == 1 else f"{stem}_{number}.log")
        try:
            log = append.create(path)  # a name that is taken is never written to, nor followed elsewhere
            break
        except FileExistsError:
            continue
    else:
        raise FileExistsError(f"{home.logs} holds a thousand logs of this second")
    _rotate(home, path)
    return path, log


def part_before(path: Path) -> Path:
    """Where the part of a log that was cut off last lies."""
    return path.with_name(f"{path.name}.1")


def cut(path: Path) -> None:
    """When a log has become too long, move its newest LOG_BYTES into part_before() and let it go on empty.

    What the trainer prints between the last look and the cut, within microseconds, is lost. Raises OSError.
    """
    size = os.stat(path, follow_symlinks=False).st_size
    if size <= LOG_BYTES:
        return
    with open(path, "r+b") as log:
        log.seek(max(0, size - LOG_BYTES))
        try:
            _copy_rest(log, part_before(path))
        except OSError as error:
            journal.say(f"cannot keep the earlier part of {path}: {error}")  # a full disk: the log must not be what fills it
        log.truncate(0)


def _copy_rest(log: IO[bytes], target: Path) -> None:
    files.remove(target)
    with append.create(target) as part:
        while content := log.read(_COPY_BYTES):
            part.write(content)


def tail(path: Path | None) -> str:
    """The last lines of a log, "" when it cannot be read."""
    if path is None:
        return ""
    content = _end(path)
    if len(content) < _TAIL_BYTES:
        content = _end(part_before(path)) + content  # it was cut just now
    return content[-_TAIL_BYTES:].decode("utf-8", "replace")


def _end(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def _rotate(home: Home, new: Path) -> None:
    """The new one stays, however old the clock makes it: one that was set back gives it an older time than all the others."""
    others = [path for path in home.logs.glob("training_*.log") if path != new]
    others.sort(key=lambda path: (_changed_at(path), path.name))
    for path in others[: max(0, len(others) - (KEEP_LOGS - 1))]:
        try:
            files.remove(part_before(path))
            files.remove(path)
        except OSError:
            continue  # somebody reads it (Windows) or made it read-only: the next rotation tries again


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
