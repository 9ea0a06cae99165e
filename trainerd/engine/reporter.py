"""Sends events up the pipe and writes the log's lines, from a thread of its own. Must never block or raise in the caller.

The queue is bounded and what is replaced by newer news (progress, memory, phase) keeps only its latest: a supervisor that
is stopped, slow or gone costs the training nothing. What must not be lost is on disk, not here.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from typing import Any

from trainerd.contract import clock, wire

_LATEST_WINS = frozenset({wire.PROGRESS, wire.MEMORY, wire.BEAT})
_TICK_SECONDS = 0.25
_QUEUE_LENGTH = 1000
_LOG_EVERY_SECONDS = 10.0
Message = dict[str, Any]


class Reporter:
    """`descriptor` is the event pipe, or None to write the log only. Call start() once, and close() before the end."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._queue: deque[Message] = deque(maxlen=_QUEUE_LENGTH)  # the oldest goes when it is full
        self._latest: dict[str, Message] = {}
        self._wake = threading.Event()
        self._closing = False
        self._logged_at: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, event: str, **fields: Any) -> None:
        """Queue one event. The fields must not be changed afterwards."""
        message = {"event": event, "at": clock.wall(), "monotonic": clock.monotonic(), **fields}
        if event in _LATEST_WINS:
            self._latest[event] = message  # picked up at the next tick
        else:
            self._queue.append(message)
            self._wake.set()

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Write what is queued, unless nobody reads it within the time."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while True:
            self._wake.wait(_TICK_SECONDS)
            self._wake.clear()
            closing = self._closing
            # Taken before the queue: progress sent before a checkpoint must not arrive after it.
            for event in _LATEST_WINS:
                message = self._latest.pop(event, None)
                if message is not None:
                    self._write(message)
            while self._queue:
                self._write(self._queue.popleft())
            if closing:
                return

    def _write(self, message: Message) -> None:
        self._log(message)
        if self._descriptor is None:
            return
        try:
            content = memoryview(_line(message))
            while content:
                content = content[os.write(self._descriptor, content) :]
        except OSError:  # nobody will ever read it again; the commands' end of file says what to do about it
            self._descriptor = None

    def _log(self, message: Message) -> None:
        if message["event"] in (wire.PROGRESS, wire.PHASE):
            about = f"{message['event']} {message.get('name')}"
            now = time.monotonic()
            if now - self._logged_at.get(about, -math.inf) < _LOG_EVERY_SECONDS:
                return
            self._logged_at[about] = now
        text = _words(message)
        if text:
            say(text)


def say(text: str) -> None:
    """One line for the log, with the local time. A full disk costs the line, nothing else."""
    try:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def _line(message: Message) -> bytes:
    """The message as a line the other side can take: no NaN, nothing JSON lacks, not too long."""
    try:
        line = wire.encode({key: _plain(value) for key, value in message.items()})
    except (TypeError, ValueError, RecursionError) as error:
        line = wire.encode({**_head(message), "event": wire.WARNING, "text": f"An event {message['event']!r} was lost: {error}."})
    if len(line) > wire.MAX_LINE_BYTES:
        flat = {key: value for key, value in message.items() if not isinstance(value, (dict, list, tuple))}
        line = wire.encode({key: value[:1000] if isinstance(value, str) else _plain(value) for key, value in flat.items()})
    return line


def _head(message: Message) -> Message:
    return {key: message[key] for key in ("at", "monotonic")}


def _plain(value: Any) -> Any:
    """Unknown is null: a loss that is not finite has no JSON, and would stop the status from being written."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _words(message: Message) -> str:
    """The line of the log for an event; empty for those nobody reads there."""
    get = message.get
    event = message["event"]
    if event == wire.PROGRESS:
        loss, rate = get("loss"), get("samples_per_second")
        return (
            f"epoch {get('epoch')}/{get('epochs')}  step {get('step')}/{get('total_steps')}"
            + (f"  loss {loss:.4f}" if isinstance(loss, (int, float)) else "")
            + (f"  {rate:,.0f} samples/s" if isinstance(rate, (int, float)) else "")
        )
    if event == wire.CHECKPOINT:
        size = get("bytes") or 0
        much = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:,} bytes"
        return f"checkpoint: step {get('step')}, epoch {get('epoch')}, {much} in {get('seconds') or 0:.2f} s"
    if event == wire.UNSAVED:
        return f"unsaved: {get('error')}" if get("since") is not None else "saving works again"
    if event == wire.DATA:
        return f"data: {get('used')} of {get('rows')} rows used" + (f", dropped {get('dropped')}" if get("dropped") else "")
    if event == wire.EXCEPTION:
        return f"error: {get('type')}: {get('text')}"
    if event in (wire.WAITING, wire.WARNING):
        return f"{event}: {get('reason') or get('text')}"
    if event == wire.PHASE:
        return str(get("name")) + (f": {get('done')} of {get('total') or '?'} {get('unit') or ''}" if get("done") is not None else "")
    if event in (wire.MEMORY, wire.NOTE, wire.BEAT, wire.NAN):
        return ""
    rest = {key: value for key, value in message.items() if key not in ("event", "at", "monotonic", "record")}
    return f"{event}: " + ", ".join(f"{key} {value}" for key, value in rest.items() if value is not None) if rest else event
