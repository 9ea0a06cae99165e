"""run.json: what a run is, what is wanted of it, and how it ended. Must not decide whether to resume: it only tells.

The supervisor writes it, fsynced; `wanted` survives kills and reboots.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from trainerd.contract import files
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home

WANTED_RUNNING, WANTED_PAUSED, WANTED_STOPPED = "running", "paused", "stopped"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_START_NEW = "Start a new run with --no-resume."
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
    slowest: dict[str, float] = field(default_factory=dict)
    """The longest time without a sign of life of a trainer that went on, by phase: what limits of silence are learned from."""

    @property
    def finished(self) -> bool:
        return self.outcome == "completed"


def valid_name(name: str) -> bool:
    """Whether a run may be called so: it becomes a folder name on every system."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(".") and not _RESERVED_ON_WINDOWS.fullmatch(name)


def write(home: Home, record: RunRecord) -> None:
    """Replace run.json, durably. Raises OSError."""
    paths = home.run(record.id)
    paths.folder.mkdir(parents=True, exist_ok=True)
    files.write_json(paths.record, {"schema": files.SCHEMA, **asdict(record)}, durable=True)


def read(home: Home, name: str) -> RunRecord:
    """The record of a run. Raises FileNotFoundError when there is none, Unreadable when it is damaged."""
    path = home.run(name).record
    document = files.read_json(path, f"The record of run {name}")
    known = {f.name for f in fields(RunRecord)}
    try:
        record = RunRecord(**{k: v for k, v in document.items() if k in known})
    except TypeError:
        raise Unreadable(f"The record of run {name} at {path} is damaged: a part is missing.", _START_NEW) from None
    if not isinstance(record.config, dict) or not isinstance(record.identity, dict) or record.id != name:
        raise Unreadable(f"The record of run {name} at {path} is damaged.", _START_NEW)
    return record


def names(home: Home) -> list[str]:
    """The runs of a home, oldest first by the time their record was created."""
    found: list[tuple[float, str]] = []
    try:
        folders = [p for p in home.runs.iterdir() if valid_name(p.name)]
    except OSError:
        return []
    for folder in folders:
        try:
            found.append((read(home, folder.name).created_at, folder.name))
        except (OSError, Unreadable):
            continue
    return [name for _, name in sorted(found)]
