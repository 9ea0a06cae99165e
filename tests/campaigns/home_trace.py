"""What a disk may hold of a whole home after a power cut, from the operations a training really did. No tests here.

As in tests/power_cut.py, for several folders: content since its last sync may be there whole, half, with a hole, as zeros, or
not at all; of the names made, renamed and removed in a folder since that folder's last sync, any first part may have happened.
A folder is a name in the one above it: what lies in a folder that is not there is gone.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tests.disks import WatchedDisk
from tests.power_cut import with_a_hole

Change = tuple[str, str, int]
Names = dict[str, int]
_FOLDER = -1
"""In place of an inode, for a name that ends in a slash."""


@dataclass(frozen=True)
class Moment:
    """The disk between two operations. `contents`: inode -> (what is synced, what is there)."""

    durable: Names
    pending: dict[str, tuple[Change, ...]]
    contents: dict[int, tuple[bytes, bytes]]
    acknowledged: int
    finished: bool


@dataclass
class HomeTrace(WatchedDisk):
    """Does every operation below `root`, and remembers what the disk could be made to forget. `deaf(kind, path)`: a sync left out."""

    root: Path
    deaf: Callable[[str, Path], bool] = lambda kind, path: False
    moments: list[Moment] = field(default_factory=list)
    finished: bool = False
    acknowledged: int = 0
    _now: Names = field(default_factory=dict)
    _durable: Names = field(default_factory=dict)
    _pending: dict[str, list[Change]] = field(default_factory=dict)
    _contents: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def begin(self) -> None:
        """What lies there now has been there for long."""
        for path in self.root.rglob("*"):
            if path.is_dir():
                self._now[f"{self._name(path)}/"] = _FOLDER
            elif path.is_file():
                content = path.read_bytes()
                self._now[self._name(path)] = inode = len(self._contents)
                self._contents[inode] = (content, content)
        self._durable = dict(self._now)
        self.remember()

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        with self._lock:
            result = action()
            if path.is_relative_to(self.root):
                self._follow(kind, path, detail)
                if kind != "write" or path.name == "metrics.jsonl":
                    self.remember()
            return result

    def _follow(self, kind: str, path: Path, detail: Any) -> None:
        name = self._name(path)
        if kind == "create" or (kind == "open" and name not in self._now):
            self._now[name] = inode = len(self._contents)
            self._contents[inode] = (b"", b"")
            self._change(path, ("link", name, inode))
        elif kind == "write":
            inode = self._now[name]
            synced, there = self._contents[inode]
            self._contents[inode] = (synced, there + bytes(detail[1]))
        elif kind == "truncate":
            raise AssertionError("an undisturbed training cuts nothing back")
        elif kind == "make_folder":
            self._now[f"{name}/"] = _FOLDER
            self._change(path, ("link", f"{name}/", _FOLDER))
        elif kind == "rename":
            inode = self._now[name] = self._now.pop(self._name(detail))
            self._change(path, (f"rename {self._name(detail)}", name, inode))
        elif kind == "unlink" and name in self._now:
            self._change(path, ("unlink", name, self._now.pop(name)))
        elif kind == "sync" and not self.deaf(kind, path):
            inode = self._now[name]
            self._contents[inode] = (self._contents[inode][1],) * 2
        elif kind == "sync_folder" and not self.deaf(kind, path):
            for change in self._pending.pop(name, []):
                apply(self._durable, change)

    def written(self, path: Path, content: bytes) -> None:
        """A library has written this file all at once, past the disk."""
        self.at("create", path, lambda: None)
        self.at("write", path, lambda: None, (None, content))
        self.remember()

    def _change(self, path: Path, change: Change) -> None:
        self._pending.setdefault(self._name(path.parent), []).append(change)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def remember(self) -> None:
        with self._lock:
            pending = {folder: tuple(changes) for folder, changes in self._pending.items()}
            self.moments.append(Moment(dict(self._durable), pending, dict(self._contents), self.acknowledged, self.finished))

    def sync(self, file: BinaryIO) -> None:
        self.at("sync", Path(file.name), lambda: super(WatchedDisk, self).sync(file))


def apply(names: Names, change: Change) -> None:
    kind, name, inode = change
    if kind == "unlink":
        names.pop(name, None)
        return
    names.pop(kind.removeprefix("rename "), None)
    names[name] = inode


_FORGETS: tuple[Callable[[bytes, bytes], bytes], ...] = (
    lambda synced, there: there,
    lambda synced, there: synced,
    lambda synced, there: synced + bytes(len(there) - len(synced)),
    lambda synced, there: synced + with_a_hole(there[len(synced) :]),
    lambda synced, there: there[: (len(synced) + len(there)) // 2],
)


def _names_after(moment: Moment) -> Iterator[Names]:
    """One folder at a time has done a first part of its changes; the others all of theirs, or none."""
    for folder, changes in moment.pending.items() or (("", ()),):
        for others in (0, 1):
            names = dict(moment.durable)
            for other, theirs in moment.pending.items():
                for change in theirs if others and other != folder else ():
                    apply(names, change)
            for count in range(len(changes) + 1):
                found = dict(names)
                for change in changes[:count]:
                    apply(found, change)
                yield found


@dataclass(frozen=True)
class AfterCut:
    """One possible disk, and what had been promised by then."""

    files: dict[str, bytes]
    folders: tuple[str, ...]
    acknowledged: int
    finished: bool

    def lay_out(self, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        for name in ("", *self.folders):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            path = root / name
            path.write_bytes(content)


def after_power_cuts(trace: HomeTrace) -> Iterator[AfterCut]:
    """Every possible disk, once."""
    seen: set[bytes] = set()
    for moment in trace.moments:
        for names in _names_after(moment):
            there = sorted(name for name in names if _is_reachable(name, names))
            folders = tuple(name for name in there if name.endswith("/"))
            for forget in _FORGETS:
                files = {name: forget(*moment.contents[names[name]]) for name in there if not name.endswith("/")}
                digest = hashlib.sha256(repr((moment.acknowledged, moment.finished, folders)).encode())
                for name, content in files.items():
                    digest.update(f"{name} {len(content)}:".encode() + hashlib.sha256(content).digest())
                if digest.digest() not in seen:
                    seen.add(digest.digest())
                    yield AfterCut(files, folders, moment.acknowledged, moment.finished)


def _is_reachable(name: str, names: Names) -> bool:
    """Whether every folder above a name is there."""
    return all(f"{folder}/" in names for folder in list(PurePosixPath(name).parents)[:-1])
