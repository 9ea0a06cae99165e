"""One optimizer step over one window of micro-batches; an out-of-memory costs time, never the step. Must not log or save.

The loss is the sum over names of weight * sum / N, N counted over the whole window before the first backward: so one
micro-batch of 8 gives the gradient of eight of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainerd.contract.errors import TrainerdError
from trainerd.engine import cleaning, guard, returned, rng
from trainerd.engine.loader import Loader, Window, move
from trainerd.engine.metrics import Number
from trainerd.engine.precision import Precision
from trainerd.engine.task import Losses, Task
from trainerd.engine.updates import Updates

# Larger buffers are tables and masks, which a forward pass does not change.
_STATISTICS_BYTES = 1 << 20


@dataclass
class Taken:
    """What one step gave. `loss` and `grad_norm` may still be on the device."""

    epoch: int
    loss: Tensor
    grad_norm: Tensor
    metrics: dict[str, Number]
    num_samples: int
    num_tokens: int


class Stepper:
    """Takes steps with one model and optimizer, from a loader that has been put to its place."""

    def __init__(self, task: Task, model: nn.Module, updates: Updates, precision: Precision, loader: Loader) -> None:
        """`updates`: what becomes of the gradients."""
        self._task = task
        self._model = model
        self._updates = updates
        self._precision = precision
        self._loader = loader
        self._statistics = [b for b in model.buffers() if b.numel() * b.element_size() <= _STATISTICS_BYTES]
        self._statistics_before = [b.clone() for b in self._statistics]
        self._moves = precision.device.type != "cpu"
        self._random_before = rng.take()

    def take(self, lr: float, leaving: Callable[[], bool], shrunk: Callable[[int, str], None]) -> Taken | None:
        """The loader's next step; None when asked to leave in the middle of it, with everything as it was before.

        `leaving` is asked between micro-batches; `shrunk(micro_batch, error)` hears of a smaller micro-batch.
        """
        step, tried_again = self._loader.step, False
        self._remember()
        while True:
            try:
                taken = self._attempt(self._loader.window(), lr, leaving)
                if taken is None:
                    self._undo()
                return taken
            except (MemoryError, RuntimeError) as error:
                # Not of this window's largest: a short one at an epoch's end would cut all that follow to its size.
                micro_batch = self._loader.micro_batch
                smaller = -(-micro_batch // 2) if self._task.splittable and micro_batch > 1 else None
                if not guard.is_out_of_memory(error) or self._updates.is_half_done() or (smaller is None and tried_again):
                    raise
                text = guard.in_words(error)
            # Out of the except block: its frames held the tensors that are to be freed.
            self._undo()
            cleaning.free()
            tried_again = smaller is None
            self._loader.seek(step, smaller or micro_batch)
            shrunk(smaller or micro_batch, text)

    def put_back(self) -> bool:
        """After an error of take(): make everything what it was before the step. False: the optimizer has begun, and it cannot be."""
        if self._updates.is_half_done():
            return False
        self._undo()
        return True

    def split(self, micro_batch: int) -> None:
        """From the next step on, in micro-batches of this size. Between two steps only."""
        self._loader.seek(self._loader.step, micro_batch)

    def _remember(self) -> None:
        """What a step that is tried again begins with."""
        self._random_before = rng.take()
        for kept, buffer in zip(self._statistics_before, self._statistics, strict=True):
            kept.copy_(buffer)

    def _attempt(self, window: Window, lr: float, leaving: Callable[[], bool]) -> Taken | None:
        counts = self._counts(window)
        loss: Tensor | None = None
        sums: dict[str, Number] = {}
        ctx = self._task.ctx
        for index, (ids, batch) in enumerate(window.parts):
            if index and leaving():
                return None
            ctx.epoch, ctx.step, ctx.sample_ids = window.epoch, window.step, ids
            total, metrics = self._updates.forward(partial(self._losses, batch, counts))
            self._updates.backward(total, last=index + 1 == len(window.parts))
            total = total.detach()
            loss = total if loss is None else loss + total
            add_metrics(self._task, metrics, len(ids), sums)
        if loss is None:
            raise TrainerdError(f"The batch of step {window.step + 1} is empty.", "Let dataset() give at least one sample.")
        num_samples = window.num_samples
        means = {name: value / num_samples for name, value in sums.items()}  # before the step: after it nothing may fail
        grad_norm, done = self._updates.step(lr, loss)
        if not done:
            self._forget_statistics()
        return Taken(window.epoch, loss, grad_norm, means, num_samples, counts.get(self._task.tokens or "", 0))

    def _losses(self, batch: Any, counts: Mapping[str, int]) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """One micro-batch's part of the loss, and the task's own metrics."""
        with self._precision.autocast():
            given = self._task.loss(self._model, move(batch, self._precision.device) if self._moves else batch, self._task.ctx)
        return taken_apart(self._task, given, counts)

    def _counts(self, window: Window) -> dict[str, int]:
        """N of every name over the whole window."""
        counts: dict[str, int] = {}
        for _, batch in window.parts:
            add_counts(self._task, self._task.counts(batch), counts)
        return counts

    def _undo(self) -> None:
        """As if the window had never been looked at."""
        self._updates.forget()
        self._forget_statistics()
        rng.put_back(self._random_before)

    def _forget_statistics(self) -> None:
        for kept, buffer in zip(self._statistics_before, self._statistics, strict=True):
            buffer.copy_(kept)


def weighted(losses: Losses, counts: Mapping[str, int]) -> Tensor:
    """The sum over names of weight * sum / N."""
    total: Tensor | None = None
    for name, (value, weight) in losses.items():
        if name not in counts:
            raise uncounted(name)
        exact = value if value.dtype == torch.float64 else value.float()
        part = exact * (weight / max(1, counts[name]))
        total = part if total is None else total + part
    if total is None:
        raise TrainerdError("loss() returned no loss.", "It returns ({name: (sum, weight)}, metrics).")
    return total


def taken_apart(task: Task, given: Any, counts: Mapping[str, int]) -> tuple[Tensor, Mapping[str, float | Tensor]]:
    """What loss() returned: the weighted sum, and the metrics. Raises UsageError for what it must not return."""
    try:
        losses, metrics = given
        return weighted(losses, counts), metrics
    except returned.WRONG as error:
        raise returned.by_loss(task, given) or error from None


def add_metrics(task: Task, metrics: Mapping[str, float | Tensor], num_samples: int, sums: dict[str, Number]) -> None:
    """Add the metrics of so many samples. Raises UsageError for what are none."""
    try:
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + _detached(value) * num_samples
    except returned.WRONG as error:
        raise returned.by_loss(task, ({}, metrics)) or error from None


def add_counts(task: Task, given: Any, counts: dict[str, int]) -> None:
    """Add what counts() returned for one batch. Raises UsageError for what it must not return."""
    try:
        for name, number in given.items():
            counts[name] = counts.get(name, 0) + number
    except returned.WRONG as error:
        raise returned.by_counts(task, given) or error from None


def uncounted(name: str) -> TrainerdError:
    return TrainerdError(f"loss() returned {name!r}, which counts() does not name.", "Both must use the same names.")


def _detached(value: float | Tensor) -> Number:
    return value.detach() if isinstance(value, Tensor) else value
