"""One optimizer step over one window of micro-batches; an out-of-memory costs time, never the step. Must not log or save.

The loss is the sum over names of weight * sum / N, N counted over the whole window before the first backward: so one
micro-batch of 8 gives the gradient of eight of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainerd.contract.errors import TrainerdError
from trainerd.engine import cleaning, guard, optimizers, rng
from trainerd.engine.gradients import refuse_missing
from trainerd.engine.loader import Loader, Window, move
from trainerd.engine.metrics import Number
from trainerd.engine.offload import Offload
from trainerd.engine.precision import Precision
from trainerd.engine.task import Losses, Task

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

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        loader: Loader,
        max_grad_norm: float | None,
        leaves_out: bool = False,
        offload: Offload | None = None,
    ) -> None:
        """`leaves_out`: a step whose loss or gradient is no finite number changes nothing. `offload`: the optimizer is on the host."""
        self._task = task
        self._model = model
        self._optimizer = optimizer
        self._precision = precision
        self._loader = loader
        self._max_grad_norm = max_grad_norm
        self._leaves_out = leaves_out
        self._offload = offload
        self._looked_at_gradients = False
        self._trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self._statistics = [b for b in model.buffers() if b.numel() * b.element_size() <= _STATISTICS_BYTES]
        self._statistics_before = [b.clone() for b in self._statistics]
        self._moves = precision.device.type != "cpu"
        self._versions: int | None = None
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
                if not guard.is_out_of_memory(error) or self._is_half_done() or (smaller is None and tried_again):
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
        if self._is_half_done():
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
        ctx, task, precision = self._task.ctx, self._task, self._precision
        for index, (ids, batch) in enumerate(window.parts):
            if index and leaving():
                return None
            ctx.epoch, ctx.step, ctx.sample_ids = window.epoch, window.step, ids
            with precision.autocast():
                losses, metrics = task.loss(self._model, move(batch, precision.device) if self._moves else batch, ctx)
            total = weighted(losses, counts)
            precision.backward(total)
            total = total.detach()
            loss = total if loss is None else loss + total
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + _detached(value) * len(ids)
        if loss is None:
            raise TrainerdError(f"The batch of step {window.step + 1} is empty.", "Let dataset() give at least one sample.")
        num_samples = window.num_samples
        grad_norm = self._update(lr, loss)
        means = {name: value / num_samples for name, value in sums.items()}
        return Taken(window.epoch, loss, grad_norm, means, num_samples, counts.get(task.tokens or "", 0))

    def _update(self, lr: float, loss: Tensor) -> Tensor:
        """Unscale, clip, step; returns the gradient's norm before clipping."""
        if self._offload is not None:
            self._offload.arrive()
        if not self._looked_at_gradients:
            trained = [self._offload.weight(p) if self._offload else p for p in self._trainable]
            refuse_missing(self._model, self._task, trained, [p.grad for p in self._trainable])
            self._looked_at_gradients = True
        self._precision.unscale(self._optimizer)
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._leaves_out and self._precision.scaler is None and not _are_finite(norm, loss):
            self._forget_statistics()
            self._optimizer.zero_grad(set_to_none=True)
            return norm
        limit = self._max_grad_norm
        # On a CPU it costs nothing to look first; multiplying by 1 would cost a pass over all gradients.
        if limit is not None and (norm.device.type != "cpu" or not float(norm) <= limit):
            torch.nn.utils.clip_grads_with_norm_(self._trainable, limit, norm)
        optimizers.set_lr(self._optimizer, lr)
        self._versions = self._version()
        self._precision.step(self._optimizer)
        self._versions = None
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _counts(self, window: Window) -> dict[str, int]:
        """N of every name over the whole window."""
        counts = dict(self._task.counts(window.parts[0][1]))
        for _, batch in window.parts[1:]:
            for name, number in self._task.counts(batch).items():
                counts[name] = counts.get(name, 0) + number
        return counts

    def _undo(self) -> None:
        """As if the window had never been looked at."""
        if self._offload is not None:
            self._offload.forget()
        self._optimizer.zero_grad(set_to_none=True)
        self._precision.forget_step()
        self._versions = None
        self._forget_statistics()
        rng.put_back(self._random_before)

    def _forget_statistics(self) -> None:
        for kept, buffer in zip(self._statistics_before, self._statistics, strict=True):
            buffer.copy_(kept)

    def _version(self) -> int:
        """A number that every change of a weight or of the optimizer's state makes larger.

        Foreign kernels change tensors behind torch's back; but they count their steps first, in plain numbers.
        """
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        changed = sum(int(t._version) for t in [*self._trainable, *(t for t in states if isinstance(t, Tensor))])
        return changed + sum(value for value in states if isinstance(value, int))

    def _is_half_done(self) -> bool:
        """Whether the optimizer failed after it had changed something: then only a checkpoint helps, and the error is raised."""
        return self._versions is not None and self._version() != self._versions


def _are_finite(norm: Tensor, loss: Tensor) -> bool:
    return bool(torch.isfinite(norm.to(loss.device)) & torch.isfinite(loss))


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


def uncounted(name: str) -> TrainerdError:
    return TrainerdError(f"loss() returned {name!r}, which counts() does not name.", "Both must use the same names.")


def _detached(value: float | Tensor) -> Number:
    return value.detach() if isinstance(value, Tensor) else value
