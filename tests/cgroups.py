"""A real memory limit of the kernel's for tests: a cgroup of version 1 or 2 that is made, entered and removed. No tests here."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_FIRST, _SECOND = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_GONE_SECONDS = 10.0


class Group:
    """What is started by `command()` lives in it, and all it starts."""

    def __init__(self, folder: Path, limit_file: str) -> None:
        self.folder = folder
        self._limit = folder / limit_file

    def limit(self, limit_bytes: int) -> None:
        self._limit.write_text(str(limit_bytes), encoding="ascii")

    def command(self, *words: str) -> list[str]:
        """The words of a command that enters the group first."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *words]

    def pids(self) -> list[int]:
        return [int(word) for word in (self.folder / "cgroup.procs").read_text("ascii").split()]


@contextmanager
def memory_group() -> Iterator[Group]:
    """A group of its own; skips where we may not make one (it takes root, or a container that delegates)."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux's cgroups")
    first = (_FIRST / "memory.limit_in_bytes").exists()
    folder = (_FIRST if first else _SECOND) / f"trainerd-test-{uuid.uuid4().hex[:12]}"
    try:
        if not first:
            (_SECOND / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup may be made here: {error.strerror}")
    try:
        group = Group(folder, "memory.limit_in_bytes" if first else "memory.max")
        try:
            group.limit(1 << 40)
        except OSError as error:
            pytest.skip(f"this cgroup limits no memory: {error.strerror}")
        yield group
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """A group can only be removed when nobody is left in it."""
    deadline = time.monotonic() + _GONE_SECONDS
    while True:
        for pid in (folder / "cgroup.procs").read_text("ascii").split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)
