"""What the supervisor keeps on disk besides the status: events.jsonl, run.json, and a ballast for the day the disk is full.

Must not decide anything. Nothing here may end a training: what cannot be written is said on stderr.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainerd.contract import clock, files, runs
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord
from trainerd.machine.filesystem import free_bytes

BALLAST_BYTES = 1 << 20
EVENTS_BYTES = 1 << 20
"""Beyond this events.jsonl loses its middle: its first line and the newest ones stay."""
SAID_BYTES = 1 << 20
_BALLAST_SECONDS = 60.0
_LAST_SECONDS = 3.0
_ROOM_BYTES = 64 << 20  # below this the ballast would only take from what others need
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_DISK_FULL_ON_WINDOWS = (39, 112)


def is_full(error: OSError) -> bool:
    """Whether writing failed because the disk or the quota is full."""
    return error.errno in _FULL or getattr(error, "winerror", None) in _DISK_FULL_ON_WINDOWS


def keep_ballast(home: Home) -> bool:
    """Make sure 1 MB is there to be given up. Random bytes: a compressing file system would store zeros in nothing."""
    path = home.ballast
    try:
        if files.is_link(path.parent):
            return True  # control/ leads elsewhere: said by whoever reads requests, and nothing of ours goes there
        if path.exists() and path.stat().st_size == BALLAST_BYTES:
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, os.urandom(BALLAST_BYTES))
    except OSError:
        return False
    return True


def write_even_when_full(home: Home, write: Callable[[], None]) -> None:
    """Call `write`; when the disk is full, give up the ballast and call it once more. Raises OSError."""
    try:
        write()
    except OSError as error:
        if not is_full(error):
            raise
        if not files.is_link(home.control):
            files.remove(home.ballast)
        write()


_room_bytes = SAID_BYTES


def say(text: str) -> None:
    """One line on stderr, for the supervisor's log; a terminal that is gone hears nothing. After a megabyte it is silent:
    an error that comes back every second must not fill the disk in a month."""
    global _room_bytes
    if _room_bytes < 0:
        return
    _room_bytes -= len(text) + 1
    try:
        print(text if _room_bytes >= 0 else "(nothing more is written here)", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


class Journal:
    """One run's events and record."""

    def __init__(self, home: Home, record: RunRecord) -> None:
        self._home = home
        self.record = record
        self._unwritten_record = False
        self._ballast_due = 0.0

    def note(self, kind: str, **facts: Any) -> None:
        """Append to events.jsonl: what happened, and why."""
        line = json.dumps({"schema": files.SCHEMA, "at": clock.wall(), "kind": kind, **facts}, ensure_ascii=False, default=str)
        path = self._home.run(self.record.id).events
        try:
            write_even_when_full(self._home, lambda: files.append_line(path, line))
            if path.stat().st_size > EVENTS_BYTES:
                write_even_when_full(self._home, lambda: _trim(path))
        except OSError as error:
            say(f"cannot write to {path}: {error}; lost: {line}")

    def save_record(self, **changes: Any) -> None:
        """Change run.json, durably; when that fails it is tried again with the next change and by retry()."""
        for name, value in changes.items():
            setattr(self.record, name, value)
        try:
            write_even_when_full(self._home, lambda: runs.write(self._home, self.record))
            self._unwritten_record = False
        except OSError as error:
            self._unwritten_record = True
            say(f"cannot write run.json of {self.record.id}: {error}")

    def write_last(self) -> bool:
        """Before the supervisor ends: whether run.json says what was wanted and how it ended. Nobody comes after it to try again."""
        deadline = time.monotonic() + _LAST_SECONDS
        while self._unwritten_record and time.monotonic() < deadline:
            self.save_record()
            time.sleep(0.05 if self._unwritten_record else 0.0)
        return not self._unwritten_record

    def retry(self) -> None:
        """Write run.json if the last attempt failed, and once a minute put the ballast back if there is room again."""
        if self._unwritten_record:
            self.save_record()
        if time.monotonic() >= self._ballast_due:
            self._ballast_due = time.monotonic() + _BALLAST_SECONDS
            if not self._home.ballast.exists() and (free_bytes(self._home.root) or 0) > _ROOM_BYTES:
                keep_ballast(self._home)


def _trim(path: Path) -> None:
    """Leave out the middle of the events, and say so where it was: how the run began and what happened last are what is asked."""
    lines = path.read_bytes().splitlines(keepends=True)
    newest, room = len(lines), EVENTS_BYTES // 2
    while newest > 1 and room >= len(lines[newest - 1]):
        newest -= 1
        room -= len(lines[newest])
    note = {"schema": files.SCHEMA, "at": clock.wall(), "kind": "trimmed", "left_out": newest - 1}
    files.write_atomic(path, b"".join([lines[0], json.dumps(note).encode() + b"\n", *lines[newest:]]))
