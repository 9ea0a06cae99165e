"""From a loss to a step: gradients are made and added up, looked at, clipped and stepped with; or all of it is forgotten.

Whoever else owns the way back (zero2.py) has the same methods. Must not know windows or samples, nor what is tried again: step.py does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainerd.engine import optimizers
from trainerd.engine.gradients import refuse_missing
from trainerd.engine.offload import Offload
from trainerd.engine.precision import Precision
from trainerd.engine.task import Task

More = TypeVar("More")


class Updates:
    """torch's own way: one optimizer over the weights, or with `offload` over their masters on the host."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        max_grad_norm: float | None,
        leaves_out: bool = False,
        offload: Offload | None = None,
    ) -> None:
        """`leaves_out`: a step whose loss or gradient is no finite number changes nothing."""
        self._model = model
        self._task = task
        self._optimizer = optimizer
        self._precision = precision
        self._max_grad_norm = max_grad_norm
        self._leaves_out = leaves_out
        self._offload = offload
        self._looked_at_gradients = False
        self._trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self._versions: int | None = None

    def forward(self, compute: Callable[[], tuple[Tensor, More]]) -> tuple[Tensor, More]:
        """What `compute` gives: a micro-batch's part of the loss, and anything beside it."""
        return compute()

    def backward(self, total: Tensor, last: bool) -> None:
        """Add the gradients of `total` to those that are there. `last`: of this window."""
        self._precision.backward(total)

    def step(self, lr: float, loss: Tensor) -> tuple[Tensor, bool]:
        """Unscale, clip, step. The gradient's norm before clipping; and False for a step that was left out."""
        if self._offload is not None:
            self._offload.arrive()
        if not self._looked_at_gradients:
            trained = [self._offload.weight(p) if self._offload else p for p in self._trainable]
            refuse_missing(self._model, self._task, trained, [p.grad for p in self._trainable])
            self._looked_at_gradients = True
        self._precision.unscale(self._optimizer)
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._leaves_out and self._precision.scaler is None and not are_finite(norm, loss):
            self._optimizer.zero_grad(set_to_none=True)
            return norm, False
        limit = self._max_grad_norm
        # On a CPU it costs nothing to look first; multiplying by 1 would cost a pass over all gradients.
        if limit is not None and (norm.device.type != "cpu" or not float(norm) <= limit):
            torch.nn.utils.clip_grads_with_norm_(self._trainable, limit, norm)
        optimizers.set_lr(self._optimizer, lr)
        self._versions = version(self._trainable, self._optimizer)
        self._precision.step(self._optimizer)
        self._versions = None
        self._optimizer.zero_grad(set_to_none=True)
        return norm, True

    def forget(self) -> None:
        """As if there had been no gradient, and no step had begun."""
        if self._offload is not None:
            self._offload.forget()
        self._optimizer.zero_grad(set_to_none=True)
        self._precision.forget_step()
        self._versions = None

    def is_half_done(self) -> bool:
        """Whether the optimizer failed after it had changed something: then only a checkpoint helps, and the error is raised."""
        return self._versions is not None and version(self._trainable, self._optimizer) != self._versions


def version(trainable: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """A number that every change of a weight or of the optimizer's state makes larger.

    Foreign kernels change tensors behind torch's back; but they count their steps first, in plain numbers.
    """
    states = [value for state in optimizer.state.values() for value in state.values()]
    changed = sum(int(t._version) for t in [*trainable, *(t for t in states if isinstance(t, Tensor))])
    return changed + sum(value for value in states if isinstance(value, int))


def are_finite(norm: Tensor, loss: Tensor) -> bool:
    return bool(torch.isfinite(norm.to(loss.device)) & torch.isfinite(loss))
