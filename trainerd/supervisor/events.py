"""What the trainer tells, put into the status. Must not act on it, and trusts no number: JSON has no NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from trainerd.contract import wire
from trainerd.contract.status import Checkpoint, Phase, Status, Unsaved

_Message = Mapping[str, Any]


def apply(status: Status, message: _Message) -> None:
    """Bring the status up to date with one event; events that carry no part of the status change nothing."""
    handler = _HANDLERS.get(str(message.get("event")))
    if handler is not None:
        handler(status, message)


def _phase(status: Status, message: _Message) -> None:
    name = str(message.get("name") or "")
    if not name:
        return
    if status.phase is None or status.phase.name != name:
        status.phase = Phase(name, started_at=_value(message.get("at")))
    _fill(status.phase, message, ("done", "total", "unit"))


def _checkpoint(status: Status, message: _Message) -> None:
    step, epoch, path = message.get("step"), message.get("epoch"), message.get("path")
    if isinstance(step, int) and isinstance(epoch, int) and isinstance(path, str):
        size, at = message.get("bytes"), _value(message.get("at"))
        status.checkpoint = Checkpoint(path, epoch, step, at or 0.0, size if isinstance(size, int) else 0, _value(message.get("seconds")))
        status.progress.step = max(step, status.progress.step or 0)  # progress is told now and then, a checkpoint always
        status.unsaved = Unsaved()  # also what a trainer before this one could not save


def _memory(status: Status, message: _Message) -> None:
    vram = status.memory.vram
    vram.allocated_bytes = _value(message.get("vram_allocated_bytes", vram.allocated_bytes))
    vram.reserved_bytes = _value(message.get("vram_reserved_bytes", vram.reserved_bytes))
    _fill(status.memory, message, ("cleanups", "cleanup_seconds", "oom_recoveries", "predicted_bytes"))


def _part(name: str) -> Callable[[Status, _Message], None]:
    return lambda status, message: _fill(getattr(status, name), message)


def _fill(part: Any, message: _Message, only: tuple[str, ...] | None = None) -> None:
    """Set the fields of a part that the message names and that have the right kind of value."""
    for entry in fields(part):
        if entry.name not in message or (only is not None and entry.name not in only):
            continue
        value, declared = _value(message[entry.name]), str(entry.type)
        if value is None and "None" not in declared:
            continue
        if value is None or _fits(declared, value):
            setattr(part, entry.name, value)


def _fits(declared: str, value: Any) -> bool:
    if isinstance(value, bool):
        return declared.startswith("bool")
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "dict": (dict,)}
    return any(declared.startswith(name) and isinstance(value, kind) for name, kind in kinds.items())


def _value(value: Any) -> Any:
    """The value without what JSON cannot say: a loss that is not a number is unknown."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): v for k, v in ((k, _value(v)) for k, v in value.items()) if v is not None}
    return value


_HANDLERS: dict[str, Callable[[Status, _Message], None]] = {
    wire.PHASE: _phase,
    wire.DATA: _part("data"),
    wire.PLAN: _part("plan"),
    wire.PROGRESS: _part("progress"),
    wire.EXACT: _part("exact"),
    wire.UNSAVED: _part("unsaved"),
    wire.MEMORY: _memory,
    wire.CHECKPOINT: _checkpoint,
}
