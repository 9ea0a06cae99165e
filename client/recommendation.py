"""A configuration for this machine and a task: what was asked for, with what the planner chooses for it. Must not start anything.

What was left to "auto" and is chosen here is written down; what only the trainer can know stays "auto".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainerd.config import yaml12
from trainerd.config.identity import flat
from trainerd.config.load import Resolved
from trainerd.contract import files
from trainerd.contract.errors import TrainerdError
from trainerd.memory import planner
from trainerd.memory.techniques import TECHNIQUES

from .outlook import Outlook, Unknown, knows_precision
from .words import count, sizes

_LABELS = ("name",)  # a name is one run's; the file is for many
_NOT_BEFORE = "left to the trainer: the model is looked at when its first training starts"


@dataclass(frozen=True)
class Recommendation:
    """The document to write, and for each chosen key its value and why."""

    document: dict[str, Any]
    reasons: tuple[tuple[str, str, str], ...]
    verdict: str | None


def recommend(asked: Resolved, found: Outlook | Unknown) -> Recommendation:
    """What was set stays; the plan's choices are added."""
    values: dict[str, Any] = {"task": asked.config.task}
    everything = flat(asked.config.model_dump(mode="json"))
    for key in sorted(asked.explicit - set(_LABELS)):
        if key in everything:
            values[key] = everything[key]
    reasons = [(key, _text(values[key]), "as you asked") for key in values if key in asked.explicit and key not in ("task", "preset")]
    chosen = [] if isinstance(found, Unknown) else _chosen(asked, found)
    for key, value, why in chosen:
        values[key] = value
        reasons.append((key, _text(value), why))
    if isinstance(found, Unknown) and "train.micro_batch" not in asked.explicit:
        reasons.append(("train.micro_batch", "auto", _NOT_BEFORE))
    verdict = None if isinstance(found, Unknown) else found.answer.verdict
    return Recommendation(_nested(values), tuple(reasons), verdict)


def _chosen(asked: Resolved, found: Outlook) -> list[tuple[str, Any, str]]:
    """(key, value, why) of what the planner chose and the person did not."""
    setup, answer = found.answer.setup, found.answer
    most, left = sizes(answer.estimate.needed.upper, max(0, answer.budget_bytes))
    room = f"{most} at most, {left} left"
    chosen: list[tuple[str, Any, str]] = []
    if asked.config.train.micro_batch == "auto":
        pieces = setup.micro_batch if setup.accumulation > 1 else asked.config.train.batch_size  # that may have more than the data
        if setup.accumulation == 1:
            why = f"the whole batch at once: {room}"
        else:
            why = f"the batch of {count(setup.effective_batch)} in {count(setup.accumulation)} pieces: {room}"
        chosen.append(("train.micro_batch", pieces, why))
    if asked.config.train.precision == "auto" and knows_precision(found.place):
        chosen.append(("train.precision", setup.precision, f"what {found.where} is fast in"))
    known = {key for key, _, _ in chosen}
    for technique in TECHNIQUES:
        if technique.name in answer.used and technique.key not in known:
            key, _, value = technique.setting(setup).partition("=")
            chosen.append((key, yaml12.parse(value, key), f"{technique.price} ({technique.kind})"))
    return chosen


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, name = dotted.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return document


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write(path: Path, found: Recommendation) -> Path | None:
    """Put the document there; another one that was there is kept beside it, and its new name returned. Raises TrainerdError."""
    content = (json.dumps(found.document, indent=2) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.refuse_links(path.parent, path)
        kept = _kept_aside(path, content)
        files.write_atomic(path, content)
    except OSError as error:
        message = f"The configuration cannot be written to {path}: {error.strerror or error}."
        raise TrainerdError(message, "Name another --home, or make room.") from None
    return kept


def _kept_aside(path: Path, content: bytes) -> Path | None:
    try:
        if path.read_bytes() == content:
            return None
    except FileNotFoundError:
        return None
    number = 1
    while (aside := path.with_name(f"{path.stem}.before-{number}{path.suffix}")).exists():
        number += 1
    files.replace(path, aside)
    return aside


def fits(found: Recommendation) -> bool:
    """Whether there is anything to recommend."""
    return found.verdict != planner.TOO_LARGE
