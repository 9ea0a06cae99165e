"""What a trace is of: the name it is kept under, and the settings it is of where nobody said any. Must not trace.

An edited task, or a module of a person's own that it imports, other data or weights of another type have a trace of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainerd.config.model import RunConfig
from trainerd.contract.errors import UsageError
from trainerd.engine import attention, provenance, sources, taskfile
from trainerd.engine.precision import Precision
from trainerd.engine.task import MapDataset, Task
from trainerd.memory import traced


@dataclass(frozen=True)
class Code:
    """What a task's code is: a hash of all of it, and the sha256 of each file that it imports, by path."""

    digest: str
    files: Mapping[str, str]


def code_of(task: Task) -> Code:
    """As it is now; the folders it lies in do not matter."""
    files = sources.imported(type(task))
    whole = [taskfile.source_hash(type(task)), *sorted(f"{Path(path).name} {digest}" for path, digest in files.items())]
    return Code(hashlib.sha256("\n".join(whole).encode()).hexdigest(), files)


def with_settings(config: RunConfig, task: Task) -> RunConfig:
    """The configuration with all of the task's settings, also those that nobody said: `Trainer(Task(settings), ...)` says none in it."""
    try:
        whole = task.settings.model_dump(mode="json")
    except (AttributeError, ValueError):
        return config  # settings of another kind, or that no JSON can hold
    return config.model_copy(update={"settings": whole})


def key(task: Task, model: nn.Module, dataset: MapDataset, config: RunConfig, mixed: Precision, code: Code) -> str:
    """What the trace depends on: the model, the task with its source and settings, what the data are, batch, precision, torch."""
    about: dict[str, Any] = {
        "task": f"{type(task).__module__}:{type(task).__qualname__}",
        "source": code.digest,
        "model": str(model),
        "shapes": [[name, list(p.shape), p.requires_grad, str(p.dtype)] for name, p in model.named_parameters()],
        "buffers": [[name, list(b.shape), str(b.dtype)] for name, b in model.named_buffers()],
        "content": _data_of(task, config),
        "samples": len(dataset),
        "config": config.model_dump(mode="json", include={"settings", "data"}),
        "batch": config.train.batch_size,
        "precision": mixed.name,
        "logits": task.ctx.logits,
        "math": config.train.attention == attention.MATH,
        "torch": str(torch.__version__),
        "format": traced.FORMAT,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]


def defaults(task: Task) -> dict[str, Any]:
    """The task's settings when nobody says anything, so that `plan` knows those from settings that were said; what must be said is left
    out."""
    kind = type(task).Settings
    needed = {name: getattr(task.settings, name) for name, entry in kind.model_fields.items() if entry.is_required()}
    try:
        found: dict[str, Any] = kind.model_validate(needed).model_dump(mode="json", exclude=set(needed))
    except ValueError:
        return {}  # they hold only together with what was set
    return found


def _data_of(task: Task, config: RunConfig) -> dict[str, Any]:
    try:
        return dict(provenance.fingerprint(task, config))
    except (UsageError, OSError):
        return {}
