"""Prepares a task's data, in a process of its own so that its memory returns. Must not train, nor know what is prepared.

`python -m trainerd.engine.preparing --home H --run R`: events go up its stdout, the end of its stdin ends it. What it
writes lies in cache/<task>-<key>, keyed by content; `prepared.json`, written last, holds the sha256 of every file, and each
trainer start compares them: data that was damaged, or changed while it was prepared, is never trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trainerd.config import catalogue
from trainerd.config.model import RunConfig
from trainerd.contract import clock, files, interpreter, phases, wire
from trainerd.contract.errors import Unreadable, UsageError
from trainerd.contract.paths import Home
from trainerd.engine import aside, dumps, entry, missing, provenance, space, taskfile
from trainerd.engine.task import PrepareContext, Task

Send = Callable[..., None]
_RECORD = "prepared.json"
# Says of what, and in which boot, an unfinished preparation is.
_MARK = "preparing.json"
_ATTEMPTS = 3
# Checking less than this takes no time that anybody would notice.
_TELL_CHECKING_BYTES = 512 << 20
_TELL_SECONDS = 0.25
_LAST_WORDS_SECONDS = 2.0
_SIGBUS = getattr(signal, "SIGBUS", 0)  # what writing to a memory map on a full disk ends in


def cache_folder(home: Home, task: Task, config: RunConfig, fingerprint: Mapping[str, Any], trained: Path | None = None) -> Path:
    """Where this task's prepared data lies: another data, settings, seed or source is another folder. `trained`: see source_hash()."""
    parts = {
        "source": taskfile.source_hash(type(task), trained),
        "settings": task.settings.model_dump(mode="json"),
        "data": {**config.data.model_dump(mode="json", exclude={"path"}), **fingerprint},
        "seed": config.seed,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    name = type(task).__name__ if catalogue.is_file_task(config.task) else config.task
    return home.cache / f"{''.join(c if c.isascii() and c.isalnum() else '_' for c in name)}-{key}"


def has_prepare(task: Task) -> bool:
    """Whether the task has a prepare() at all."""
    return type(task).prepare is not Task.prepare


def verified(cache_dir: Path, send: Send) -> dict[str, Any] | None:
    """The record of finished preparation with its data counts, after a look at every byte it vouches for.

    None when it is not whole: then it must be prepared anew, and what is damaged has been told.
    """
    files.refuse_links(cache_dir.parent.parent, cache_dir)
    try:
        record = files.read_json(cache_dir / _RECORD, "The record of prepared data")
    except FileNotFoundError:
        return None
    except (OSError, Unreadable) as error:
        why = f"its record cannot be read ({error})"
    else:
        why = _damage(cache_dir, record, send)
        if not why:
            return _with_hashes(cache_dir, record)
    send(wire.WARNING, text=f"The prepared data in {cache_dir} is damaged: {why}. It is prepared anew.")
    return None


def look_at_data(task: Task, config: RunConfig, recorded: provenance.Fingerprint, send: Send) -> None:
    """Compare data.path with the data the run began with, when nothing has to be prepared from it.

    A task that reads it again would train on something else: UsageError. For one that does not, what was prepared is the
    data of this run, whatever has become of the file: it goes on, and says so.
    """
    if task.reads_data or not has_prepare(task):
        provenance.check(task, config, recorded)
        return
    why = provenance.difference(task, config, recorded)
    if why:
        text = f"The data {config.data.path} is not what this run began with any more ({why})."
        send(wire.WARNING, text=f"{text} It goes on with what was prepared from it then.")


def digest_of(cache_dir: Path) -> str:
    """One hash for everything that was prepared: prepared again from the same data, it should be the same."""
    record = files.read_json(cache_dir / _RECORD, "The record of prepared data")
    return hashlib.sha256(json.dumps(record["files"], sort_keys=True).encode()).hexdigest()


def _damage(cache_dir: Path, record: Mapping[str, Any], send: Send) -> str:
    """What is wrong with the prepared files, "" when nothing is. A record of before the hashes vouches for sizes only."""
    try:
        expected = record["files"] if "files" in record else {name: {"bytes": size} for name, size in record["sizes"].items()}
        total = sum(int(entry["bytes"]) for entry in expected.values())
        done = 0
        for name, entry in expected.items():
            path = cache_dir / name
            if not path.is_relative_to(cache_dir) or ".." in path.parts:
                return f"its record names {name}, which is not in it"
            seen = path.lstat()
            if not stat.S_ISREG(seen.st_mode):
                return f"{name} is not a plain file"
            if seen.st_size != entry["bytes"]:
                return f"{name} has {seen.st_size:,} bytes instead of {entry['bytes']:,}"
            if total >= _TELL_CHECKING_BYTES:
                send(wire.PHASE, name="preparing", done=done >> 20, total=total >> 20, unit="MiB checked")
            if "sha256" in entry and files.sha256_of(path) != entry["sha256"]:
                return f"the content of {name} has changed since it was written (sha256)"
            done += seen.st_size
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror or error}"
    except (KeyError, TypeError, ValueError, AttributeError):
        return "its record is not one of ours"
    return ""


def _with_hashes(cache_dir: Path, record: dict[str, Any]) -> dict[str, Any]:
    """A record from before the hashes gets them now: from here on its files are verified, too."""
    if "files" in record:
        return record
    found = {name: {"bytes": size, "sha256": files.sha256_of(cache_dir / name)} for name, size in record["sizes"].items()}
    record = {"schema": files.SCHEMA, "data": record.get("data") or {}, "files": found}
    files.write_json(cache_dir / _RECORD, record, durable=True)
    return record


