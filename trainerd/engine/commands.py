"""Reads commands from the supervisor's pipe in a thread of its own. Must not import torch: it runs before torch does.

The end of the pipe means the supervisor is gone: commit if you can, then leave. Before training begins there is nothing to
commit, and a LEAVE is obeyed at once, from this thread, whatever the main thread is waiting for.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from trainerd.contract import wire

Command = dict[str, Any]


class Commands:
    """Commands wait here until next() takes them. `leave_at_once` is called for a LEAVE that comes before the first next(),
    `hurry` for one that comes later: whoever leaves should no longer be the last in the queue for the CPU; `dump` for a DUMP;
    `abandoned` when the pipe has ended."""

    def __init__(
        self,
        descriptor: int,
        leave_at_once: Callable[[Command], None],
        hurry: Callable[[], None] = lambda: None,
        dump: Callable[[], None] = lambda: None,
        abandoned: Callable[[], None] = lambda: None,
    ) -> None:
        self._descriptor = descriptor
        self._leave_at_once = leave_at_once
        self._hurry = hurry
        self._dump = dump
        self._abandoned = abandoned
        self._waiting: deque[Command] = deque()
        self._lock = threading.Lock()
        self.training = False
        """Whether the loop has begun to ask."""
        self._thread = threading.Thread(target=self._read, name="commands", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def next(self) -> Command | None:
        """The next command, or None. Asked at every micro-batch."""
        if not self.training:
            with self._lock:
                self.training = True
        return self._waiting.popleft() if self._waiting else None

    def put(self, command: Command) -> None:
        """A command from elsewhere than the pipe: a signal."""
        if command.get("do") == wire.DUMP:
            self._dump()
            return
        with self._lock:
            at_once = command.get("do") == wire.LEAVE and not self.training
            if not at_once:
                self._waiting.append(command)
        if at_once:
            self._leave_at_once(command)
        elif command.get("do") == wire.LEAVE:
            self._hurry()

    def _read(self) -> None:
        line = b""
        while True:
            try:
                # Not through sys.stdin: a thread that holds its buffer makes the interpreter's end a fatal error.
                content = os.read(self._descriptor, wire.MAX_LINE_BYTES)
            except OSError:
                content = b""
            if not content:
                self._abandoned()
                self.put({"do": wire.LEAVE, "why": "the supervisor is gone", "save": True})
                return
            *lines, line = (line + content).split(b"\n")
            for whole in lines:
                command = wire.decode(whole)
                if command is not None:
                    self.put(command)
            if len(line) > wire.MAX_LINE_BYTES:
                line = b""
