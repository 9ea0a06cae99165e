"""Which of a person's own modules are no longer what they were when a run's step was saved. Must not run them, nor decide what follows.

The task's own file is copied into its run and is what it was; what it imports is read where it lies, and may be edited, moved or put in
another's place while the run rests, or before a module that is imported late is loaded. Every checkpoint names what was loaded.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

from trainerd.engine import sources
from trainerd.engine.task import Task

_MOST_CHARACTERS = 200_000  # a manifest is read up to 1 MiB
_NAMED = 5
WHAT_NOW = "The run goes on with it as it is; for weights that one code alone has trained, begin a new run."


class Code:
    """The files by path, with their sha256 as they were when they were loaded; "" of one that is named and is nowhere."""

    def __init__(self, kind: type[Task], run: Path, *, whole_process: bool) -> None:
        """`run`: its folder, where the copy of the task's file is. `whole_process`: whatever is loaded is the task's."""
        own = sources.file_of(kind)
        self._whole_process = whole_process
        self._loaded: set[str] = set()
        self._is_own = sources.own_file(sys.modules.get(kind.__module__)) is not None
        self.files: dict[str, str] = {}
        if self._is_own and own is not None:
            self.files = _not_too_much(sources.imported(kind, whole_process=whole_process))
            if not own.is_relative_to(run.resolve()):  # a library user's
                self.files[str(own)] = _digest(own)
            self._loaded = set(sys.modules)

    def has_grown(self) -> bool:
        """Whether anything was loaded since the last look. Asked a few times a second: it costs next to nothing."""
        return self._is_own and len(sys.modules) != len(self._loaded)

    def look(self) -> list[str]:
        """Take in what was loaded since the last look; the files that were edited in this life before that, in words."""
        fresh = sys.modules.keys() - self._loaded
        self._loaded = set(sys.modules)
        found = []
        for path in filter(None, (sources.own_file(sys.modules.get(name)) for name in sorted(fresh))):
            known, now = self.files.get(str(path)), _digest(path)
            if known is not None or self._whole_process:
                self.files[str(path)] = now
            if known not in (None, now):
                found.append(f"{path} (edited)")
        return found

    def unlike(self, recorded: object) -> list[str]:
        """What differs from the files that a checkpoint names, in words. Which folder they lie in does not matter."""
        if not isinstance(recorded, Mapping):
            return []  # of an earlier trainerd
        here = {(Path(path).name, digest) for path, digest in self.files.items()}
        found = [f"{path} ({how})" for path, digest in recorded.items() if (how := self._how(str(path), str(digest), here))]
        there = {(Path(path).name, digest) for path, digest in recorded.items()}
        new = [path for path, digest in self.files.items() if digest and path not in recorded and (Path(path).name, digest) not in there]
        return [*found, *(f"{path} (new)" for path in new)]

    def _how(self, path: str, recorded: str, here: set[tuple[str, str]]) -> str:
        now = self.files[path] if path in self.files else _digest(Path(path))
        if now == recorded or (Path(path).name, recorded) in here:
            return ""
        return "gone" if not now else "edited" if recorded else "new"


def in_words(files: list[str]) -> str:
    """The first few of them."""
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return ", ".join(files[:_NAMED]) + more


def gone(recorded: object) -> list[str]:
    """Those of the files that a checkpoint names that are there no more."""
    files = recorded if isinstance(recorded, Mapping) else {}
    return [str(path) for path, digest in files.items() if digest and not Path(str(path)).exists()]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return ""


def _not_too_much(files: Mapping[str, str]) -> dict[str, str]:
    """As many of them as a manifest has room for."""
    found: dict[str, str] = {}
    room = _MOST_CHARACTERS
    for path, digest in files.items():
        room -= 2 * len(path) + len(digest)
        if room > 0:
            found[path] = digest
    return found
