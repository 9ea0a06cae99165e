"""Every operation on files that must survive a crash, in one small module. Must not know what the files mean.

Replace, never overwrite: a reader sees the old file or the new one, whole. `durable=True` adds the fsyncs that make the
new one survive a power cut (file before the rename, folder after it).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from trainerd.contract.errors import Unreadable

SCHEMA = 1
_WINDOWS = sys.platform == "win32"
# Access denied, sharing violation, lock violation: a scanner, an indexer or a plain reader holds the file for a moment.
_BUSY_ON_WINDOWS = (5, 32, 33)
_BUSY_SECONDS = 2.5


def replace(source: Path, target: Path, busy_seconds: float = _BUSY_SECONDS) -> None:
    """Rename `source` onto `target`; on Windows wait for short-lived readers of either.

    Raises OSError when it cannot be done, PermissionError when somebody held the file all along.
    """
    deadline = time.monotonic() + busy_seconds
    pause = 0.005
    while True:
        try:
            os.replace(source, target)
            return
        except OSError as error:
            busy = _WINDOWS and getattr(error, "winerror", None) in _BUSY_ON_WINDOWS
            if not busy or time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 0.25)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable. Windows has no such call and journals them itself."""
    if _WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes, *, durable: bool = False, busy_seconds: float = _BUSY_SECONDS) -> None:
    """Put `content` at `path` so that no reader and no crash ever sees half of it. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        replace(temporary, path, busy_seconds)
    except OSError:
        remove(temporary)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(path: Path, document: dict[str, Any], *, durable: bool = False, busy_seconds: float = _BUSY_SECONDS) -> None:
    """Put a JSON document at `path` by replacement. Raises OSError."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text.encode("utf-8", "replace") + b"\n", durable=durable, busy_seconds=busy_seconds)


def read_json(path: Path, what: str, max_bytes: int = 16 << 20) -> dict[str, Any]:
    """The JSON document at `path`.

    `what` names it in messages ("the status"). Raises FileNotFoundError when there is none, Unreadable when it is not
    a JSON object, is larger than `max_bytes`, or carries a schema newer than this program knows.
    """
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise Unreadable(f"{what} at {path} is larger than {max_bytes:,} bytes.", "It was not written by trainerd; move it away.")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise Unreadable(f"{what} at {path} is damaged: it is not JSON.", "The next start keeps it aside and writes a new one.") from None
    if not isinstance(document, dict):
        raise Unreadable(f"{what} at {path} is damaged: it holds no JSON object.", "The next start keeps it aside and writes a new one.")
    schema = document.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        message = f"{what} at {path} has schema {schema}; this trainerd reads up to {SCHEMA}."
        raise Unreadable(message, "Use the newer trainerd that wrote it.")
    return document


def append_line(path: Path, line: str) -> None:
    """Append one whole line; a line torn by an earlier crash is closed first, so that it spoils no other."""
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode("utf-8", "replace") + b"\n")


def remove(path: Path) -> None:
    """Remove a file if it is there; a file somebody holds open on Windows is left for later."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except PermissionError:
        if not _WINDOWS:
            raise
