"""Request files: how a client asks the supervisor for something. Must not decide what an answer means.

One file `control/<uuid>.json` per request, written by rename, meant for one supervisor instance; the supervisor answers in
the status (`requests`) and deletes the file. It works the same on every system, detached, and across sessions.
"""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainerd.contract import clock, files
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home

VERBS = ("start", "stop", "pause", "resume", "save")
MAX_BYTES = 1 << 20


@dataclass
class Request:
    """`instance` is the supervisor it is meant for; `arguments` belong to the verb."""

    verb: str
    instance: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=clock.wall)


def send(home: Home, request: Request) -> Path:
    """Write the request file; returns its path, which withdraw() takes. Raises OSError."""
    home.control.mkdir(parents=True, exist_ok=True)
    path = home.control / f"{request.id}.json"
    files.write_json(path, {"schema": files.SCHEMA, **asdict(request)})
    return path


def withdraw(path: Path) -> None:
    """Take back a request nobody answered, so that it does not take effect later."""
    files.remove(path)


def pending(home: Home) -> list[Path]:
    """The request files waiting, oldest first."""
    try:
        found = [entry for entry in os.scandir(home.control) if entry.name.endswith(".json") and not entry.name.startswith(".")]
        return [Path(entry.path) for entry in sorted(found, key=lambda entry: (entry.stat(follow_symlinks=False).st_mtime_ns, entry.name))]
    except OSError:
        return []


def read(path: Path) -> Request:
    """The request in a file. Raises Unreadable when it is not one: wrong form, too large, a link, or another user's."""
    try:
        seen = os.lstat(path)
    except OSError as error:
        raise Unreadable(f"The request {path.name} cannot be read: {error.strerror}.") from None
    foreign = sys.platform != "win32" and seen.st_uid not in (os.getuid(), 0)
    if os.path.islink(path) or foreign or seen.st_size > MAX_BYTES:
        raise Unreadable(f"The request {path.name} is refused: a link, too large, or not written by this user.")
    try:
        document = files.read_json(path, "The request", MAX_BYTES)
    except OSError as error:
        raise Unreadable(f"The request {path.name} cannot be read: {error.strerror}.") from None
    verb, instance, arguments = document.get("verb"), document.get("instance"), document.get("arguments", {})
    ident, at = document.get("id"), document.get("at", 0.0)
    shaped = isinstance(arguments, dict) and isinstance(at, (int, float))
    if verb not in VERBS or not isinstance(instance, str) or not shaped or ident != path.stem:
        raise Unreadable(f"The request {path.name} is refused: it names no verb of {', '.join(VERBS)}, or lacks a part.")
    return Request(verb, instance, arguments, ident, at)
