"""What a supervisor does before its loop: the request that called it, the run's record, the folders. Must not start anything.

Everything a client sent is checked again here: a request file may come from anybody who may write to the home.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainerd.contract import clock, files, ground, requests, runs, wire
from trainerd.contract.errors import Refused, TrainerdError, UsageError
from trainerd.contract.paths import STATUS_FILE, Home, RunPaths
from trainerd.contract.runs import RunRecord
from trainerd.memory.limits import resolve_limit

_MANIFEST = re.compile(r"checkpoint_epoch_(\d+)_step_(\d+)\.json")
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_TASK_BYTES = 4 << 20


@dataclass
class Opening:
    """What the loop begins with: the run, whether it goes on from before, and what the client changed."""

    record: RunRecord
    resumed: bool
    changes: list[str]
    warnings: list[str]


def read_request(home: Home, instance: str, ident: str) -> requests.Request:
    """The request this supervisor was spawned for, `start` or `stop`; its file is deleted. Raises TrainerdError."""
    path = home.control / f"{ident}.json"
    if path.parent != home.control or not re.fullmatch(r"[A-Za-z0-9-]{1,64}", ident):
        raise UsageError(f"{ident!r} is not the id of a request.")
    if not path.exists():
        raise Refused("The request to start is gone: another supervisor had this home meanwhile.", "Start again.")
    try:
        request = requests.read(path)
    finally:
        files.remove(path)
    if request.verb not in ("start", "stop") or request.instance != instance:
        raise UsageError(f"The request {ident} is not for this supervisor to start or stop something.")
    return request


def open_run(home: Home, arguments: dict[str, Any]) -> Opening:
    """Make or take up the run a start request names, and write its files. Raises TrainerdError or OSError."""
    name = arguments.get("run")
    if not isinstance(name, str) or not runs.valid_name(name):
        raise UsageError(f"{name!r} cannot be the name of a run.", "Use letters, digits, dots, dashes and underscores.")
    paths = home.run(name)
    ground.check(home, name)
    for folder in (home.control, home.logs, paths.folder):
        files.make_folder(folder)  # lasting: what is acknowledged later lies in them
    files.tidy(home.root, STATUS_FILE)
    for folder in (paths.folder, paths.task):
        files.tidy(folder)
    files.tidy(home.control, home.ballast.name)
    resume = bool(arguments.get("resume"))
    if resume:
        record = runs.read(home, name)
        if arguments.get("only_if_wanted") and (record.wanted != runs.WANTED_RUNNING or record.outcome is not None):
            raise Refused(f"The run {name} is not to be brought back: it is {record.outcome or record.wanted} by now.", "")
    elif paths.record.exists():
        raise Refused(f"There is a run {name} already.", "Choose another --name; nothing was changed.")
    else:
        record = RunRecord(name, "", clock.wall(), config={}, identity={})
    if record.outcome is not None or arguments.get("changes"):
        record.not_finite_steps = []  # somebody has looked at it, or changed something: it may go better
    if any(str(change).startswith("train.") for change in arguments.get("changes") or []):
        record.trained = False  # it may have more to do now
    _take_over(record, arguments)
    if arguments.get("mended"):
        warnings = _renew_task(paths, record, Path(str(arguments.get("task_file"))))
    else:
        warnings = _copy_task(paths, record, arguments.get("task_file"))
    record.wanted, record.outcome, record.reason, record.ended_at = runs.WANTED_RUNNING, None, "", None
    runs.write(home, record)
    files.write_atomic(paths.config, to_yaml(record.config).encode("utf-8"), durable=True)
    return Opening(record, resume, [str(change) for change in arguments.get("changes") or []], warnings)


def committed_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder that have a manifest, in order."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
    return sorted(int(match[2]) for match in map(_MANIFEST.fullmatch, names) if match)


def newest_checkpoint(home: Home, run: str) -> dict[str, Any] | None:
    """The newest committed checkpoint of a run as a CHECKPOINT event would tell it, so that its age is known before the first."""
    folder = home.run(run).checkpoints
    try:
        found = [(int(match[2]), path) for path in folder.iterdir() if (match := _MANIFEST.fullmatch(path.name))]
        if not found:
            return None
        path = max(found)[1]
        manifest = files.read_json(path, "The manifest", 1 << 20)
    except (OSError, TrainerdError):
        return None  # the trainer will find it too, and say so
    place = path.with_suffix(".pt").relative_to(home.root).as_posix()
    return {"event": wire.CHECKPOINT, "path": place, **{k: manifest.get(k) for k in ("epoch", "step", "at", "bytes", "seconds")}}


def _take_over(record: RunRecord, arguments: dict[str, Any]) -> None:
    config, identity = arguments.get("config"), arguments.get("identity")
    if config is None and record.config:
        return  # resumed as it was recorded
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise UsageError("The request to start carries no configuration.")
    _check(config)
    record.config, record.task = config, config["task"]
    if isinstance(identity, dict):
        record.identity = identity


def _check(config: dict[str, Any]) -> None:
    """The few values the supervisor itself lives by; the client has checked them all, but a file can be edited."""
    try:
        for name in ("ram_limit", "vram_limit"):
            resolve_limit(str((config.get("memory") or {}).get(name, "auto")), 1)
        if not 0 <= int(config.get("seed") or 0) < 2**32:
            raise ValueError(f"{config['seed']} is not between 0 and 2^32")
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"The configuration cannot be used: {error}.") from None


def _copy_task(paths: RunPaths, record: RunRecord, task_file: Any) -> list[str]:
    """Copy a user's task file into the run, once: restarts use the copy. Returns warnings."""
    if not isinstance(task_file, str):
        return []
    source = Path(task_file)
    content = _read_task(source)
    digest = None if content is None else hashlib.sha256(content).hexdigest()
    if source.name in record.sources:
        if digest == record.sources[source.name]:
            return []
        return [f"{source} has changed since the run began; the run keeps its own copy in {paths.task}. --no-resume takes the new one."]
    if content is None or digest is None:
        raise UsageError(f"{source} is not a file of at most {_MAX_TASK_BYTES:,} bytes.", "Name the task as FILE.py:Class.")
    files.make_folder(paths.task)
    files.write_atomic(paths.task / source.name, content, durable=True)
    record.sources[source.name] = digest
    return []


