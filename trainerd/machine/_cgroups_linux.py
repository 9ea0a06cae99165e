"""What the groups a process is in (cgroups of version 1 and 2: containers, services, sessions) leave it of the RAM, and whom the kernel
ended in them. Must not know what the machine has, nor what a limit is good for.

A limit holds for a group with everything below it, so every group on the way up counts. Files that only cache the disk do not: they
are given back before anybody is ended.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_NONE_BYTES = 1 << 60  # version 1 says "no limit" with a number: all of 63 bits, rounded down to a page
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Limit:
    """One group's: how much it may hold, and what it holds that it cannot give back."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class _Version:
    """How one version of cgroups writes things down."""

    limits: tuple[str, ...]
    used: str
    caches: tuple[str, ...]
    """Of memory.stat: what is given back when memory is short."""
    kills: str


_FIRST = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"), "memory.oom_control")
# Above memory.high a group is slowed down to a crawl: no place to train in, though nothing is ended there.
_SECOND = _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable"), "memory.events")


def limits(pid: int | None = None, proc: Path = _PROC) -> list[Limit]:
    """The limits that hold for a process, by default this one; [] where there are none, or none can be read. Cheap: once a second."""
    found = []
    for version, folder in _places(pid, proc, _upwards):
        limit_bytes = _limit(version, folder)
        used_bytes = None if limit_bytes is None else _used(version, folder)
        if limit_bytes is not None and used_bytes is not None:
            found.append(Limit(limit_bytes, used_bytes))
    return found


def is_limited(pid: int | None = None, proc: Path = _PROC) -> bool:
    """Whether the process's own group has a limit, which it would leave behind in another group."""
    return any(_limit(version, folder) is not None for version, folder in _places(pid, proc, _own))


def kills(proc: Path = _PROC) -> int | None:
    """How many processes of our own group the out-of-memory killer has ended; None where nobody counts them."""
    found = [_number(folder / version.kills, "oom_kill") for version, folder in _places(None, proc, _own)]
    counted = [number for number in found if number is not None]
    return sum(counted) if counted else None


def _places(pid: int | None, proc: Path, which: Callable[[Path, Path], Iterator[Path]]) -> Iterator[tuple[_Version, Path]]:
    """The folders of the process's groups that have to do with memory."""
    for version, mount, below in _groups(pid, proc):
        for folder in which(mount, mount / below):
            yield version, folder


def _upwards(mount: Path, own: Path) -> Iterator[Path]:
    yield own
    for folder in own.parents if own != mount else ():
        yield folder
        if folder == mount:
            return


def _own(mount: Path, own: Path) -> Iterator[Path]:
    yield own


def _groups(pid: int | None, proc: Path) -> Iterator[tuple[_Version, Path, str]]:
    """(version, where its tree is mounted, the process's place below that)."""
    paths = _paths(proc / str(pid)) if pid is not None else None
    paths = paths or _paths(proc / "self") or {}  # it has ended: where we are is where it was
    for version, root, mount in _mounts(proc / "self" / "mountinfo"):
        path = paths.get(version.kills)
        if path is None:
            continue
        # A container sees its own part of the tree, mounted as if it were all; what is outside of it (/../) cannot be seen.
        below = path[len(root) :] if root != "/" and (path + "/").startswith(root + "/") else path
        yield version, mount, "" if ".." in below.split("/") else below.strip("/")


def _paths(process: Path) -> dict[str, str] | None:
    """By version, named by its file of kills: the group a process is in."""
    try:
        lines = (process / "cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    found = {}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            found[_SECOND.kills] = path
        elif "memory" in controllers.split(","):
            found[_FIRST.kills] = path
    return found


def _mounts(table: Path) -> Iterator[tuple[_Version, str, Path]]:
    """Every tree of groups that limits memory: (version, which part of it is mounted, where)."""
    try:
        lines = table.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    seen = set()
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup2": _SECOND, "cgroup": _FIRST if "memory" in kind[2].split(",") else None}.get(kind[0])
        if version is not None and version.kills not in seen:  # mounted twice, it is the same tree
            seen.add(version.kills)
            yield version, _plain(fields[3]), Path(_plain(fields[4]))


def _plain(name: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), name)


def _limit(version: _Version, folder: Path) -> int | None:
    found = [number for name in version.limits if (number := _number(folder / name)) is not None and number < _NONE_BYTES]
    return min(found) if found else None


def _used(version: _Version, folder: Path) -> int | None:
    used_bytes = _number(folder / version.used)
    if used_bytes is None:
        return None
    return max(0, used_bytes - sum(_number(folder / "memory.stat", name) or 0 for name in version.caches))


def _number(path: Path, name: str | None = None) -> int | None:
    """The number in a file, or behind `name` in one of its lines; None: there is none ("max" is none)."""
    try:
        text = path.read_text("ascii", "replace")
    except OSError:
        return None
    if name is not None:
        text = next((line[len(name) :] for line in text.splitlines() if line.startswith(f"{name} ")), "")
    return int(text) if text.strip().isdecimal() else None
