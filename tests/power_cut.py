"""A model of what a disk may hold after a power cut, made from the operations that were really done. No tests here.

Content that was not synced may be there whole, half, with a hole, as zeros, or not at all; of the renames and removals since the last
sync of their folder, any first part may have happened. (A journaling file system does no worse.)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tests.disks import WatchedDisk

Names = dict[str, int]


@dataclass
class _Moment:
    """The disk between two operations."""

    durable: Names
    pending: list[tuple[str, str, int]]
    contents: dict[int, bytes]
    unsynced: set[int]
    acknowledged: int


@dataclass
class Trace(WatchedDisk):
    """Does every operation on one flat folder, and remembers what the disk could be made to forget."""

    folder: Path
    moments: list[_Moment] = field(default_factory=list)
    _durable: Names = field(default_factory=dict)
    _pending: list[tuple[str, str, int]] = field(default_factory=list)
    _now: Names = field(default_factory=dict)
    _contents: dict[int, bytes] = field(default_factory=dict)
    _unsynced: set[int] = field(default_factory=set)
    _acknowledged: int = 0

    def acknowledge(self, step: int) -> None:
        self._acknowledged = step
        self._remember()

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        result = action()
        if path.parent.name == "checkpoints" and kind != "make_folder":
            self._follow(kind, path.name, detail)
            if kind != "write":
                self._remember()
        return result

    def _follow(self, kind: str, name: str, detail: Any) -> None:
        if kind == "create":
            inode = len(self._contents)
            self._contents[inode] = b""
            self._now[name] = inode
            self._pending.append(("link", name, inode))
        elif kind == "write":
            inode = self._now[name]
            self._contents[inode] += bytes(detail[1])
            self._unsynced.add(inode)
        elif kind == "rename":
            inode = self._now[name] = self._now.pop(detail.name)
            self._pending.append((f"rename {detail.name}", name, inode))
        elif kind == "unlink" and name in self._now:
            self._pending.append(("unlink", name, self._now.pop(name)))

    def sync(self, file: BinaryIO) -> None:
        super().sync(file)
        path = Path(file.name)
        if path.parent.name == "checkpoints":
            self._unsynced.discard(self._now[path.name])
            self._remember()

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        if path.name == "checkpoints":
            self._durable, self._pending = dict(self._now), []
            self._remember()

    def _remember(self) -> None:
        now = _Moment(dict(self._durable), list(self._pending), dict(self._contents), set(self._unsynced), self._acknowledged)
        self.moments.append(now)


def _apply(names: Names, operations: list[tuple[str, str, int]]) -> Names:
    names = dict(names)
    for kind, name, inode in operations:
        if kind == "unlink":
            names.pop(name, None)
        else:
            if kind.startswith("rename "):
                names.pop(kind.removeprefix("rename "), None)
            names[name] = inode
    return names


def with_a_hole(content: bytes) -> bytes:
    """Pages reach the disk in any order: the beginning and the end are there, the middle never was."""
    begin, end = 2 * len(content) // 5, 3 * len(content) // 5
    return content[:begin] + bytes(end - begin) + content[end:]


def _after(moment: _Moment) -> Iterator[dict[str, bytes]]:
    forgets: list[Callable[[bytes], bytes]] = [lambda b: b, lambda b: b"", lambda b: bytes(len(b)), lambda b: b[: len(b) // 2]]
    forgets.append(with_a_hole)
    for count in range(len(moment.pending) + 1):
        names = _apply(moment.durable, moment.pending[:count])
        for forget in forgets:
            yield {name: _left(moment, inode, forget) for name, inode in names.items()}


def _left(moment: _Moment, inode: int, forget: Callable[[bytes], bytes]) -> bytes:
    content = moment.contents[inode]
    return forget(content) if inode in moment.unsynced else content


def states_after_power_cuts(trace: Trace, folder: Path) -> Iterator[int]:
    """Puts each possible state into `folder`, once, and gives the step that was acknowledged by then."""
    seen: set[tuple[int, frozenset[tuple[str, bytes]]]] = set()
    for moment in trace.moments:
        for state in _after(moment):
            key = (moment.acknowledged, frozenset(state.items()))
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(folder)
            folder.mkdir()
            for name, content in state.items():
                (folder / name).write_bytes(content)
            yield moment.acknowledged
