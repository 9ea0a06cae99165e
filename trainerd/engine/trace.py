"""Traces what one micro-batch of an unknown model allocates, on the CPU, for the memory estimate. Must leave no trace of its own.

It works on a copy of the model with copies of the largest sample, two and four at a time; random states, the task's context and
the training's model stay untouched. Every result of every operation is seen, but not the scratch space inside kernels.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainerd.engine import attention, checkpointing, dropout, rng, streaming
from trainerd.engine.loader import Fetch, lengths_of
from trainerd.engine.precision import Precision
from trainerd.engine.step import taken_apart
from trainerd.engine.task import MapDataset, Task
from trainerd.memory.traced import Trace, TracedTable, Traces, mode

_MOST_BYTES = 1 << 30  # of weights: a larger model would need minutes, and its RAM twice
_AGAIN = (checkpointing.SELECTIVE, checkpointing.FULL)
_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}
_LOOK_AT = 2048  # samples whose length is asked where the dataset does not tell


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Births and ends of storages, in order; those known before are left out. `weights`: whose gradients are waited for."""

    def __init__(self, known: list[Tensor], weights: Sequence[nn.Parameter] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.gradients: list[tuple[int, int, int]] = []
        self.flops = 0.0
        self.batch = 0
        self.forwards = True
        self._products: set[tuple[Any, ...]] = set()
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}
        self._numbers: dict[int, int] = {}
        self._on = True
        self._hooks = [w.register_post_accumulate_grad_hook(self._completing(place)) for place, w in enumerate(weights)]  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be left alone by torch's compiler, torch would load all of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        work = flop_registry.get(func.overloadpacket)
        if work is not None:
            self.flops += work(*args, **(kwargs or {}), out_val=result)
            if self.forwards:
                self._products.add((str(func), *(tuple(given.shape) for given in args if isinstance(given, Tensor))))
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
            self._numbers.pop(key, None)
            if self._on:
                self.events.append(~number)

        self._seen[key] = weakref.ref(storage, gone)
        self._numbers[key] = number
        self.sizes.append(storage.nbytes())
        self.events.append(number)

    def _completing(self, place: int) -> Callable[[Tensor], None]:
        def complete(weight: Tensor) -> None:
            assert weight.grad is not None
            number = self._numbers.get(weight.grad.untyped_storage()._cdata)
            if number is not None:
                self.gradients.append((len(self.events), number, place))

        return complete

    def trace(self, samples: int) -> Trace:
        """What was recorded so far; later ends do not belong to it."""
        self._on = False
        for hook in self._hooks:
            hook.remove()
        products = len(self._products)
        return Trace(samples, list(self.sizes), list(self.events), self.flops, self.batch, list(self.gradients), products)


