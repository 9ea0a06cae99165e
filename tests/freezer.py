"""A process that cannot be killed, for real: frozen by the kernel (cgroup v1), it stands in uninterruptible sleep. No tests here."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

_FREEZER = Path("/sys/fs/cgroup/freezer")


class Freezer:
    """Takes processes in; what is frozen is in state D, and SIGKILL waits until it is let go, as in a driver that hangs."""

    def __init__(self) -> None:
        self._folder = _FREEZER / f"trainerd-test-{uuid.uuid4().hex[:8]}"
        try:
            self._folder.mkdir()
        except OSError as error:
            pytest.skip(f"needs the right to a cgroup of version 1 with a freezer: {error}")

    def freeze(self, pid: int) -> None:
        (self._folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
        self._state("FROZEN")

    def thaw(self) -> None:
        """The driver comes back."""
        self._state("THAWED")

    def close(self) -> None:
        self.thaw()
        while (self._folder / "cgroup.procs").read_text("ascii").split():
            os.sched_yield()
        self._folder.rmdir()

    def _state(self, state: str) -> None:
        (self._folder / "freezer.state").write_text(state, encoding="ascii")


def state_of(pid: int) -> str:
    """The letter the kernel gives a process: D is what no signal reaches."""
    return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
