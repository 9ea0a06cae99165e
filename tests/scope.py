"""A cgroup of version 2, whose processes the kernel kills all at once, as a stopped unit or container is. No tests here."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest

_ROOTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


class Scope:
    """Takes processes in, with all they will ever start, and ends them at one instant."""

    def __init__(self) -> None:
        name = f"trainerd-test-{uuid.uuid4().hex[:8]}"
        for root in _ROOTS:
            self._folder = root / name
            if (root / "cgroup.controllers").exists() and os.access(root, os.W_OK):
                self._folder.mkdir()
                if (self._folder / "cgroup.kill").exists():
                    return
                self._folder.rmdir()
        pytest.skip("needs the right to a cgroup of version 2 that can be killed as a whole")

    def take(self, pids: Iterable[int]) -> None:
        for pid in pids:
            try:
                (self._folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        (self._folder / "cgroup.kill").write_text("1", encoding="ascii")

    def members(self) -> list[int]:
        return [int(pid) for pid in (self._folder / "cgroup.procs").read_text("ascii").split()]

    def close(self) -> None:
        self.kill()
        while self.members():
            os.sched_yield()
        self._folder.rmdir()