def trace(
    task: Task, model: nn.Module, dataset: MapDataset, precision: Precision, effective_batch: int, kernel: str = attention.AUTO
) -> TracedTable | None:
    """The table of a model on the CPU, its attention computed by `kernel`; None when it is too large to try. Raises whatever the
    model raises."""
    if sum(p.numel() * p.element_size() for p in model.parameters()) > _MOST_BYTES:
        return None
    most = min(4, effective_batch)
    numbers = sorted({max(1, most // 2), most}) if task.splittable else [effective_batch]
    found: dict[str, Traces] = {}
    with _undisturbed(task, model) as copied, attention.for_trace(kernel):
        longest, blocks = _longest(task, dataset), task.blocks(copied)

        def traced(name: str, again: str) -> None:
            found[name] = Traces([], [])
            with checkpointing.wrapped(copied, blocks, again):
                for samples in numbers:
                    batch = _batch(task, dataset, samples, longest)
                    found[name].steps.append(_one(task, copied, batch, precision, samples))
                    copied.zero_grad(set_to_none=True)
                    batch = _batch(task, dataset, samples, longest)
                    found[name].held_out.append(_held_out(task, copied, batch, precision, samples))

        for again in (checkpointing.NONE, *_AGAIN) if blocks else (checkpointing.NONE,):
            traced(again, again)
        streamed = streaming.streamable(copied, blocks)
        for again, ahead in itertools.product(_AGAIN, (False, True)) if streamed else ():
            with streaming.streamed(copied, blocks, ahead=ahead):
                traced(mode(again, streams=True, ahead=ahead), again)
        return _table(task, copied, precision, found, kernel, streamed)


def of_weights(task: Task, model: nn.Module, precision: Precision, kernel: str = attention.AUTO) -> TracedTable:
    """The table of a model that is not traced: weights, gradients, and what the optimizer and a checkpoint make of them. What its layers
    compute is missing, so it is the least that a training needs."""
    gradients = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    born = list(range(len(gradients)))
    complete = [[len(born), number, number] for number in born]
    steps = [Trace(samples, gradients, born, gradients=complete) for samples in (1, 2)]
    held_out = [Trace(samples, [], []) for samples in (1, 2)]
    return _table(task, model, precision, {checkpointing.NONE: Traces(steps, held_out)}, kernel, [])


def _table(
    task: Task, model: nn.Module, precision: Precision, found: dict[str, Traces], kernel: str, streamed: list[nn.Parameter]
) -> TracedTable:
    weights, away = list(model.parameters()), {id(weight) for weight in streamed}
    num_parameters = sum(_numbers_of(p) for p in weights)
    return TracedTable(
        kind=f"{type(task).__name__} {type(model).__name__} {num_parameters}",
        precision=precision.name,
        weights=[(_NAMES.get(p.dtype, "fp32"), list(p.shape)) for p in weights if p.requires_grad],
        frozen=[_held_bytes(p) for p in weights if not p.requires_grad and id(p) not in away],
        streamed=[_held_bytes(p) for p in streamed],
        buffers=[b.numel() * b.element_size() for b in model.buffers()],
        num_parameters=num_parameters,
        modes=found,
        logits=task.ctx.logits,
        attention=kernel,
    )


def _numbers_of(weight: nn.Parameter) -> int:
    """How many numbers it stands for: bitsandbytes packs two of them into a byte, and tells the shape they had."""
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    return weight.numel() if shape is None else math.prod(shape)


def _held_bytes(weight: nn.Parameter) -> int:
    """Its own, and the scales of one in 4 or 8 bits."""
    state = getattr(weight, "quant_state", None)
    parts = [getattr(level, name, None) for level in (state, getattr(state, "state2", None)) for name in ("absmax", "code")]
    tensors = [part for part in (weight, *parts, getattr(weight, "SCB", None)) if isinstance(part, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _batch(task: Task, dataset: MapDataset, samples: int, longest: int) -> Any:
    """So many copies of the largest sample."""
    return Fetch(task, dataset)[0, 0, [longest] * samples]


def _one(task: Task, model: nn.Module, batch: Any, precision: Precision, samples: int) -> Trace:
    """Forward and backward of one micro-batch, as the engine does it."""
    counts = task.counts(batch)
    weights = [p for p in model.parameters() if p.requires_grad]
    recorder = _Recorder(_known(model), weights)
    with recorder:
        given = _losses(task, model, batch, precision, recorder)
        total, metrics = taken_apart(task, given, counts)
        recorder.forwards = False
        total.backward()  # type: ignore[no-untyped-call]
        del given, metrics, total
    return recorder.trace(samples)


def _held_out(task: Task, model: nn.Module, batch: Any, precision: Precision, samples: int) -> Trace:
    """The same micro-batch as an evaluation meets it (evaluation.py)."""
    training = [module for module in model.modules() if module.training]
    recorder = _Recorder(_known(model))
    task.ctx.training = False
    for module in training:
        module.training = type(module).__module__.startswith("bitsandbytes")
    try:
        with torch.no_grad(), recorder:
            given = _losses(task, model, batch, precision, recorder)
            del given
    finally:
        task.ctx.training = True
        for module in training:
            module.training = True
    return recorder.trace(samples)


def _losses(task: Task, model: nn.Module, batch: Any, precision: Precision, recorder: _Recorder) -> Any:
    """Over a copy of the batch, as a GPU gets one: nobody but the model holds it."""
    copies = [_copied(batch)]
    recorder.batch = len(recorder.sizes)
    with _autocast(precision):
        return task.loss(model, copies.pop(), task.ctx)


def _known(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _copied(batch: Any) -> Any:
    """As loader.move() finds tensors."""
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, dict):
        return {key: _copied(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_copied(value) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_copied(value) for value in batch)
    return batch


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
