"""The model families as tasks of the real engine, on a device that has exactly so many bytes for tensors. Must not judge.

Every tensor of a whole training is counted: model, optimizer, the batches of a step, evaluation, the checkpoint's copy. What passes
the budget is an out-of-memory, as an allocator raises it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory.families import Family, family, repeated
from tests.memory_oracle import Budget
from trainerd.config.model import RunConfig
from trainerd.engine.loop import Link, Result
from trainerd.engine.task import Task
from trainerd.engine.trainer import Trainer
from trainerd.memory import estimate, forecast, timeline
from trainerd.memory import tape as tapes
from trainerd.memory.planner import Answer
from trainerd.memory.profile import Profile
from trainerd.memory.timeline import Setup, Timeline

_TYPES = {torch.int64: "int64", torch.float32: "fp32"}
_STEPS = 3  # the second has the first one's checkpoint beside it


class FamilyTask(Task):
    """A family in training: every micro-batch is as large as the largest."""

    def __init__(self, parts: Family, rows: int) -> None:
        super().__init__(None)
        self._parts, self._rows = parts, rows

    def model(self) -> nn.Module:
        return self._parts.model()

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return repeated(model)

    def dataset(self, split: str) -> Any:
        return range(self._rows if split == "train" else 8)

    def collate(self, samples: Any) -> list[Tensor]:
        return self._parts.batch(len(samples))

    def counts(self, batch: list[Tensor]) -> dict[str, int]:
        return {"loss": len(batch[0])}

    def loss(self, model: nn.Module, batch: list[Tensor], ctx: Any) -> Any:
        return {"loss": (model(*batch) * len(batch[0]), 1.0)}, {}


class FamilyTable:
    """The same for the planner. `offers`: what its blocks may compute again."""

    assumed = ()

    def __init__(self, name: str, parts: Family, offers: Sequence[str] = ()) -> None:
        self.kind, self.offers, self._parts = name, tuple(offers), parts

    def timeline(self, setup: Setup) -> Timeline:
        parts = self._parts if setup.checkpointing == "none" else family(self.kind, setup.checkpointing)
        return timeline.of_model(lambda tape: _Built(parts, parts.table(tape)), setup)


class _Built:
    def __init__(self, parts: Family, made: Callable[..., tapes.Tensor]) -> None:
        self._parts, self._made = parts, made

    def micro_batch(self, tape: tapes.Tape, samples: int) -> list[tapes.Tensor]:
        with torch.device("meta"):
            shapes = [(tuple(t.shape), _TYPES[t.dtype]) for t in self._parts.batch(samples)]
        return [tape.input(*shape, dtype=dtype) for shape, dtype in shapes]

    def loss(self, batch: list[tapes.Tensor]) -> tapes.Tensor:
        return self._made(*batch)

    def evaluate(self, tape: tapes.Tape, samples: int, *, worst: bool) -> None:
        return None


class _CountedTape(tapes.Tape):
    def __init__(self, device: str = "cuda", autocast: str | None = None) -> None:
        super().__init__(device, autocast)
        self.adds_in_place = False  # while a dispatch mode counts torch does not


@contextmanager
def counted_tapes() -> Iterator[None]:
    """Estimates follow torch as it is while every tensor is counted, and there is no process beside the tensors."""
    before, timeline.Tape = timeline.Tape, _CountedTape  # type: ignore[misc]
    slack, estimate._PROCESS_SLACK_BYTES = estimate._PROCESS_SLACK_BYTES, 0
    try:
        yield
    finally:
        timeline.Tape, estimate._PROCESS_SLACK_BYTES = before, slack  # type: ignore[misc]


def configuration(batch: int, **train: Any) -> RunConfig:
    base = {"epochs": 1, "batch_size": batch, "max_steps": _STEPS, "precision": "fp32", "threads": 1, **train}
    return RunConfig.model_validate({"task": "family", "name": "family", "train": base, "checkpoint": {"every_steps": 1, "exact": True}})


def plan(table: FamilyTable, config: RunConfig, budget_bytes: int) -> Answer:
    """The planner's answer where tensors may have so many bytes."""
    nothing = Profile(measured=True, process_bytes=0)
    with counted_tapes():
        return forecast.answer(config, forecast.Place("cpu", budget_bytes, "fp32", nothing, chooses_heap=True), table)


def train(parts: Family, config: RunConfig, budget_bytes: int) -> tuple[Budget, Result | None]:
    """The real engine within the budget: what was counted, and the result; None where it gave up."""
    rows = config.train.batch_size * _STEPS
    with tempfile.TemporaryDirectory() as home, Budget(budget_bytes) as count:
        try:
            result: Result | None = Trainer(FamilyTask(parts, rows), config, home=Path(home), link=Link()).train()
        except torch.OutOfMemoryError:
            result = None
    return count, result
