"""Which parts of this process's memory are those of files it has mapped, by the system's own list. Must not know what they hold.

Their pages come from the disk as they are read, and the system drops them again for whoever needs room: nobody's RAM is used up by
them. A file in a file system that lies in RAM itself is none; what a process has written into such a part is its own from then on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from trainerd.machine.filesystem import mount

_IN_RAM = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})


@dataclass(frozen=True)
class Part:
    """From `begin` to before `end`. `written_bytes` of it are the process's own."""

    begin: int
    end: int
    path: str
    written_bytes: int = 0


def parts() -> list[Part]:
    """All of them, by address; none where the system does not tell (macOS). Costs some tens of milliseconds."""
    try:
        listed = psutil.Process().memory_maps(grouped=False)
    except (psutil.Error, AttributeError, NotImplementedError, OSError):
        return []
    kinds: dict[str, bool] = {}
    found = []
    for one in listed:
        path, (begin, _, end) = one.path, one.addr.partition("-")
        if not path or path.startswith("[") or path.endswith(" (deleted)"):
            continue
        if path not in kinds:
            at = mount(Path(path))
            kinds[path] = at is None or at[0] not in _IN_RAM
        if kinds[path]:
            first = int(begin, 16)
            found.append(Part(first, int(end, 16) if end else first + one.rss, path, getattr(one, "anonymous", 0)))
    return sorted(found, key=lambda part: part.begin)


def in_files(pieces: Iterable[tuple[int, int]], known: list[Part]) -> tuple[list[bool], int]:
    """Of each piece of memory (address, bytes) whether all of it lies in a file; and what of those files' parts was written."""
    begins = [part.begin for part in known]
    found, used = [], set()
    for address, size_bytes in pieces:
        number = bisect_right(begins, address) - 1
        lies = number >= 0 and size_bytes > 0 and address + size_bytes <= known[number].end
        if lies:
            used.add(number)
        found.append(lies)
    return found, sum(known[number].written_bytes for number in used)
