"""Request files: how a client asks the supervisor for something. Must not decide what an answer means.

One file `control/<uuid>.json` per request, written by rename, meant for one supervisor instance; the supervisor answers in
the status (`requests`) and deletes the file. It works the same on every system, detached, and across sessions.
"""

from __future__ import annotations

import itertools
import os
import stat
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainerd.contract import clock, files, ground
from trainerd.contract.errors import Refused, Unreadable
from trainerd.contract.paths import Home

VERBS = ("start", "stop", "pause", "resume", "save")
MAX_BYTES = 1 << 20
MOST_SECONDS = 86400
"""The longest time limit a request may carry: a day."""
MOST_PENDING = 500
MOST_ENTRIES = 20_000
"""How many files one look at control/ takes in, whatever lies there: a tick must stay short."""


@dataclass
class Request:
    """`instance` is the supervisor it is meant for; `arguments` belong to the verb."""

    verb: str
    instance: str
    arguments: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=clock.wall)


def send(home: Home, request: Request) -> Path:
    """Write the request file; returns its path, which withdraw() takes. Raises OSError, Refused."""
    if files.is_link(home.control):
        raise Refused(f"{home.control} is a link: requests in it are not read.", "Move it away.")
    files.make_folder(home.control, 0o700)
    path = home.control / f"{request.id}.json"
    files.write_json(path, {"schema": files.SCHEMA, **asdict(request)})
    return path


def withdraw(path: Path) -> None:
    """Take back a request nobody answered, so that it does not take effect later."""
    files.remove(path)


def pending(home: Home) -> list[Path]:
    """The request files waiting, oldest first; of very many, some: the rest come when these are gone. Raises Refused.

    A control/ that is a link leads to a folder of somebody's whose files would be taken for requests, and deleted.
    """
    if files.is_link(home.control):
        raise Refused(f"{home.control} is a link: requests in it are not read.", "Move it away.")
    found: list[tuple[int, str, str]] = []
    try:
        with os.scandir(home.control) as entries:
            for entry in itertools.islice(entries, MOST_ENTRIES):
                named = entry.name.endswith(".json") and not entry.name.startswith(".")
                if named and not entry.is_dir(follow_symlinks=False):
                    found.append((entry.stat(follow_symlinks=False).st_mtime_ns, entry.name, entry.path))
                    if len(found) == MOST_PENDING:
                        break
    except OSError:
        pass  # deleted between two looks; what was seen is seen
    return [Path(path) for _, _, path in sorted(found)]


def read(path: Path) -> Request:
    """The request in a file. Raises Unreadable when it is not one: wrong form, too large, a link, or another user's."""
    try:
        seen = os.lstat(path)
    except OSError as error:
        raise Unreadable(f"The request {path.name} cannot be read: {error.strerror}.") from None
    if not stat.S_ISREG(seen.st_mode):
        raise Unreadable(f"The request {path.name} is refused: it is not a file.")
    if ground.is_foreign(seen):
        raise Unreadable(f"The request {path.name} is refused: another user wrote it (number {seen.st_uid}).")
    if seen.st_size > MAX_BYTES:
        raise Unreadable(f"The request {path.name} is refused: it is larger than {MAX_BYTES:,} bytes.")
    try:
        document = files.read_json(path, f"The request {path.name}", MAX_BYTES, remedy="It is removed unobeyed.")
    except OSError as error:
        raise Unreadable(f"The request {path.name} cannot be read: {error.strerror}.") from None
    verb, instance, arguments = document.get("verb"), document.get("instance"), document.get("arguments", {})
    ident, at = document.get("id"), document.get("at", 0.0)
    if verb not in VERBS:
        raise Unreadable(f"The request {path.name} is refused: {str(verb)[:40]!r} is none of {', '.join(VERBS)}.")
    shaped = isinstance(arguments, dict) and isinstance(at, (int, float)) and ident == path.stem
    if not shaped or not isinstance(instance, str):
        raise Unreadable(f"The request {path.name} is refused: a part is missing, or its id is not its file's name.")
    _check(path, arguments)
    return Request(verb, instance, arguments, path.stem, at)


def _check(path: Path, arguments: dict[str, Any]) -> None:
    """The arguments a supervisor acts on: looked at before anything is done. A client of another version may send more."""
    seconds = arguments.get("timeout_seconds")
    if seconds is not None:
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not number or not 0 < seconds <= MOST_SECONDS:  # false for NaN, too
            shown = f"{seconds}"[:40] if isinstance(seconds, float) else f"{str(seconds)[:40]!r}"
            raise Unreadable(f"The request {path.name} is refused: timeout_seconds is {shown}, not a time from 0 to {MOST_SECONDS:,} s.")
    if not isinstance(arguments.get("now", False), bool):
        raise Unreadable(f"The request {path.name} is refused: now is {str(arguments['now'])[:40]!r}, not true or false.")
