"""The manifest of a checkpoint: what commits it, and vouches for its bytes. Must not import torch or open a state.

It carries a checksum of its own, and is compared as text: a flipped bit in a manifest must be noticed as well. A later format
keeps `schema` and `check` as they are: so one that is newer is told from one that is damaged.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainerd.contract import files
from trainerd.contract.errors import Unreadable

NAME = re.compile(r"checkpoint_epoch_(\d+)_step_(\d+)\.json")
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint is. `best`: the best evaluation so far; `metrics_bytes`: where metrics.jsonl ended."""

    path: Path
    epoch: int
    step: int
    at: float
    bytes: int
    sha256: str
    seconds: float
    best: float | None
    metrics_bytes: int
    about: dict[str, Any] = field(default_factory=dict)
    metrics_sha256: str | None = None
    """Of that much of metrics.jsonl."""
    spent_bytes: float = 0.0
    """What this and earlier checkpoints have used up of checkpoint.max_write_per_day, for the next process."""


_FIELDS = [name for name in Manifest.__dataclass_fields__ if name != "path"]
# Manifests written before these existed are as good.
_LATER_FIELDS = ("metrics_sha256", "spent_bytes")


class BadCheckpoint(Exception):
    """Why one checkpoint cannot be used."""


def order(path: Path) -> tuple[int, int]:
    """Step and epoch in the name of a manifest's file."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a manifest")
    return int(match[2]), int(match[1])


def encode(manifest: Manifest) -> bytes:
    """The content of its file."""
    document: dict[str, Any] = {"schema": files.SCHEMA, "file": manifest.path.name}
    return signed(document | {name: getattr(manifest, name) for name in _FIELDS})


def signed(document: dict[str, Any]) -> bytes:
    """The document as text, with its checksum."""
    content = json.dumps(document, allow_nan=False).encode("ascii")
    return json.dumps({**document, "check": hashlib.sha256(content).hexdigest()}, allow_nan=False, indent=1).encode("ascii") + b"\n"


def read(path: Path) -> Manifest:
    """Raises FileNotFoundError, BadCheckpoint when it is not a whole manifest of the checkpoint it is named after, and Unreadable
    for a whole one of a format that is not known here yet."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise BadCheckpoint("its manifest is not a plain file")
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES)
    step, epoch = order(path)
    expected = {"file": path.with_suffix(".pt").name, "epoch": epoch, "step": step}
    try:
        document = json.loads(content)
        document.pop("check")
        # Compared as text: a flip in the last digit of a number may be the same number.
        whole = signed(document) == content
        if whole and isinstance(schema := document.get("schema"), int) and schema > files.SCHEMA:
            newer = f"The checkpoint {expected['file']} has schema {schema}; this trainerd reads up to {files.SCHEMA}, and leaves it alone."
            raise Unreadable(newer, "Go on with the newer trainerd that wrote it, or begin anew with --no-resume.")
        whole = whole and all(document[key] == value for key, value in expected.items())
        values = {name: document[name] for name in _FIELDS if name in document or name not in _LATER_FIELDS}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, values = False, {}
    if not whole:
        raise BadCheckpoint("its manifest is damaged")
    return Manifest(path=path.with_suffix(".pt"), **values)
