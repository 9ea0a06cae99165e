"""The trainer's log files: a new one per start, old ones thrown away, the end of one read. Must not write into them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO

from trainerd.contract import files
from trainerd.contract.paths import Home

KEEP_LOGS = 20
_TAIL_BYTES = 16 * 1024


def open_new(home: Home) -> tuple[Path, IO[bytes]]:
    """A new log, named after the local time, opened for appending; the oldest beyond KEEP_LOGS are removed. Raises OSError."""
    home.logs.mkdir(parents=True, exist_ok=True)
    stem = time.strftime("training_%Y%m%d_%H%M%S")
    for number in range(1, 1000):
        path = home.logs / (f"{stem}.log" if number == 1 else f"{stem}_{number}.log")
        try:
            path.touch(0o600, exist_ok=False)
            break
        except FileExistsError:
            continue
    else:
        raise FileExistsError(f"{home.logs} holds a thousand logs of this second")
    _rotate(home)
    return path, open(path, "ab")


def tail(path: Path | None) -> str:
    """The last lines of a log, "" when it cannot be read."""
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _rotate(home: Home) -> None:
    found = sorted(home.logs.glob("training_*.log"), key=lambda path: (_changed_at(path), path.name))
    for path in found[:-KEEP_LOGS]:
        try:
            files.remove(path)
        except OSError:
            continue  # somebody reads it (Windows) or made it read-only: the next rotation tries again


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
