"""A process group on Linux: a session of its own, killed whole. Must not know what runs in it.

The group is killed while the dead leader is still a zombie: until it is reaped its number cannot be given to a stranger.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

assert sys.platform != "win32"


class ProcessGroup:
    """Starts `command` with pipes for stdin and stdout and `log` for stderr. Raises OSError when it cannot start."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: IO[bytes]) -> None:
        self._popen = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        self._reaping = threading.Lock()
        self.pid = self._popen.pid
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self.stdin: IO[bytes] = self._popen.stdin
        self.stdout: IO[bytes] = self._popen.stdout
        os.set_blocking(self.stdin.fileno(), False)  # a process that reads no more must not hold up its supervisor

    def wait(self) -> int:
        """Block until the leader is dead, kill what it left, and return its exit code (negative: the signal)."""
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            pass  # reaped by somebody else: it is dead all the same
        self.kill()
        with self._reaping:
            return self._popen.wait()

    def dump(self) -> bool:
        """Make the leader write its stacks into its log, even when it is stopped; whether that was possible."""
        with self._reaping:
            if self._popen.returncode is not None:
                return False
            try:
                os.kill(self.pid, signal.SIGUSR1)
                os.killpg(self.pid, signal.SIGCONT)
            except (ProcessLookupError, PermissionError):
                return False
        return True

    def kill(self) -> None:
        """Kill every process of the group; nothing happens when the leader was reaped already."""
        with self._reaping:
            if self._popen.returncode is None:
                try:
                    os.killpg(self.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass  # a member of another user: nothing more can be done from here

    def with_pid(self, action: Callable[[int], None]) -> None:
        """Call `action` with the leader's PID while that number cannot be anybody else's; not at all once it was reaped."""
        with self._reaping:
            if self._popen.returncode is None:
                action(self.pid)

    def close(self) -> None:
        """Give the pipes back; to be called after wait()."""
        for pipe in (self.stdin, self.stdout):
            try:
                pipe.close()
            except OSError:
                continue
