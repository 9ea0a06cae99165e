"""run.json: what a run is, what is wanted of it, and how it ended. Must not decide whether to resume: it only tells.

The supervisor writes it, fsynced; `wanted` survives kills and reboots.
"""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from trainerd.contract import files
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home

WANTED_RUNNING, WANTED_PAUSED, WANTED_STOPPED = "running", "paused", "stopped"
_LATEST = 1e11
"""The year 5138: what lies beyond is no time, and time.localtime() would raise."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_LEFT_ALONE = "It stays as it is, with its checkpoints; begin a new run with: start --no-resume"
_RESERVED_ON_WINDOWS = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


@dataclass
class RunRecord:
    """One run. `outcome` is None while it is unfinished, else completed, stopped or failed with `reason`.

    `config` is the whole resolved configuration, `identity` what makes it this run and no other, `plan` what the trainer
    resolved for this machine (None until it has).
    """

    id: str
    task: str
    created_at: float
    config: dict[str, Any]
    identity: dict[str, Any]
    wanted: str = WANTED_RUNNING
    outcome: str | None = None
    reason: str = ""
    ended_at: float | None = None
    plan: dict[str, Any] | None = None
    sources: dict[str, str] = field(default_factory=dict)
    """sha256 of the user's task files, by name, as copied into the run."""
    step: int | None = None
    """The last acknowledged step, for lists of runs."""
    trained: bool = False
    """All its steps are done and saved, and only the task's own export() failed: an edited task file may still write the result."""
    slowest: dict[str, float] = field(default_factory=dict)
    """The longest time without a sign of life of a trainer that went on, by phase: what limits of silence are learned from."""

    too_large_micro_batch: int | None = None
    """The smallest micro-batch with which the system ended a trainer for want of RAM: the next one takes half of it."""

    not_finite_steps: list[int] = field(default_factory=list)
    """Steps at which a number was none, once: the second time at one of them is the end. So that a supervisor's death forgets none."""

    @property
    def finished(self) -> bool:
        return self.outcome == "completed"


def valid_name(name: str) -> bool:
    """Whether a run may be called so: it becomes a folder name on every system."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(".") and not _RESERVED_ON_WINDOWS.fullmatch(name)


def write(home: Home, record: RunRecord) -> None:
    """Replace run.json, durably. Raises OSError."""
    paths = home.run(record.id)
    files.make_folder(paths.folder)
    files.write_json(paths.record, {"schema": files.SCHEMA, **asdict(record)}, durable=True)


def read(home: Home, name: str) -> RunRecord:
    """The record of a run. Raises FileNotFoundError when there is none, Unreadable when it is damaged, naming the part."""
    path = home.run(name).record
    try:
        document = files.read_json(path, f"The record of run {name}", remedy=_LEFT_ALONE)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(f"The record of run {name} at {path} cannot be read: {error.strerror or error}.", _LEFT_ALONE) from None
    values = {entry.name: document[entry.name] for entry in fields(RunRecord) if entry.name in document}
    wrong = next((what for entry in fields(RunRecord) if (what := _wrong(entry, values))), None)
    if wrong is None and values["config"].get("task") != values["task"]:
        wrong = "its configuration names no task, or another one"
    if wrong is None and values["id"] != name:
        wrong = f"it is that of {str(values['id'])[:80]!r}"
    if wrong is not None:
        raise Unreadable(f"The record of run {name} at {path} is damaged: {wrong}.", _LEFT_ALONE)
    return RunRecord(**values)


def damaged(home: Home) -> dict[str, Unreadable]:
    """The runs whose record there is and cannot be used, by name, with why."""
    found: dict[str, Unreadable] = {}
    for name in _folders(home):
        try:
            read(home, name)
        except FileNotFoundError:
            continue  # never written: the start that made the folder was interrupted
        except Unreadable as error:
            found[name] = error
    return found


def _wrong(entry: Field[Any], values: dict[str, Any]) -> str | None:
    """What is wrong with one part of a record; None when nothing is."""
    if entry.name not in values:
        return f"{entry.name!r} is missing" if entry.default is MISSING and entry.default_factory is MISSING else None
    value, allowed = values[entry.name], _ALLOWED.get(entry.name)
    if allowed is not None and value not in allowed:
        return f"{entry.name!r} is {str(value)[:40]!r}"
    if not _fits(str(entry.type), value):
        return f"{entry.name!r} is {str(value)[:40]!r}"
    return None


_ALLOWED: dict[str, tuple[str | None, ...]] = {
    "wanted": (WANTED_RUNNING, WANTED_PAUSED, WANTED_STOPPED),
    "outcome": (None, "completed", "stopped", "failed"),
}


def _fits(declared: str, value: Any) -> bool:
    """Whether a JSON value has the declared kind; a number must be one that clocks and counters can have."""
    if value is None:
        return "None" in declared
    if declared.startswith("str"):
        return isinstance(value, str)
    if declared == "bool":
        return isinstance(value, bool)
    if declared.startswith("int"):
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
    if declared.startswith("float"):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LATEST
    if declared.startswith("list[int]"):
        return isinstance(value, list) and all(_fits("int", item) for item in value)
    texts = declared.startswith("dict[str, str]")
    return isinstance(value, dict) and (not texts or all(isinstance(text, str) for text in value.values()))


def _folders(home: Home) -> list[str]:
    try:
        return sorted(entry.name for entry in home.runs.iterdir() if valid_name(entry.name) and entry.is_dir())
    except OSError:
        return []


def cannot_be_read(home: Home) -> str:
    """Why nobody can say which runs this home has; "" when anybody can."""
    try:
        os.scandir(home.runs).close()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    return ""


def names(home: Home) -> list[str]:
    """The runs of a home, oldest first by the time their record was created."""
    found: list[tuple[float, str]] = []
    for name in _folders(home):
        try:
            found.append((read(home, name).created_at, name))
        except (OSError, Unreadable):
            continue
    return [name for _, name in sorted(found)]
