"""What makes a run this run and no other, how two of them differ, and what of a run may change when it is resumed.

Must not look for runs, nor decide what to do about a difference.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainerd.config.model import DataConfig, RunConfig
from trainerd.contract.errors import UsageError, remedy

# What may change while a run goes on; everything else that was set and differs is refused, never silently ignored.
_MAY_CHANGE = ("train.epochs", "train.max_steps", "train.lr", "train.scheduler", "log.", "polite.", "memory.", "checkpoint.", "faults.")
_FIXED = ("memory.logits",)  # the plan of the run has decided it: another would give other last bits
_LABELS = ("task", "preset", "name", "data.path")  # the identity and the run's name speak for these
_EDGE_BYTES = 1 << 20
_NOT_OF_THE_MODEL = ("seed", "batch_size", "optimizer", "data", "settings")


def identity(config: RunConfig, fingerprint: Mapping[str, Any], task_file: Path | None = None) -> dict[str, Any]:
    """The identity of a run: JSON values only. `fingerprint` is what the task's data.check() (or fingerprint()) returned.

    A person's own task counts by its name and its content, not by its folder: an edited task is another task.
    """
    task = config.task
    found: dict[str, Any] = {}
    if task_file is not None:
        task = f"{task_file.name}:{config.task.rpartition(':')[2]}"
        found["task_source"] = hashlib.sha256(task_file.read_bytes()).hexdigest()
    data = {"size": config.data.size, "eval_fraction": config.data.eval_fraction, "columns": dict(config.data.columns)}
    return {
        "task": task,
        **found,
        "settings": config.model_dump(mode="json")["settings"],
        "data": {**data, **fingerprint},
        "seed": config.seed,
        "batch_size": config.train.batch_size,
        "optimizer": config.train.optimizer,
    }


def model_of(identity: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What of an identity the model's size depends on; of the data, the columns. A setting that is set to its default (`defaults`, as far
    as they are known) is as one that is not set."""
    settings, data = identity.get("settings"), identity.get("data")
    given = flat(settings) if isinstance(settings, Mapping) else {}
    columns = data.get("columns") if isinstance(data, Mapping) else None
    chosen = {name: value for name, value in identity.items() if name not in _NOT_OF_THE_MODEL}
    return {**chosen, "settings": {**flat(defaults), **given}, "columns": columns}


def fingerprint(data: DataConfig) -> dict[str, Any]:
    """What data.path holds, for a task without a data.py of its own: kind, size and a hash. Raises UsageError when it is not there.

    A large file is known by its size, its beginning and its end: `start` must not read gigabytes.
    """
    if data.path is None:
        return {"kind": "own"}
    path = Path(data.path)
    try:
        if path.is_dir():
            return {"kind": "folder", **_folder(path)}
        size = path.stat().st_size
        with open(path, "rb") as file:
            found = hashlib.sha256(file.read(_EDGE_BYTES))
            file.seek(max(_EDGE_BYTES, size - _EDGE_BYTES))
            found.update(file.read(_EDGE_BYTES))
    except FileNotFoundError:
        raise UsageError(f"The data {path} does not exist.", "Name a file or folder with --data.") from None
    except OSError as error:
        raise UsageError(f"The data {path} cannot be read: {error.strerror or error}.", remedy(error)) from None
    if size == 0:
        raise UsageError(f"The data {path} is empty.", "Name a file or folder with --data.")
    return {"kind": "file", "size_bytes": size, "edges_sha256": found.hexdigest()}


def _folder(folder: Path) -> dict[str, Any]:
    """Names and sizes of the files below a folder, as one hash."""
    total, listing = 0, []
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root) / name
            size = path.stat().st_size
            total += size
            listing.append(f"{path.relative_to(folder).as_posix()}\0{size}\n")
    if not listing:
        raise UsageError(f"The data folder {folder} is empty.", "Name a file or folder with --data.")
    content = "".join(listing).encode("utf-8", "surrogateescape")
    return {"size_bytes": total, "num_files": len(listing), "listing_sha256": hashlib.sha256(content).hexdigest()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words, how two identities differ, e.g. "data.size 5000 -> 10000". Empty when they are the same."""
    before, after = flat(old), flat(new)
    keys = [*before, *(key for key in after if key not in before)]
    said: list[str] = []
    for key in keys:
        if before.get(key) == after.get(key):
            continue
        if key.endswith("sha256") or key == "task_source":
            said.append("the task file was edited" if key == "task_source" else "the data has other content")
        else:
            said.append(f"{key} {_shown(before.get(key))} -> {_shown(after.get(key))}")
    return list(dict.fromkeys(said))


@dataclass
class Resumption:
    """How a recorded configuration goes on: the configuration, what changes (in words), and what may not (in words)."""

    config: RunConfig
    changes: list[str] = field(default_factory=list)
    forbidden: list[str] = field(default_factory=list)


def resumed(recorded: Mapping[str, Any], asked: RunConfig, explicit: Iterable[str]) -> Resumption:
    """The recorded configuration with those of the explicitly asked values that may change during a run.

    What was not set explicitly stays as recorded: `start` again, without words, goes on as before. The same data in another
    place (the identity has compared them) is read from there.
    """
    document = RunConfig.model_validate(recorded).model_dump(mode="json")
    old, new = flat(document), flat(asked.model_dump(mode="json"))
    found = Resumption(asked)
    for key in sorted(explicit):
        if key == "data.path" and old.get(key) is not None and new[key] not in (None, old[key]):
            document["data"]["path"] = new[key]
            found.changes.append(f"data.path {old[key]} -> {new[key]}")
        if key in _LABELS or key not in new or old.get(key) == new[key]:
            continue
        words = f"{key} {_shown(old.get(key))} -> {_shown(new[key])}"
        if not key.startswith(_MAY_CHANGE) or key in _FIXED:
            found.forbidden.append(words)
            continue
        *sections, name = key.split(".")
        place = document
        for section in sections:
            place = place[section]
        place[name] = new[key]
        found.changes.append(words)
    found.config = RunConfig.model_validate(document)
    return found


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested sections by dotted key; an empty section is a leaf."""
    leaves: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flat(value, f"{prefix}{name}."))
        elif not isinstance(value, Mapping):
            leaves[f"{prefix}{name}"] = value
    return leaves


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
