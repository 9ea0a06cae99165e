"""The task protocol: the whole surface a user writes. Must not know the loop, checkpoints, memory or the supervisor.

A task brings one model, its data and its loss; the engine does the rest, the same for built-in tasks and a user's file:

    class MyTask(Task):
        Settings = MySettings                     # a pydantic model; optional
        def model(self): return nn.Linear(4, 2)
        def dataset(self, split): ...             # "train" or "eval"; map-style: len() and [i]
        def counts(self, batch): return {"loss": len(batch["y"])}
        def loss(self, model, batch, ctx): return {"loss": (summed, 1.0)}, {}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from trainerd.config.model import DataConfig
from trainerd.memory.timeline import Table

Batch: TypeAlias = Any
Losses: TypeAlias = Mapping[str, tuple[Tensor, float]]
Item = TypeVar("Item")
Made = TypeVar("Made")


class NoSettings(BaseModel):
    """The settings of a task that has none."""

    model_config = ConfigDict(extra="forbid")


class MapDataset(Protocol):
    """A map-style dataset. An attribute `lengths` (array of int, one per sample) saves the engine measuring them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass
class PrepareContext:
    """What prepare() may use. It runs in a process of its own, so that its memory returns to the person."""

    cache_dir: Path
    """Keyed by the content of data, settings and task source; what is written here is found again next time."""
    data: DataConfig
    seed: int
    device: str
    progress: Callable[[int, int | None, str], None]
    """progress(done, total, unit): shown in the status like training; raises nothing."""
    report_data: Callable[[int, int, Mapping[str, int]], None]
    """report_data(rows, used, {reason: dropped}): shown in the status and the log."""


@dataclass
class TaskContext:
    """What the task may know while it trains. The engine updates step, epoch and sample_ids before every loss()."""

    device: torch.device
    dtype: torch.dtype
    """The autocast dtype: torch.float32 when there is none."""
    seed: int
    cache_dir: Path
    data: DataConfig
    step: int = 0
    epoch: int = 0
    sample_ids: Sequence[int] = field(default_factory=list)
    """Dataset indices of the samples in this micro-batch, in batch order."""
    training: bool = True
    logits: str = "chunked"
    """chunked or full: how the plan wants a loss over many words to be made; see engine/chunked.py's linear_cross_entropy."""

    def pulse(self) -> None:
        """Call it now and then in a long evaluate(): it raises when the run has been asked to leave. The evaluation is then
        done again after the resume."""

    def in_parts(self, items: Sequence[Item], at_once: int, work: Callable[[Sequence[Item]], Sequence[Made]]) -> list[Made]:
        """work() over all items of an evaluate(), so many at once; with a pulse() before each part. A part that runs out of memory is
        done again with half as many, and so are those after it, now and in later evaluations: what it makes of an item must not depend
        on how many come together."""
        made: list[Made] = []
        for start in range(0, len(items), at_once):
            self.pulse()
            made += work(items[start : start + at_once])
        return made

    def generator(self, sample_id: int) -> torch.Generator:
        """A CPU generator for randomness inside one sample: a pure function of (seed, epoch, sample_id)."""
        key = (self.seed * 0x9E3779B97F4A7C15 + self.epoch * 0xBF58476D1CE4E5B9 + sample_id * 0x94D049BB133111EB) & (2**63 - 1)
        return torch.Generator().manual_seed(key)


class Task:
    """Base of every task. Required: model, dataset, counts, loss. The rest has defaults."""

    Settings: ClassVar[type[BaseModel]] = NoSettings
    splittable: ClassVar[bool] = True
    """False when the loss depends on which samples share a forward pass (BatchNorm, in-batch negatives)."""
    best_metric: ClassVar[str] = "loss"
    """The evaluation's value that decides which checkpoint is best; lower is better."""
    tokens: ClassVar[str | None] = None
    """The name in counts() that counts tokens, for the speed shown; None: there are none."""
    reads_data: ClassVar[bool] = True
    """False: after prepare() the task reads only what is in cache_dir. Then a run goes on from there when data.path has changed or
    is gone; otherwise it stops and says so."""
    sometimes_unused: ClassVar[tuple[str, ...]] = ()
    """Names, or patterns like "experts.*", of trainable weights that some batches do not use. Any other without a gradient after the
    first backward pass stops the run: it would never be learned."""
    frozen_source: ClassVar[str] = ""
    """Where frozen weights come from, for people: they are in no checkpoint, only their sha256 is."""

    ctx: TaskContext

    def __init__(self, settings: BaseModel | Mapping[str, Any] | None = None) -> None:
        self.settings: Any = settings if isinstance(settings, BaseModel) else self.Settings.model_validate(dict(settings or {}))

    def bind(self, ctx: TaskContext) -> None:
        """Called once, after prepare() and before anything else, in the process that trains (and in loader workers' parent)."""
        self.ctx = ctx

    def prepare(self, ctx: PrepareContext) -> None:
        """Read, clean, tokenise, cache: once per content of cache_dir. May be long; must be resumable or quick to redo."""

    def model(self) -> nn.Module:
        """A freshly initialised model on the CPU, in float32. The engine has seeded torch before, and moves it after."""
        raise NotImplementedError

    def dataset(self, split: str) -> MapDataset | None:
        """The samples of "train" or "eval"; None when there is nothing held out."""
        raise NotImplementedError

    def collate(self, samples: Sequence[Any]) -> Batch:
        """A micro-batch from samples; by default torch's default_collate."""
        return torch.utils.data.default_collate(list(samples))

    def length(self, sample: Any) -> int:
        """The size by which samples are bucketed; 0 for all means: no buckets."""
        return 0

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """For every name loss() returns, how many items (tokens, samples, boxes) it sums over. Called before the forward."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch, ctx: TaskContext) -> tuple[Losses, Mapping[str, float | Tensor]]:
        """({name: (sum over the micro-batch, weight)}, metrics). The engine minimises the sum over names of weight * sum / N,
        N being counts() over the whole step."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, ctx: TaskContext, losses: Mapping[str, float]) -> dict[str, float]:
        """Values for the status and metrics. `losses` holds sum / N per name over the eval split, and their weighted total as
        "loss"; the model is in eval mode, without gradients. By default just the losses."""
        return dict(losses)

    def memory_table(self) -> Table | None:
        """The model's memory table, when the task brings one (its blocks.py); None: the engine traces the model once."""
        return None

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The model's repeated layers, whose activations may be computed again on the way back when memory is short (see
        train.activation_checkpointing); none inside another. What a block draws at random must come from torch or from SampleDropout."""
        return ()

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]] | None:
        """Optimizer groups (each {"params": [...], optional lr_scale, weight_decay}); None: the engine's own."""
        return None

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write what a user of the model needs beside model.safetensors (vocabularies, configuration). Paths stay inside folder."""