def _renew_task(paths: RunPaths, record: RunRecord, source: Path) -> list[str]:
    """Take an edited task file over into a run that is trained, and keep what trained it; or the file as it was, whenever it is back.
    Raises Refused."""
    content = _read_task(source)
    digest = None if content is None else hashlib.sha256(content).hexdigest()
    original = digest is not None and digest == record.identity.get("task_source")
    if content is None or source.name not in record.sources or not (record.trained or original):
        raise Refused(f"{source} cannot take the place of the file that the run {record.id} goes on with.", "Begin a new run: --no-resume.")
    kept, current = paths.trained_task / source.name, paths.task / source.name
    if not kept.exists() and not original:
        files.make_folder(paths.trained_task)
        files.write_atomic(kept, current.read_bytes(), durable=True)
    files.write_atomic(current, content, durable=True)
    if original and paths.trained_task.is_dir():
        files.remove(kept)
        paths.trained_task.rmdir()
    record.sources[source.name] = str(digest)
    return []


def _read_task(source: Path) -> bytes | None:
    """What is in a task file; None when it is no file, or too large. What was opened is looked at: the name may change hands."""
    try:
        descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        content = file.read(_MAX_TASK_BYTES + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    return content if content is not None and len(content) <= _MAX_TASK_BYTES else None


def to_yaml(document: dict[str, Any], indent: int = 0) -> str:
    """A configuration as YAML a person can read: one key a line, values as JSON, which YAML 1.2 contains."""
    lines = []
    for key, value in document.items():
        name = " " * indent + (key if _PLAIN_KEY.fullmatch(key) and key not in ("true", "false", "null") else json.dumps(key))
        if isinstance(value, dict) and value:
            lines.append(f"{name}:\n{to_yaml(value, indent + 2)}")
        else:
            lines.append(f"{name}: {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)
