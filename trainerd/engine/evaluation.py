"""Evaluates on the held-out split, and remembers the best. Must leave no trace in the training: not in random states, not in modes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from trainerd.contract.errors import UsageError
from trainerd.engine import cleaning, guard, returned, rng
from trainerd.engine.batches import Ids, split
from trainerd.engine.loader import Fetch, move
from trainerd.engine.precision import Precision
from trainerd.engine.step import add_counts, add_metrics, uncounted
from trainerd.engine.task import MapDataset, Task

Shrunk = Callable[[int | None, str, str], None]


class Leaving(Exception):
    """Raised through a task's evaluate() when the run has been asked to leave."""


class Evaluation:
    """When to evaluate, doing it, and what was best. With no held-out samples nothing is ever due."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        precision: Precision,
        dataset: MapDataset | None,
        lengths: Ids | None,
        *,
        batch_size: int,
        every_steps: int | None,
        patience: int | None,
    ) -> None:
        self._task = task
        self._model = model
        self._precision = precision
        self._dataset = dataset
        self._order = np.argsort(lengths, kind="stable").tolist() if lengths is not None else None
        self._every_steps = every_steps
        self._patience = patience
        self.batch_size = batch_size
        self._halvings = 0
        """How often a part of the task's own evaluate() had to be halved."""
        self._is_own = False
        """Whether the task's own evaluate() is at work, which no smaller batch of ours would help."""
        self.last_step = 0
        self.values: dict[str, float] = {}
        self.best: dict[str, float] = {}
        """The values of the best evaluation, with its "step". A value here may be no finite number: see shown()."""
        self.best_value: float | None = None
        self._without_better = 0
        self.seconds: float | None = None
        """How long the last whole one took, in this life."""

    def due(self, step: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Whether the present step is to be evaluated and has not been."""
        if self._dataset is None or step == 0 or step == self.last_step:
            return False
        return step % (self._every_steps or steps_per_epoch) == 0 or step == total_steps

    @property
    def should_stop(self) -> bool:
        """Whether early stopping has had enough."""
        return self._patience is not None and self._without_better >= self._patience

    def run(self, step: int, epoch: int, leaving: Callable[[], bool], shrunk: Shrunk) -> bool | None:
        """Evaluate the model now. True: better than ever; None: asked to leave, and nothing was remembered.

        `shrunk(size, error, what)` hears of an out-of-memory and the smaller batch, or part of what the task does, that it is tried again
        with; None: the same.
        """
        values: dict[str, float] | None = None
        tried_again = False
        while values is None:
            text = ""
            smaller = -(-self.batch_size // 2) if self._task.splittable and self.batch_size > 1 else None
            try:
                with rng.preserved(), self._mode(step, leaving, shrunk):
                    values = self._values(epoch, leaving)
            except Leaving:
                return None
            except (MemoryError, RuntimeError) as error:
                smaller = None if self._is_own else smaller
                if not guard.is_out_of_memory(error) or (smaller is None and tried_again):
                    raise
                text = guard.in_words(error)
            if values is None:
                cleaning.free()
                tried_again = smaller is None
                self.batch_size = smaller or self.batch_size
                shrunk(smaller, text, "its batch")
        return self._remember(step, values)

    def _values(self, epoch: int, leaving: Callable[[], bool]) -> dict[str, float]:
        """sum / N per name over the whole split, their weighted sum as "loss", and what the task adds.

        ctx.epoch is 0 for the losses: what a sample draws by its id is the same in every evaluation.
        """
        assert self._dataset is not None
        fetch, ctx = Fetch(self._task, self._dataset), self._task.ctx
        sums: dict[str, Any] = {}
        weights: dict[str, float] = {}
        counts: dict[str, int] = {}
        metrics: dict[str, Any] = {}
        order = self._order if self._order is not None else list(range(len(self._dataset)))
        for ids in split(order, self.batch_size):
            if leaving():
                raise Leaving
            batch = fetch[0, ctx.step, ids]
            add_counts(self._task, self._task.counts(batch), counts)
            with self._precision.autocast():
                given = self._task.loss(self._model, move(batch, self._precision.device), ctx)
            try:
                losses, more = given
                for name, (value, weight) in losses.items():
                    if name not in counts:
                        raise uncounted(name)
                    sums[name] = sums.get(name, 0.0) + value.detach().double()
                    weights[name] = weight
            except returned.WRONG as error:
                raise returned.by_loss(self._task, given) or error from None
            add_metrics(self._task, more, len(ids), metrics)
            del given
        means = {name: float(value) / max(1, counts[name]) for name, value in sums.items()}
        total = sum(weights[name] * mean for name, mean in means.items())
        means |= {name: float(value) / len(order) for name, value in metrics.items()}
        ctx.epoch = epoch
        self._is_own = True
        with self._precision.autocast():
            values = self._task.evaluate(self._model, ctx, {**means, "loss": total})
        try:
            return {str(name): float(value) for name, value in values.items()}
        except (*returned.WRONG, RuntimeError) as error:
            raise returned.by_evaluate(self._task, values) or error from None

    @contextmanager
    def _mode(self, step: int, leaving: Callable[[], bool], shrunk: Shrunk) -> Iterator[None]:
        """Eval mode without gradients; afterwards each module is as it was."""

        def pulse() -> None:
            if leaving():
                raise Leaving

        ctx, self._is_own = self._task.ctx, False
        ctx.step = step
        training = [module for module in self._model.modules() if module.training]
        for module in training:
            # bitsandbytes repacks a weight for inference when it finds eval mode on a CPU, and cannot train with it again.
            module.training = type(module).__module__.startswith("bitsandbytes")
        ctx.training = False
        ctx.pulse = pulse  # type: ignore[method-assign]
        ctx.in_parts = partial(self._in_parts, pulse, shrunk)  # type: ignore[method-assign]
        try:
            with torch.no_grad():
                yield
        finally:
            ctx.training = True
            del ctx.pulse, ctx.in_parts  # the class's own ask and catch nothing
            for module in training:
                module.training = True

    def _in_parts(
        self, pulse: Callable[[], None], shrunk: Shrunk, items: Sequence[Any], at_once: int, work: Callable[[Sequence[Any]], Sequence[Any]]
    ) -> list[Any]:
        """TaskContext.in_parts(): what is made already stays when a part runs out of memory."""
        made: list[Any] = []
        done, tried_again = 0, False
        while done < len(items):
            number, text = max(1, at_once >> self._halvings), ""
            try:
                pulse()
                made += work(items[done : done + number])
                done += number
            except (MemoryError, RuntimeError) as error:
                if not guard.is_out_of_memory(error) or (number == 1 and tried_again):
                    raise
                text = guard.in_words(error)
            if text:
                cleaning.free()
                tried_again = number == 1
                self._halvings += number > 1
                shrunk(number // 2 or None, text, "what it does at once")
        return made

    def _remember(self, step: int, values: dict[str, float]) -> bool:
        name = self._task.best_metric
        if name not in values:
            raise UsageError(f"evaluate() gave no {name!r}, which decides what is best.", f"It gave: {', '.join(values) or 'nothing'}.")
        value = values[name]
        better = math.isfinite(value) and (self.best_value is None or value < self.best_value)
        self.last_step, self.values = step, values
        self._without_better = 0 if better else self._without_better + 1
        if better:
            self.best_value, self.best = value, {**values, "step": step}
        return better

    def shown(self) -> tuple[dict[str, float | None], dict[str, float | None]]:
        """The last values and the best for status and result: JSON knows no NaN."""
        return _finite(self.values), _finite(self.best)

    def document(self) -> dict[str, Any]:
        """What a resume needs, in plain values."""
        return {
            "last_step": self.last_step,
            "values": dict(self.values),
            "best": dict(self.best),
            "best_value": self.best_value,
            "without_better": self._without_better,
            "batch_size": self.batch_size,
            "halvings": self._halvings,
        }

    def restore(self, document: dict[str, Any]) -> None:
        self.last_step, self.values = document["last_step"], dict(document["values"])
        self.best, self.best_value = dict(document["best"]), document["best_value"]
        self._without_better, self.batch_size = document["without_better"], document["batch_size"]
        self._halvings = document.get("halvings", 0)  # runs of before have none


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
