"""Whether data.path still holds what a run began with. Must not read rows, prepare them, or import torch.

The fingerprint is the one `start` has put into the run's identity; here it is taken again before anything is read for a run
that has one, and once more afterwards. So a file that was changed between stop and resume, or while it was read, is named.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainerd.config import catalogue, identity
from trainerd.config.model import DataConfig, RunConfig
from trainerd.contract.errors import UsageError

if TYPE_CHECKING:
    from trainerd.engine.task import Task

Fingerprint = Mapping[str, Any]
# Of an identity's data: what was chosen of it, not what it is.
_CHOSEN = ("size", "eval_fraction", "columns")
_LABELS = {"size_bytes": "its size in bytes was {0:,} and is {1:,}", "num_files": "it had {0:,} files and has {1:,}"}
_WHAT_TO_DO = "Put the old data back and resume, or begin a new run with: start --no-resume"


def of_identity(identity: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint in a run's identity; empty for a run that was recorded without one."""
    data = identity.get("data")
    return {name: value for name, value in data.items() if name not in _CHOSEN} if isinstance(data, Mapping) else {}


def fingerprint(task: Task, config: RunConfig) -> Fingerprint:
    """What data.path holds now, as `start` would find it. Raises UsageError when nothing usable is there."""
    kind = f"{type(task).__module__}:{type(task).__qualname__}"
    entry = next((entry for entry in catalogue.BUILTIN.values() if entry.task == kind), None)
    if entry is None:
        return identity.fingerprint(config.data)
    found: Fingerprint = entry.data_module.check(config.data, task.settings)
    return found


def difference(task: Task, config: RunConfig, recorded: Fingerprint) -> str:
    """In words, how the data differs from the recorded one; "" when it does not."""
    if not recorded:
        return ""
    try:
        found = fingerprint(task, config)
    except UsageError as error:
        return error.message.rstrip(".")
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    said = [_in_words(name, value, found[name]) for name, value in recorded.items() if name in found and found[name] != value]
    return "; ".join(said)


def check(task: Task, config: RunConfig, recorded: Fingerprint) -> None:
    """Raises UsageError, which no restart mends, when the data is not the recorded one."""
    why = difference(task, config, recorded)
    if why:
        raise UsageError(f"The data {config.data.path} is not what this run began with: {why}.", _WHAT_TO_DO)


def stamp(data: DataConfig) -> str:
    """Another text whenever a file of the data was written, replaced, added or removed, even with the same content.

    For telling within one boot whether two looks were at the same thing; not for comparing with a copy.
    """
    if data.path is None:
        return "own"
    root = Path(data.path)
    digest = hashlib.sha256()
    for path in [root, *sorted(root.rglob("*"))] if root.is_dir() else [root]:
        try:
            seen = os.stat(path)
        except OSError as error:
            digest.update(f"{path}\0{error.errno}\n".encode("utf-8", "surrogateescape"))
            continue
        about = (seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino)
        digest.update(f"{path}\0{about}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _in_words(name: str, before: Any, now: Any) -> str:
    if name.endswith("sha256"):
        return f"its content was changed (sha256 {str(before)[:12]}…, now {str(now)[:12]}…)"
    if name in _LABELS and isinstance(before, int) and isinstance(now, int):
        return _LABELS[name].format(before, now)
    return f"its {name} was {before} and is {now}"
