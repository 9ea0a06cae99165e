"""The selftest's verdict in words a person understands. Must not run anything: it gets a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import words

Document = Mapping[str, Any]


def lines(verdict: Document, kept: str | None) -> list[str]:
    """The whole answer; `kept` is the folder that was not removed."""
    said = [_failed(verdict) if verdict["problem"] else _held(verdict)]
    if not verdict["problem"]:
        if not verdict["exact"]:
            said.append(f"The trainer itself does not call it exact: {words.clean(verdict['because'])}.")
        if not verdict["forked"]:
            said.append("Every life was started from nothing, which takes seconds: hence so few kills. --kills N does more.")
    if verdict["gpu"]:
        said.append(_gpu(verdict["gpu"]))
    if kept:
        said.append(f"Everything it did is in {kept}" + ("; add it to a bug report." if not verdict["passed"] else "."))
    return said


def _held(verdict: Document) -> str:
    what = f"{_kills(verdict)} and {_number(verdict['damaged'], 'damaged checkpoint')} in {words.duration(verdict['seconds'])}"
    return f"{what}: nothing lost, the result is identical to the last bit."


def _kills(verdict: Document) -> str:
    inside, kills = verdict["inside_commit"], _number(verdict["kills"], "kill")
    return f"{kills} ({inside} inside a commit)" if inside else kills


def _failed(verdict: Document) -> str:
    after = f"after {_kills(verdict)} and {_number(verdict['damaged'], 'damaged checkpoint')}, seed {verdict['seed']}"
    return f"FAILED {after}: {words.clean(verdict['problem'])}."


def _gpu(gpu: Document) -> str:
    name = words.clean(gpu["name"])
    if not gpu["tested"]:
        return f"The GPU {name} was not tested: {words.clean(gpu['why']).rstrip('.')}."
    if gpu["problem"]:
        return f"FAILED on the GPU {name}, after {_kills(gpu)}: {words.clean(gpu['problem'])}."
    if gpu["bit_exact"]:
        return f"The GPU {name} is bit-exact: {_kills(gpu)} there, identical to the last bit."
    return f"The GPU {name} is not bit-exact, and the trainer says so ({words.clean(gpu['why'])}): nothing was lost, the last bits differ."


def progress(event: Document) -> str:
    """What is going on, for the line beside the bar."""
    where = " on the GPU" if event.get("gpu") else ""
    if event["phase"] == "undisturbed":
        return f"an undisturbed run{where}, to compare with"
    if event["phase"] == "again":
        return f"a second undisturbed run{where}"
    inside, damaged = event["inside_commit"], event["damaged"]
    return f"{_number(event['kills'], 'kill')}{where}, {inside} inside a commit, {_number(damaged, 'damaged checkpoint')}"


def _number(number: int, what: str) -> str:
    return f"{words.count(number)} {what}{'' if number == 1 else 's'}"
