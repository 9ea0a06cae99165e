"""`runs list|show|delete`: the runs of a home. Must not delete anything of a run that is live, nor anything outside the home."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from trainerd.contract import runs, status
from trainerd.contract.errors import Refused, TrainerdError, Unreadable, UsageError
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord

from .. import console, offers, words
from ..cli import pass_home

_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


@click.group("runs", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> Any:
    """List, show or delete runs. Without a word: list."""
    if context.invoked_subcommand is None:
        return context.invoke(list_runs, as_json=False)
    return None


@command.command("list")
@_JSON
@pass_home
def list_runs(home: Home, as_json: bool) -> None:
    """All runs, oldest first."""
    unread = runs.cannot_be_read(home)
    if unread:
        raise TrainerdError(f"The runs of this home cannot be read: {home.runs}: {unread}.", "Check its owner and permissions.")
    live = _live_run(home)
    found = [(name, _read(home, name)) for name in _names(home)]
    if as_json:
        rows = [{"id": name, "state": _state(record, live, name), **_facts(home, record)} for name, record in found]
        console.say(json.dumps({"schema": 1, "runs": rows}, indent=1))
        return
    if not found:
        console.say(f"There are no runs in {home.root}.")
        return
    for name, record in found:
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created_at)) if record else words.NOT_KNOWN
        step = f"step {words.count(record.step)}" if record and record.step is not None else ""
        console.say(f"{name:<32} {_state(record, live, name):<12} {made:<17} {words.size(_bytes(home, name)):>9}  {step}".rstrip())


@command.command("show")
@click.argument("run", shell_complete=offers.run_names)
@_JSON
@pass_home
def show_run(home: Home, run: str, as_json: bool) -> None:
    """What RUN is, how it stands, and where its files are."""
    record = _existing(home, run)
    state, paths = _state(record, _live_run(home), run), home.run(run)
    if as_json:
        console.say(json.dumps({"schema": 1, "state": state, **(asdict(record) if record else {"id": run})}, indent=1))
        return
    lines = [("run", run), ("state", state)]
    if record is None:
        lines.append(("reason", words.clean(runs.damaged(home).get(run, "It has no record."))))
    else:
        seed = record.config.get("seed")
        lines += [("reason", words.clean(record.reason)), ("task", words.clean(record.task)), ("seed", words.clean(seed))]
        lines += [("step", words.count(record.step)), ("settings", words.clean(json.dumps(record.identity, ensure_ascii=False), 2000))]
    places = (("model", paths.model), ("checkpoints", paths.checkpoints), ("record", paths.folder))
    lines += [(label, f"{place} ({words.size(_size_of(place))})") for label, place in places if place.exists()]
    for label, text in lines:
        console.say(f"{label:<12}{text}")


@command.command("delete")
@click.argument("run", shell_complete=offers.run_names)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_home
def delete_run(home: Home, run: str, yes: bool) -> None:
    """Remove RUN: its record, metrics, checkpoints and model."""
    _existing(home, run)
    if run == _live_run(home):
        raise Refused(f"The run {run} is live.", f"End it first: {console.program()} stop")
    places = [place for place in _places(home, run) if place.exists()]
    for place in places:
        console.say(f"{place} ({words.size(_size_of(place))})")
    if not yes and not click.confirm("Remove these for good?"):
        console.say("Nothing was removed.")
        return
    for place in places:
        try:
            shutil.rmtree(place)
        except OSError as error:
            message = f"{place} could not be removed: {error.strerror or error}."
            raise TrainerdError(message, "Close what holds it, and try again.") from None
    console.say(f"Removed {run}.")


def _places(home: Home, run: str) -> list[Path]:
    """The run's folders; the record goes last, so that an interrupted removal can be repeated."""
    paths = home.run(run)
    return [paths.checkpoints, paths.model, paths.folder]


def _names(home: Home) -> list[str]:
    """Readable runs by age, then those whose record is damaged."""
    known = runs.names(home)
    try:
        found = sorted(p.name for p in home.runs.iterdir() if p.is_dir() and runs.valid_name(p.name))
    except OSError:
        found = []
    return [*known, *(name for name in found if name not in known)]


def _existing(home: Home, run: str) -> RunRecord | None:
    if not runs.valid_name(run) or run not in _names(home):
        from trainerd.config.nearest import nearest

        close = nearest(run, _names(home))
        message = f"There is no run {run!r} in {home.root}{f'; did you mean {close!r}?' if close else '.'}"
        raise UsageError(message, f"`{console.program()} runs` lists them.")
    return _read(home, run)


def _read(home: Home, run: str) -> RunRecord | None:
    try:
        return runs.read(home, run)
    except (OSError, Unreadable):
        return None


def _state(record: RunRecord | None, live: str | None, name: str) -> str:
    if name == live:
        return "live"
    if record is None:
        return "damaged"
    return record.outcome or ("paused" if record.wanted == runs.WANTED_PAUSED else "unfinished")


def _live_run(home: Home) -> str | None:
    reading = status.read(home)
    return reading.status.run if reading.alive and reading.status else None


def _facts(home: Home, record: RunRecord | None) -> dict[str, Any]:
    if record is None:
        return {}
    return {"task": record.task, "created_at": record.created_at, "step": record.step, "bytes": _bytes(home, record.id)}


def _bytes(home: Home, run: str) -> int:
    return sum(_size_of(place) for place in _places(home, run))


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # pruned between two looks
    return total
