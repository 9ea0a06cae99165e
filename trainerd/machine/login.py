"""What shall run when this user logs in, and how that stands with the system. Must not know what the command does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ON = "on"
OFF = "off"
SWITCHED_OFF = "switched off"
"""Registered, but the person turned it off with the system's own means (systemctl, the Task Manager, the desktop's settings)."""
OUTDATED = "outdated"
"""Registered with another command: the checkout or its Python has moved."""


@dataclass(frozen=True)
class Entry:
    """One command for the log-in. `name` is its file's, `title` is read by people, and without `needs` nothing is run."""

    name: str
    title: str
    command: tuple[str, ...]
    needs: Path


@dataclass(frozen=True)
class Found:
    """How an entry stands; `way` is in words for a person, `path` the file that registers it."""

    state: str
    way: str = ""
    path: Path | None = None


def unprintable(entry: Entry) -> str | None:
    """The first word of the command that no registration file can carry (a line break, bytes that are no text), or None."""
    for word in (*entry.command, entry.title, str(entry.needs)):
        if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in word):
            return word
    return None
