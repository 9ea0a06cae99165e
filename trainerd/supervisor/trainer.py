"""One trainer process: its start, its two pipes, its death. Must not decide when to start or end it.

Death is known from waiting on the process: the event pipe may be held open by loader workers long after.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trainerd.contract import clock, wire
from trainerd.contract.paths import Home
from trainerd.machine import memory, priority
from trainerd.machine.process_group import ProcessGroup

_READ_BYTES = 64 * 1024
# Between reads, so that a chatty trainer costs the supervisor nothing: what is superseded meanwhile is skipped unread.
_READ_PAUSE_SECONDS = 0.05
_DRAIN_SECONDS = 1.0
_LATEST_WINS = (wire.PROGRESS, wire.MEMORY, wire.BEAT)
_MARKS = tuple(f'"event":"{name}"'.encode() for name in _LATEST_WINS)


class TrainerProcess:
    """A running trainer. Its events arrive in `inbox` as (this trainer, message), its end as (this trainer, None).

    Progress wakes nobody: only the newest is kept, in `latest`, for whoever looks.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], home: Home, log: tuple[Path, IO[bytes]], inbox: Inbox
    ) -> None:
        self.log_path = log[0]
        self.started_at, self.started_monotonic = clock.wall(), time.monotonic()
        self.last_words: dict[str, dict[str, Any]] = {}
        """By event: why it is about to leave or to die."""
        self.not_finite_again = False
        self.said_hello = self.said_finished = self.has_trained = False
        self.latest: dict[str, dict[str, Any]] = {}
        self.result_before: tuple[int, int] | None = None
        self.kills_before = memory.Kills()
        """What the system's out-of-memory killer had counted when it was started."""
        self.is_our_group = True
        """Whether it lives in our own container or service, and not in one made for it."""
        self.exit_code: int | None = None
        self._inbox = inbox
        self._group = ProcessGroup(command, environment=environment, folder=home.root, log=log[1])
        self.pid = self._group.pid
        self._reader = threading.Thread(target=self._read, name="events", daemon=True)
        self._waiter = threading.Thread(target=self._wait, name="death", daemon=True)
        self._reader.start()
        self._waiter.start()

    def send(self, do: str, **fields: Any) -> None:
        """Give the trainer a command. A trainer that is gone, or reads no more, does not hold us up: its deadline will."""
        try:
            self._group.stdin.write(wire.encode({"do": do, **fields}))
        except (OSError, ValueError):
            pass

    def dump(self) -> None:
        """Have it write its stacks into its log, if anything in it still can."""
        if not (self.said_hello and self._group.dump()):
            self.send(wire.DUMP)

    def hurry(self) -> None:
        """Give it its ordinary weight back, so that it leaves quickly."""
        self._group.with_pid(priority.raise_process)

    def kill(self) -> None:
        """Kill it and everything it started. Its death arrives as always."""
        self._group.kill()

    def drain(self) -> None:
        """After its death: wait a moment until its last events have arrived."""
        self._reader.join(_DRAIN_SECONDS)
        if not self._reader.is_alive():
            self._group.close()

    def _wait(self) -> None:
        self.exit_code = self._group.wait()
        self._inbox.put((self, None))

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                content = os.read(self._group.stdout.fileno(), _READ_BYTES)
            except (OSError, ValueError):
                content = b""
            *lines, rest = (rest + content).split(b"\n")
            for message in decode_newest(lines):
                if message.get("event") in _LATEST_WINS:
                    self.latest[message["event"]] = message
                else:
                    self._inbox.put((self, message))
            if not content:
                return
            if len(rest) > wire.MAX_LINE_BYTES:
                rest = b""  # not a line of ours
            time.sleep(_READ_PAUSE_SECONDS)


Inbox = queue.SimpleQueue[tuple[TrainerProcess, dict[str, Any] | None] | None]


def decode_newest(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The messages in lines, in order, without progress that a later line of the same batch supersedes."""
    seen: set[bytes] = set()
    messages: list[dict[str, Any]] = []
    for line in reversed(lines):
        kind = next((mark for mark in _MARKS if mark in line[:200]), None)
        if kind is not None and kind in seen:
            continue
        message = wire.decode(line)
        if message is not None:
            messages.append(message)
            if kind is not None:
                seen.add(kind)
    return messages[::-1]


def parse_command(text: str) -> list[str]:
    """The words of `--trainer-command`, a JSON list. Raises ValueError."""
    words = json.loads(text)
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError("--trainer-command takes a JSON list of words")
    return words
