"""Says in words what a task's method has returned in place of what it must. Must not be asked before something has failed.

A right return costs nothing: each of these looks only after an error, and gives None when the return was not the reason for it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainerd.contract.errors import UsageError
from trainerd.engine.task import Task

WRONG = (TypeError, ValueError, AttributeError)
"""What a value of another kind leads to, where it is taken apart."""
_LOSS = "It must return ({name: (sum, weight)}, metrics): each sum a tensor, each weight a number, metrics a dict of numbers or {}."
_COUNTS = "It must return {name: N}: for each name that loss() uses, how many of its units are in the batch."
_VALUES = "It must return a dict of numbers: the values it was given, and what it adds."


def by_loss(task: Task, given: Any) -> UsageError | None:
    """Of loss()."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return _error(task, "loss()", _seen(given), _LOSS)
    losses, metrics = given
    said = _wrong_losses(losses)
    if said is None:
        said = _wrong_numbers(metrics, "as metrics", "as the metric {!r}")
    return _error(task, "loss()", said, _LOSS) if said else None


def by_counts(task: Task, given: Any) -> UsageError | None:
    """Of counts()."""
    said = _wrong_numbers(given, "", "for {!r}")
    return _error(task, "counts()", said, _COUNTS) if said else None


def by_evaluate(task: Task, given: Any) -> UsageError | None:
    """Of evaluate()."""
    said = _wrong_numbers(given, "", "for {!r}")
    return _error(task, "evaluate()", said, _VALUES) if said else None


def _wrong_losses(losses: Any) -> str | None:
    if not isinstance(losses, Mapping):
        return f"{_seen(losses)} as its losses"
    for name, part in losses.items():
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            return f"{_seen(part)} for the loss {name!r}"
        if not isinstance(part[0], Tensor):
            return f"{_seen(part[0])} as the sum of the loss {name!r}"
        if not _is_number(part[1]):
            return f"{_seen(part[1])} as the weight of the loss {name!r}"
    return None


def _wrong_numbers(values: Any, whole: str, one: str) -> str | None:
    if not isinstance(values, Mapping):
        return f"{_seen(values)} {whole}".rstrip()
    for name, value in values.items():
        if not _is_number(value):
            return f"{_seen(value)} {one.format(name)}"
    return None


def _is_number(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.numel() == 1) or (hasattr(value, "__float__") and not isinstance(value, Tensor))


def _seen(value: Any) -> str:
    """A value as a person may know it again, however large it is."""
    if value is None:
        return "nothing (None)"
    if isinstance(value, Tensor):
        return f"a tensor of the shape {list(value.shape)}"
    if isinstance(value, (tuple, list, dict, set)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _error(task: Task, method: str, said: str, must: str) -> UsageError:
    return UsageError(f"{method} of {type(task).__name__} returned {said}.", must)
