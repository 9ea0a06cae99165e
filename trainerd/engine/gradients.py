"""Whether everything that is to be learned is: after the first backward pass every trainable weight has a gradient. Must not step.

A weight without one is never learned, and nobody is told: a part of the model that loss() does not reach, or a library that has
moved weights away from under autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from trainerd.contract.errors import UsageError
from trainerd.engine.task import Task

_SHOWN = 8


def refuse_missing(model: nn.Module, task: Task, trained: Sequence[nn.Parameter], gradients: Sequence[object]) -> None:
    """Raise UsageError when a weight of `trained` has None for its gradient, and the task does not say that this may be."""
    names = {id(p): name for name, p in model.named_parameters()}
    missing = [names.get(id(p), "a weight that is not in the model") for p, grad in zip(trained, gradients, strict=True) if grad is None]
    missing = [name for name in missing if not any(fnmatchcase(name, pattern) for pattern in task.sometimes_unused)]
    if not missing:
        return
    shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    raise UsageError(
        f"After the first backward pass {len(missing)} of {len(trained)} trainable weights have no gradient: {shown}.",
        "They would never be learned. Let loss() use them, freeze them with requires_grad_(False), or, if only some batches use them, "
        "name them in the task's sometimes_unused.",
    )