def prepare_here(
    task: Task, config: RunConfig, cache_dir: Path, send: Send, recorded: provenance.Fingerprint | None = None
) -> dict[str, Any]:
    """Run the task's prepare() in this process, unless it is done; returns the record. Raises what prepare() raises.

    `recorded` is the fingerprint of the data the run began with. Raises UsageError, and vouches for nothing, when
    data.path holds something else before or after it was read.
    """
    record = verified(cache_dir, send)
    if record is not None:
        return record
    recorded = provenance.fingerprint(task, config) if recorded is None else recorded
    for _ in range(_ATTEMPTS):
        provenance.check(task, config, recorded)
        stamp = provenance.stamp(config.data)
        _begin(cache_dir, stamp)
        data: dict[str, Any] = {}
        try:
            task.prepare(_context(config, cache_dir, send, data))
            provenance.check(task, config, recorded)
        except BaseException as error:
            if isinstance(error, UsageError) or space.is_full(error, cache_dir):
                with suppress(OSError):
                    _clear(cache_dir)  # of other data, or in the way of everybody else on a full disk
            raise
        if provenance.stamp(config.data) == stamp:
            return _vouch(cache_dir, data)
        send(wire.WARNING, text=f"The data {config.data.path} was written to while it was being prepared: it is prepared again.")
    _clear(cache_dir)
    message = f"The data {config.data.path} is being written to: it changed each of the {_ATTEMPTS} times it was prepared."
    raise UsageError(message, "Wait until nobody writes to it, and start again.")


def _begin(cache_dir: Path, stamp: str) -> None:
    """Leave what an interrupted preparation has done if it read the very same files in this boot, else begin with nothing."""
    files.make_folder(cache_dir)
    mark = {"schema": files.SCHEMA, "stamp": stamp, "boot": clock.boot_id()}
    try:
        same = files.read_json(cache_dir / _MARK, "The mark of a preparation") == mark and not (cache_dir / _RECORD).exists()
    except (OSError, Unreadable):
        same = False
    if not same:
        _clear(cache_dir)
        files.write_json(cache_dir / _MARK, mark)


def _clear(folder: Path) -> None:
    """Remove everything in a folder, the record first; links are removed, never followed."""
    files.remove(folder / _RECORD)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            files.remove(path)


def _vouch(cache_dir: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Write the record. Everything is durable before it: after a power cut it must not vouch for files that are half there."""
    files.remove(cache_dir / _MARK)
    found = {}
    for path in sorted(cache_dir.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise UsageError(f"prepare() has left {path}, which is not a plain file: it might lead anywhere.", "Write files only.")
        files.sync_file(path)
        files.sync_folder(path.parent)
        found[path.relative_to(cache_dir).as_posix()] = {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
    record = {"schema": files.SCHEMA, "data": data, "files": found}
    files.write_json(cache_dir / _RECORD, record, durable=True)
    return record


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
        self._cache = run.home.cache
        self._memory = run.config.memory
        self._command = interpreter.command("trainerd.engine.preparing", "--home", str(run.home.root), "--run", run.record.id)
        self._process: subprocess.Popen[bytes] | None = None

    def work(self, send: Send) -> None:
        """Run it to its end, passing on its events. Raises PreparingFailed, PreparingFoundNoRoom for a full disk, or SteppedAside when
        it was ended because others need the RAM."""
        beside = aside.Beside(self._memory, send)
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=interpreter.environment())
        self._process = process
        reading = _Reading(process, send)
        reading.start()
        # Its end is known from waiting for it: a process it leaves behind may keep the pipe open.
        code = _watched(process, beside)
        reading.join(_LAST_WORDS_SECONDS)
        if code == entry.EXIT_DISK_FULL or (-code == _SIGBUS and space.has_hardly_any(self._cache)):
            raise entry.PreparingFoundNoRoom
        if code != 0:
            raise entry.PreparingFailed(code, reading.told)

    def dump(self) -> None:
        """It seems to hang: its stacks go into the log (on Windows a timer of its own sees to it)."""
        if self._process is not None and sys.platform != "win32":
            self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End it now; what it has done so far stays."""
        if self._process is not None:
            self._process.kill()


def _watched(process: subprocess.Popen[bytes], beside: aside.Beside) -> int:
    """Its exit code. Raises SteppedAside."""
    while True:
        try:
            return process.wait(aside.LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            wanted = beside.look(process.pid)
        if wanted is not None:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS_SECONDS)
            raise aside.SteppedAside(wanted)


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
    dumps.arrange()
    threading.Thread(target=_end_with, args=(commands,), daemon=True).start()

    faults: dict[str, Any] = {}

    def send(event: str, **fields: Any) -> None:
        os.write(events, wire.encode({"event": event, **fields}))
        if event == wire.PHASE:
            dumps.wind_up(phases.PREPARING, faults)

    try:
        run = entry.read_run(asked.home, asked.run)
        faults |= run.config.faults.model_dump()
        task = taskfile.load_task(run.config, run.paths.task)
        cache_dir = cache_folder(run.home, task, run.config, run.record.identity.get("data", {}), run.paths.trained_task)
        prepare_here(task, run.config, cache_dir, send, provenance.of_identity(run.record.identity))
    except Exception as error:
        traceback.print_exception(error)
        if space.is_full(error, Home(asked.home).cache):
            return entry.EXIT_DISK_FULL
        told = missing.in_words(error, Home(asked.home).run(asked.run))
        code, fields = entry.verdict(told, retry_helps=False)  # the same data would fail the same way
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
