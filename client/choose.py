"""Which run a start is about: an unfinished one of the same identity, or a new one. Must not start or write anything.

Same identity and unfinished: resume it. Other identity: a new run, and that is said. The --name of another run: refused.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainerd.config import catalogue
from trainerd.config.identity import differences, fingerprint, identity, resumed
from trainerd.config.load import Resolved
from trainerd.config.model import RunConfig
from trainerd.contract import runs, status
from trainerd.contract.errors import NothingRunning, Refused, Unreadable
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord

from . import console

_MANIFEST = re.compile(r"checkpoint_epoch_(?P<epoch>\d+)_step_(?P<step>\d+)\.json")
_MORE = "Ask for more, or begin a new run with --no-resume."


@dataclass
class Choice:
    """What the supervisor is asked to run: the arguments of the request `start`, and what to tell the person."""

    run: str
    resume: bool
    config: RunConfig
    identity: dict[str, Any]
    task_file: Path | None
    changes: list[str] = field(default_factory=list)
    told: str = ""
    only_if_wanted: bool = False
    """Refuse when the run is stopped, paused or over by the time the supervisor holds the lock: a revival is no `resume`."""
    warnings: list[str] = field(default_factory=list)
    mended: bool = False
    """Take the task file over into a run that has one: all is trained, and only its export() failed."""

    def arguments(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "resume": self.resume,
            "config": self.config.model_dump(mode="json"),
            "identity": self.identity,
            "task_file": str(self.task_file) if self.task_file else None,
            "changes": self.changes,
            "only_if_wanted": self.only_if_wanted,
            "mended": self.mended,
        }


def choose(home: Home, asked: Resolved, resume: bool) -> Choice:
    """The run for this configuration. Looks at the data up to its first usable row. Raises UsageError, Refused."""
    config = asked.config
    wanted = identity(config, look_at_data(asked), asked.task_file)
    if config.name is not None and _exists(home, config.name):
        return _named(home, config.name, asked, wanted, resume)
    choice = _by_identity(home, asked, wanted, resume)
    if resume:  # one of them may be the run that was meant
        choice.warnings = [f"{error.message} It is left alone, with its checkpoints." for error in runs.damaged(home).values()]
    return choice


def _by_identity(home: Home, asked: Resolved, wanted: dict[str, Any], resume: bool) -> Choice:
    config = asked.config
    unfinished = [record for record in _records(home) if not record.finished]
    same = next((record for record in unfinished if _is_same(record, wanted)), None) if resume and config.name is None else None
    told = ""
    if same is not None:
        forbidden = _forbidden(same, asked) if _never_began(same) else ""
        if not forbidden:
            return _go_on(home, same, asked)
        told = f"A new run: {same.id} failed before its first checkpoint, and goes on only as it was ({forbidden})."
    started = [record for record in unfinished if not _never_began(record)]
    if resume and started and not told:
        latest = started[0]
        unlike = differences(latest.identity, wanted)
        why = "; ".join(unlike[:4]) if unlike else "it has another name"
        told = f"A new run: the unfinished {latest.id} differs ({why}). Go on with that one: {console.program()} resume {latest.id}"
    name = config.name or _new_name(home, config.task)
    return Choice(name, False, config, wanted, asked.task_file, told=told)


def unfinished(home: Home, name: str | None) -> Choice:
    """The unfinished run that was last worked on, or the one named, as it was recorded. Raises NothingRunning, Refused."""
    records = _records(home)
    damaged = runs.damaged(home)
    if name in damaged:
        raise damaged[name]
    if name is not None:
        records = [record for record in records if record.id == name]
        if not records:
            raise NothingRunning(f"There is no run {name!r} in {home.root}.", f"See them with: {console.program()} runs")
        if records[0].finished:
            raise Refused(f"The run {name} is completed: there is nothing to resume.", f"Start a new one: {console.program()} start")
    elif _shown(home) in damaged:
        raise damaged[str(_shown(home))]  # the run that was looked at last: never another one in its place, unasked
    left = [record for record in records if not record.finished]
    record = max(left, key=lambda r: (not _never_began(r), r.id == _shown(home), r.ended_at or r.created_at), default=None)
    if record is None:
        for error in damaged.values():
            raise error
        raise NothingRunning(f"There is no unfinished run in {home.root}.", f"Start one with: {console.program()} start")
    try:
        config = RunConfig.model_validate(record.config)
    except ValueError:
        raise _another_version(record) from None
    warnings = [f"{error.message} It is left alone." for error in damaged.values()] if name is None else []
    return Choice(record.id, True, config, record.identity, None, warnings=warnings)


def look_at_data(asked: Resolved) -> dict[str, Any]:
    """What the data is, after a look up to its first usable row. Raises UsageError when it is not there or holds nothing."""
    if asked.task_file is not None:
        return fingerprint(asked.config.data)
    entry = catalogue.find_task(asked.config.task)
    settings = entry.settings_model.model_validate(asked.config.settings)
    found: dict[str, Any] = entry.data_module.check(asked.config.data, settings)
    return found


def _named(home: Home, name: str, asked: Resolved, wanted: Mapping[str, Any], resume: bool) -> Choice:
    """--name of something that exists: resumed when it is this very run and unfinished, else refused; nothing is ever deleted."""
    other = "Choose another --name."
    try:
        record = runs.read(home, name)
    except (OSError, Unreadable) as error:
        why = f" {error.message}" if isinstance(error, Unreadable) else ""
        message = f"The name {name!r} is taken: there are files of it in {home.root}, without a readable record.{why}"
        raise Refused(message, other) from None
    if not resume:
        raise Refused(f"The name {name!r} is taken by an earlier run; --no-resume begins a new one.", other)
    unlike = differences(record.identity, wanted)
    if unlike and not _is_same(record, wanted):
        raise Refused(f"The run {name} is another one: {'; '.join(unlike)}.", other)
    if record.finished:
        raise Refused(f"The run {name} is completed.", other)
    return _go_on(home, record, asked)


def _go_on(home: Home, record: RunRecord, asked: Resolved) -> Choice:
    try:
        resumption = resumed(record.config, asked.config, asked.explicit)
    except ValueError:
        raise _another_version(record) from None
    if resumption.forbidden:
        raise Refused(
            f"{'; '.join(resumption.forbidden)}: cannot change while the run {record.id} goes on.",
            "Go on without it, or begin a new run with --no-resume.",
        )
    _refuse_the_past(home, record.id, resumption.config)
    mended = asked.task_file is not None and _is_edited(record, asked.task_file)
    if mended and any(change.startswith("train.") for change in resumption.changes):
        message = f"The task file was edited since the run {record.id} was trained, and {'; '.join(resumption.changes)} would train it on."
        raise Refused(message, "Write its result first: start without it. Or begin a new run with --no-resume.")
    changed = f" Changed: {'; '.join(resumption.changes)}." if resumption.changes else ""
    at = f" from step {record.step:,}" if record.step else ""
    told = f"Going on with the unfinished run {record.id}{at}.{changed} (--no-resume begins a new one.)"
    if mended:
        told = f"The run {record.id} is trained: the edited task file only writes its result.{changed} (--no-resume begins a new run.)"
    task_file = asked.task_file if mended else None
    return Choice(record.id, True, resumption.config, record.identity, task_file, resumption.changes, told, mended=mended)


def _forbidden(record: RunRecord, asked: Resolved) -> str:
    """In words, what was asked for that the run cannot go on with; "" also when its record is not of this trainerd."""
    try:
        return "; ".join(resumed(record.config, asked.config, asked.explicit).forbidden)
    except ValueError:
        return ""


def _is_edited(record: RunRecord, task_file: Path) -> bool:
    """Whether the run goes on with another content of the task file."""
    copied = record.sources.get(task_file.name)
    return copied is not None and copied != hashlib.sha256(task_file.read_bytes()).hexdigest()


def _is_same(record: RunRecord, wanted: Mapping[str, Any]) -> bool:
    """Whether a record is of the run that is wanted; once all is trained, the task file may be edited to write the result."""
    if record.identity == wanted:
        return True
    return record.trained and {**record.identity, "task_source": None} == {**wanted, "task_source": None}


def _refuse_the_past(home: Home, run: str, config: RunConfig) -> None:
    """A run that is to end before where it is would be over at once, with a result nobody asked for."""
    names = (_MANIFEST.fullmatch(path.name) for path in home.run(run).checkpoints.glob("checkpoint_*.json"))
    step, epoch = max(((int(name["step"]), -int(name["epoch"])) for name in names if name), default=(0, 0))
    train = config.train
    if train.max_steps is not None and train.max_steps < step:
        raise Refused(f"train.max_steps {train.max_steps} is behind step {step}, which the run {run} has reached.", _MORE)
    if train.epochs < -epoch:
        raise Refused(f"train.epochs {train.epochs} is behind epoch {-epoch} (step {step}), which the run {run} has reached.", _MORE)


def _another_version(record: RunRecord) -> Refused:
    message = f"The configuration recorded for {record.id} is not one this trainerd knows; another version wrote it."
    return Refused(message, "Go on with that version, or begin a new run with --no-resume.")


def _never_began(record: RunRecord) -> bool:
    """It failed before its first checkpoint: going on with it would most likely fail again."""
    return record.outcome == "failed" and record.step is None


def _shown(home: Home) -> str | None:
    """The run that the status is about."""
    shown = status.read(home).status
    return shown.run if shown else None


def _records(home: Home) -> list[RunRecord]:
    """The readable records, newest first."""
    found: list[RunRecord] = []
    for name in reversed(runs.names(home)):
        try:
            found.append(runs.read(home, name))
        except (OSError, Unreadable):
            continue  # deleted or damaged between two looks
    return found


def _exists(home: Home, name: str) -> bool:
    paths = home.run(name)
    return any(path.exists() for path in (paths.folder, paths.checkpoints, paths.model))


def _new_name(home: Home, task: str) -> str:
    """<task>-YYYYMMDD-HHMMSS; a second one within the second gets a number."""
    stem = catalogue.split_file_task(task)[0].stem if catalogue.is_file_task(task) else task
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:40] or "task"
    name = f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}"
    number, free = 2, name
    while _exists(home, free):
        free, number = f"{name}-{number}", number + 1
    return free
