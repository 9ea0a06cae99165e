"""Prepares a task's data, in a process of its own so that its memory returns. Must not train, nor know what is prepared.

`python -m trainerd.engine.preparing --home H --run R`: events go up its stdout, the end of its stdin ends it. What it
writes lies in cache/<task>-<key>, keyed by content; `prepared.json`, written last, says that it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainerd.config import catalogue
from trainerd.config.model import RunConfig
from trainerd.contract import files, interpreter, wire
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home
from trainerd.engine import entry, taskfile
from trainerd.engine.task import PrepareContext, Task

Send = Callable[..., None]
_RECORD = "prepared.json"
_TELL_SECONDS = 0.25
_LAST_WORDS_SECONDS = 2.0


def cache_folder(home: Home, task: Task, config: RunConfig, fingerprint: Mapping[str, Any]) -> Path:
    """Where this task's prepared data lies: another data, settings, seed or source is another folder."""
    parts = {
        "source": taskfile.source_hash(type(task)),
        "settings": task.settings.model_dump(mode="json"),
        "data": {**config.data.model_dump(mode="json", exclude={"path"}), **fingerprint},
        "seed": config.seed,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    name = type(task).__name__ if catalogue.is_file_task(config.task) else config.task
    return home.cache / f"{''.join(c if c.isascii() and c.isalnum() else '_' for c in name)}-{key}"


def is_needed(task: Task, cache_dir: Path) -> bool:
    """Whether prepare() has something to do that is not done yet."""
    return type(task).prepare is not Task.prepare and prepared(cache_dir) is None


def prepared(cache_dir: Path) -> dict[str, Any] | None:
    """The record of finished preparation with its data counts; None when it is not whole."""
    try:
        record = files.read_json(cache_dir / _RECORD, "The record of prepared data")
        sizes = record["sizes"]
        whole = all((cache_dir / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, Unreadable, KeyError, AttributeError):
        return None
    return record if whole else None


def prepare_here(task: Task, config: RunConfig, cache_dir: Path, send: Send) -> dict[str, Any]:
    """Run the task's prepare() in this process, unless it is done; returns the record. Raises what prepare() raises."""
    record = prepared(cache_dir)
    if record is None:
        files.make_folder(cache_dir)
        files.remove(cache_dir / _RECORD)
        data: dict[str, Any] = {}
        task.prepare(_context(config, cache_dir, send, data))
        # Everything durable before the record: after a power cut it must not vouch for files that are half there.
        sizes = {path.relative_to(cache_dir).as_posix(): _made_durable(path) for path in sorted(cache_dir.rglob("*")) if path.is_file()}
        record = {"schema": files.SCHEMA, "data": data, "sizes": sizes}
        files.write_json(cache_dir / _RECORD, record, durable=True)
    return record


def _made_durable(path: Path) -> int:
    files.sync_file(path)
    files.sync_folder(path.parent)
    return path.stat().st_size


def _context(config: RunConfig, cache_dir: Path, send: Send, data: dict[str, Any]) -> PrepareContext:
    told_at = 0.0

    def progress(done: int, total: int | None, unit: str) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= _TELL_SECONDS or done == total:
            told_at = now
            send(wire.PHASE, name="preparing", done=int(done), total=None if total is None else int(total), unit=unit)

    def report_data(rows: int, used: int, dropped: Mapping[str, int]) -> None:
        data.update(rows=int(rows), used=int(used), dropped={str(reason): int(number) for reason, number in dropped.items()})
        send(wire.DATA, **data)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return PrepareContext(cache_dir, config.data, config.seed, device, progress, report_data)


class PreparingChild:
    """The preparing process, seen from the trainer."""

    def __init__(self, run: entry.Run) -> None:
        self._command = interpreter.command("trainerd.engine.preparing", "--home", str(run.home.root), "--run", run.record.id)
        self._process: subprocess.Popen[bytes] | None = None

    def work(self, send: Send) -> None:
        """Run it to its end, passing on its events. Raises PreparingFailed."""
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=interpreter.environment())
        self._process = process
        reading = _Reading(process, send)
        reading.start()
        # Its end is known from waiting for it: a process it leaves behind may keep the pipe open.
        code = process.wait()
        reading.join(_LAST_WORDS_SECONDS)
        if code != 0:
            raise entry.PreparingFailed(code, reading.told)

    def kill(self) -> None:
        """End it now; what it has done so far stays."""
        if self._process is not None:
            self._process.kill()


class _Reading(threading.Thread):
    """Passes the child's events on. `told` says whether an EXCEPTION was among them."""

    def __init__(self, process: subprocess.Popen[bytes], send: Send) -> None:
        super().__init__(name="preparing events", daemon=True)
        self._pipe = process.stdout
        self._send = send
        self.told = False

    def run(self) -> None:
        for line in self._pipe or ():
            message = wire.decode(line)
            if message is not None and isinstance(message.get("event"), str):
                self.told = self.told or message["event"] == wire.EXCEPTION
                self._send(**message)


def main(arguments: list[str] | None = None) -> int:
    """The child's entry."""
    asked = entry.parse("trainerd.engine.preparing", arguments)
    commands, events = entry.take_pipes()
    threading.Thread(target=_end_with, args=(commands,), daemon=True).start()

    def send(event: str, **fields: Any) -> None:
        os.write(events, wire.encode({"event": event, **fields}))

    try:
        run = entry.read_run(asked.home, asked.run)
        task = taskfile.load_task(run.config, run.paths.task)
        prepare_here(task, run.config, cache_folder(run.home, task, run.config, run.record.identity.get("data", {})), send)
    except Exception as error:
        traceback.print_exception(error)
        code, fields = entry.verdict(error, retry_helps=False)  # the same data would fail the same way
        send(wire.EXCEPTION, **fields)
        return code
    return 0


def _end_with(commands: int) -> None:
    """End when the trainer does: its end of our stdin closes, however it ended."""
    try:
        while os.read(commands, 4096):
            pass
    except OSError:
        pass
    os._exit(wire.EXIT_LEFT)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # libraries' threads and drivers must not hold up the trainer
