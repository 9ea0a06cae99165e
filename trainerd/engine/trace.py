"""Traces what one micro-batch of an unknown model allocates, on the CPU, for the memory estimate. Must leave no trace of its own.

It works on a copy of the model with copies of the largest sample, two and four at a time; random states, the task's context and
the training's model stay untouched. Every result of every operation is seen, but not the scratch space inside kernels.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainerd.engine import checkpointing, dropout, rng, streaming
from trainerd.engine.loader import Fetch, lengths_of
from trainerd.engine.precision import Precision
from trainerd.engine.step import weighted
from trainerd.engine.task import MapDataset, Task
from trainerd.memory.traced import Trace, TracedTable, Traces, mode

_MOST_BYTES = 1 << 30  # of weights: a larger model would need minutes, and its RAM twice
_AGAIN = (checkpointing.SELECTIVE, checkpointing.FULL)
_LOOK_AT = 2048  # samples whose length is asked where the dataset does not tell


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Births and ends of storages, in order; those known before are left out."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.flops = 0.0
        self.complete: list[tuple[int, int]] = []
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}
        self._numbers: dict[int, int] = {}
        self._on = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be left alone by torch's compiler, torch would load all of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        work = flop_registry.get(func.overloadpacket)
        if work is not None:
            self.flops += work(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        return result

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        number = len(self.sizes)

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            if self._on:
                self.events.append(~number)

        self._seen[key] = weakref.ref(storage, gone)
        self._numbers[key] = number
        self.sizes.append(storage.nbytes())
        self.events.append(number)

    def trace(self, samples: int) -> Trace:
        """What was recorded so far; later ends do not belong to it."""
        self._on = False
        return Trace(samples, list(self.sizes), list(self.events), self.flops, list(self.complete))

    def completes(self, weight: Tensor) -> None:
        """The weight's gradient is complete: an optimizer on the host would take it now."""
        grad = weight.grad
        number = None if grad is None else self._numbers.get(grad.untyped_storage()._cdata)
        if number is not None:
            self.complete.append((len(self.events), number))


def trace(task: Task, model: nn.Module, dataset: MapDataset, precision: Precision, effective_batch: int) -> TracedTable | None:
    """The table of a model on the CPU; None when it is too large to try. Raises whatever the model raises."""
    weights = list(model.parameters())
    if sum(p.numel() * p.element_size() for p in weights) > _MOST_BYTES:
        return None
    numbers = sorted({min(2, effective_batch), min(4, effective_batch)}) if task.splittable else [effective_batch]
    found: dict[str, Traces] = {}
    with _undisturbed(task, model) as copied:
        longest, blocks = _longest(task, dataset), task.blocks(copied)

        def traced(name: str, again: str) -> None:
            found[name] = Traces([], [])
            with checkpointing.wrapped(copied, blocks, again):
                for samples in numbers:
                    for traces in (found[name].first, found[name].later):
                        batch = Fetch(task, dataset)[0, 0, [longest] * samples]
                        traces.append(_one(task, copied, batch, precision, samples, longest))
                    copied.zero_grad(set_to_none=True)

        for again in (checkpointing.NONE, *_AGAIN) if blocks else (checkpointing.NONE,):
            traced(again, again)
        streamed = streaming.streamed_bytes(copied, blocks)
        for again, ahead in itertools.product(_AGAIN, (False, True)) if streamed else ():
            with streaming.streamed(copied, blocks, ahead=ahead):
                traced(mode(again, streams=True, ahead=ahead), again)
    trainable = [list(p.shape) for p in weights if p.requires_grad]
    frozen = sum(p.numel() * p.element_size() for p in weights if not p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    kind = f"{type(task).__name__} {type(model).__name__} {sum(p.numel() for p in weights)}"
    return TracedTable(kind, precision.name, trainable, frozen, buffers, found, streamed)


def _one(task: Task, model: nn.Module, batch: Any, precision: Precision, samples: int, longest: int) -> Trace:
    """Forward and backward of one micro-batch, as the engine does it."""
    task.ctx.sample_ids = [longest] * samples
    counts = task.counts(batch)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    recorder = _Recorder(known)
    hooks = [
        p.register_post_accumulate_grad_hook(recorder.completes)  # type: ignore[no-untyped-call]
        for p in model.parameters()
        if p.requires_grad
    ]
    with recorder:
        with _autocast(precision):
            losses, metrics = task.loss(model, batch, task.ctx)
        total = weighted(losses, counts)
        total.backward()  # type: ignore[no-untyped-call]
        del losses, metrics, total
    for hook in hooks:
        hook.remove()
    return recorder.trace(samples)


def _autocast(precision: Precision) -> contextlib.AbstractContextManager[Any]:
    if precision.name == "fp32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", precision.dtype)


@contextlib.contextmanager
def _undisturbed(task: Task, model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the model in training mode; afterwards the task's context and all random states are what they were."""
    ctx = task.ctx
    before = dict(vars(ctx))
    with rng.preserved():
        copied = copy.deepcopy(model).to("cpu")
        copied.train()
        ctx.device = torch.device("cpu")
        dropout.attach(copied, ctx)
        try:
            yield copied
        finally:
            vars(ctx).clear()
            vars(ctx).update(before)


def _longest(task: Task, dataset: MapDataset) -> int:
    """The sample that needs most, as far as lengths tell."""
    if len(dataset) > _LOOK_AT and getattr(dataset, "lengths", None) is None:
        return max(range(_LOOK_AT), key=lambda index: task.length(dataset[index])) if type(task).length is not Task.length else 0
    lengths = lengths_of(task, dataset)
    return int(lengths.argmax()) if lengths is not None and len(lengths) else 0
