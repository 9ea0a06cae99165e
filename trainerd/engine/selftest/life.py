"""One life of a real trainer, from its start to its death, seen through its two pipes. Must not judge what it leaves behind.

A ForkedLife begins in milliseconds, because its parent has imported torch already; it needs a parent with one thread only
and without CUDA. A SpawnedLife is a process from nothing, as the supervisor starts it.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from trainerd.contract import interpreter, wire
from trainerd.contract.paths import RunPaths

Event = dict[str, Any]
_READ_BYTES = 1 << 16
_GONE_SECONDS = 20.0


class Life:
    """What a trainer tells, and its end. `code`: None while it lives, negative when a signal ended it."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.code: int | None = None
        self._torn = b""

    def events(self, timeout_seconds: float) -> list[Event]:
        """What it has told since the last look; waits up to the time for something to come."""
        raise NotImplementedError

    def last_events(self) -> list[Event]:
        """After its end: what was still in the pipe."""
        raise NotImplementedError

    def kill(self) -> None:
        """kill -9 (TerminateProcess), and wait until it is gone."""
        raise NotImplementedError

    def ended(self) -> bool:
        """Whether it has ended, and `code` is known."""
        raise NotImplementedError

    def _messages(self, content: bytes) -> list[Event]:
        *lines, self._torn = (self._torn + content).split(b"\n")
        return [message for message in map(wire.decode, lines) if message is not None]


def can_fork() -> bool:
    """Whether lives can be forked here: the system has fork, and nothing in this process would break in a copy of it."""
    return sys.platform.startswith("linux") and len(os.listdir("/proc/self/task")) == 1


class ForkedLife(Life):
    """A copy of this process becomes the trainer: the very main() that `python -m trainerd.engine` calls."""

    def __init__(self, paths: RunPaths, log: Path, first: Callable[[], None] = lambda: None) -> None:
        """`first` is called in the copy before it becomes the trainer."""
        super().__init__()
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._commands)
            os.close(self._events)
            _become_trainer(paths, log, commands, events, first)
        os.close(commands)
        os.close(events)
        os.set_blocking(self._events, False)

    def events(self, timeout_seconds: float) -> list[Event]:
        if not select.select([self._events], [], [], timeout_seconds)[0]:
            return []
        return self._messages(self._read())

    def last_events(self) -> list[Event]:
        content = b""
        while more := self._read():
            content += more
        os.close(self._events)
        os.close(self._commands)
        return self._messages(content)

    def _read(self) -> bytes:
        try:
            return os.read(self._events, _READ_BYTES)
        except BlockingIOError:
            return b""

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None


def _become_trainer(paths: RunPaths, log: Path, commands: int, events: int, first: Callable[[], None]) -> NoReturn:
    from trainerd.engine import process

    try:
        # A group of its own: Ctrl-C at the terminal is for whoever reads the verdict.
        os.setpgid(0, 0)
        errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((commands, 0), (events, 1), (errors, 2)):
            os.dup2(source, target)
            os.close(source)
        first()
        process.main(["--home", str(paths.home.root), "--run", paths.name])
    finally:
        os._exit(70)


class SpawnedLife(Life):
    """`python -m trainerd.engine` with the environment given."""

    def __init__(self, paths: RunPaths, log: Path, environment: dict[str, str]) -> None:
        super().__init__()
        command = interpreter.command("trainerd.engine", "--home", str(paths.home.root), "--run", paths.name)
        own_group: dict[str, Any] = {"creationflags": 0x08000000} if sys.platform == "win32" else {"start_new_session": True}
        with open(log, "ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, bufsize=0, **own_group
            )
        self.pid = self._process.pid
        self._told: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._listen, daemon=True)
        self._reading.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        while content := self._process.stdout.read(_READ_BYTES):
            self._told.put(content)

    def events(self, timeout_seconds: float) -> list[Event]:
        try:
            content = self._told.get(timeout=timeout_seconds) if timeout_seconds > 0 else self._told.get_nowait()
        except queue.Empty:
            return []
        return self._messages(content)

    def last_events(self) -> list[Event]:
        self._reading.join(_GONE_SECONDS)
        content = b""
        while not self._told.empty():
            content += self._told.get_nowait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        return self._messages(content)

    def kill(self) -> None:
        self._process.kill()
        self.code = self._process.wait(_GONE_SECONDS)

    def ended(self) -> bool:
        self.code = self._process.poll()
        return self.code is not None
