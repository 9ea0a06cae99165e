"""Traces what one micro-batch of an unknown model allocates, on the CPU, for the memory estimate. Must leave no trace of its own.

It works on a copy of the model with copies of the largest sample, two and four at a time, and more where those do not tell (curve.py);
random states, the task's context and the training's model stay untouched. A small model is really computed; a larger one has a copy
without memory (fakes.py), which gives the same, and is computed only where its code goes on by what it has computed, there is room, and
it does not take long.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainerd.contract.sizes import compared
from trainerd.engine import attention, checkpointing, curve, dropout, packed, rng, streaming
from trainerd.engine.fakes import Fakes
from trainerd.engine.largest import Largest, largest
from trainerd.engine.loader import Fetch
from trainerd.engine.precision import Precision
from trainerd.engine.recorder import Recorder
from trainerd.engine.step import taken_apart
from trainerd.engine.task import MapDataset, Task
from trainerd.memory.traced import Trace, TracedTable, Traces, mode

_SMALL_BYTES = 64 << 20  # of weights: computing them is likely faster than loading what tensors without memory need
_SMALL_SECONDS, _FAKE_SECONDS, _LARGE_SECONDS = 3.0, 120.0, 60.0
_SMALL_HELD_BYTES = 512 << 20
_AGAIN = (checkpointing.SELECTIVE, checkpointing.FULL)
_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}
_STREAMED = tuple(itertools.product(_AGAIN, (False, True)))  # what is computed again, and whether copies are begun ahead
_Way = tuple[str, str, bool | None]
_GUESSED = "that the model does the same whatever the numbers are that its code has asked for"


class NotTraced(Exception):
    """In words, why a model was not traced."""


class _TooMuch(NotTraced):
    """It takes too long, or more room than there is."""


@dataclass(frozen=True)
class Means:
    """What a trace may take. `room_bytes`: of RAM, a copy of the model included; None: all. `beat` is called again and again."""

    room_bytes: int | None = None
    beat: Callable[[], None] = lambda: None


class _Watch:
    """Looks at each operation whether it goes on; gives up early what would take too long."""

    def __init__(self, means: Means, seconds: float, room_bytes: int | None) -> None:
        self._means, self._seconds, self._room_bytes = means, seconds, room_bytes
        self._until = time.monotonic() + seconds
        self._foreseen = False
        self.forwards = 0.0
        """How many times as much as the first forward pass all of it takes, where that tells."""

    def __call__(self, held_bytes: int) -> None:
        self._means.beat()
        if self._room_bytes is not None and held_bytes > self._room_bytes:
            raise _TooMuch(f"a step of the fewest samples holds more than the {self._room_bytes / 1e9:.1f} GB that are free")
        if time.monotonic() > self._until:
            raise _TooMuch(f"it takes more than {self._seconds:.0f} seconds")

    def went(self, seconds: float) -> None:
        """The first forward pass took so long."""
        expected = 0.0 if self._foreseen else seconds * self.forwards
        self._foreseen = True
        if time.monotonic() + expected > self._until:
            raise _TooMuch(f"it would take {expected:.0f} seconds or so")


def trace(
    task: Task,
    model: nn.Module,
    dataset: MapDataset,
    precision: Precision,
    effective_batch: int,
    kernel: str = attention.AUTO,
    means: Means | None = None,
) -> TracedTable:
    """The table of a model on the CPU, its attention computed by `kernel`. Raises NotTraced, and whatever the model raises."""
    means = means or Means()
    sample = _sample(task, dataset, means)
    given = (task, model, dataset, precision, effective_batch, kernel, means, sample)
    if sum(map(_size, model.parameters())) <= _SMALL_BYTES:
        try:
            return _Tracing(*given).computed(_SMALL_SECONDS, _SMALL_HELD_BYTES)
        except _TooMuch:
            pass
    try:
        return _Tracing(*given).without_memory()
    except Exception as error:  # torch's rules for such tensors, and a user's code
        why = str(error) if isinstance(error, NotTraced) else f"{type(error).__name__}: {error}"
    try:
        return _Tracing(*given, is_last=True).computed(_LARGE_SECONDS)
    except _TooMuch as error:
        raise NotTraced(f"Not traced without computing ({why[:150]}), nor computed: {error}.") from None


class _Tracing:
    """One attempt."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        dataset: MapDataset,
        precision: Precision,
        effective_batch: int,
        kernel: str,
        means: Means,
        sample: Largest,
        is_last: bool = False,
    ) -> None:
        """`is_last`: what it finds without time or room for every check is better than nothing."""
        self._task, self._model, self._dataset, self._precision, self._kernel = task, model, dataset, precision, kernel
        self._means, self._batch = means, effective_batch
        self._largest, self._is_last = sample, is_last
        self._grown = ""
        most = min(4, effective_batch)
        self._numbers = sorted({max(1, most // 2), most}) if task.splittable else [effective_batch]
        self._found: dict[str, Traces] = {}
        self._fakes: Fakes | None = None

    def computed(self, seconds: float, held_bytes: int | None = None) -> TracedTable:
        """On a real copy, in so much time and room. Raises _TooMuch."""
        rooms = [room for room in (self._means.room_bytes, held_bytes) if room is not None]
        room, weights = min(rooms, default=None), list(self._model.parameters())
        copied = sum(map(_size, (*weights, *self._model.buffers())))
        needed = copied + sum(_size(weight) for weight in weights if weight.requires_grad)
        if room is not None and needed > room:
            much, free = compared(needed, max(0, room))
            raise _TooMuch(f"a copy of the model and its gradients need {much}, and {free} are free")
        return self._table(_Watch(self._means, seconds, None if room is None else room - copied))

    def without_memory(self) -> TracedTable:
        """On a copy that has none."""
        self._fakes = Fakes()
        table = self._table(_Watch(self._means, _FAKE_SECONDS, None))
        return replace(table, assumed=(*table.assumed, _GUESSED)) if self._fakes.guessed else table

    def _table(self, watch: _Watch) -> TracedTable:
        with _undisturbed(self._task, self._model, self._fakes) as copied, attention.for_trace(self._kernel):
            blocks = self._task.blocks(copied)
            streamed = streaming.streamable(copied, blocks)
            modes = (checkpointing.NONE, *_AGAIN) if blocks else (checkpointing.NONE,)
            ways: list[_Way] = [(again, again, None) for again in modes]
            ways += [(mode(again, streams=True, ahead=ahead), again, ahead) for again, ahead in _STREAMED] if streamed else []
            if self._fakes is None:
                watch.forwards = sum(self._numbers) / self._numbers[0] * (5 * len(ways) - 1)
            self._go(ways, copied, blocks, watch)
            numbers = self._curve(copied, watch)
            if numbers != self._numbers:
                self._numbers = numbers
                self._go(ways, copied, blocks, watch)
            table = _table(self._task, copied, self._precision, self._found, self._kernel, streamed)
            return replace(table, assumed=(self._largest.assumed, *((self._grown,) if self._grown else ())))

    def _go(self, ways: list[_Way], copied: nn.Module, blocks: Sequence[nn.Module], watch: _Watch) -> None:
        for name, again, ahead in ways:
            away = contextlib.nullcontext() if ahead is None else streaming.streamed(copied, blocks, ahead=ahead)
            with away, checkpointing.wrapped(copied, blocks, again):
                self._found[name] = self._traces(copied, self._largest.index, watch)

    def _curve(self, copied: nn.Module, watch: _Watch) -> list[int]:
        """The numbers of samples that tell how a micro-batch grows: one more where a step of more is above what those before say, and the
        whole batch would be. The last that was looked at checks the others, as far as the batch goes."""
        if self._numbers != [2, 4]:
            return self._numbers
        gradients = [_size(p) for p in copied.parameters() if p.requires_grad]
        known = self._found[checkpointing.NONE].steps
        try:
            known, self._grown = curve.followed(known, self._batch, gradients, lambda samples: self._step(copied, samples, watch))
        except _TooMuch as error:
            if not self._is_last:
                raise
            self._grown = curve.UNCHECKED.format(why=error)
        return [trace.samples for trace in known]

    def _step(self, copied: nn.Module, samples: int, watch: _Watch) -> Trace:
        """A step of so many samples."""
        batch = _batch(self._task, self._dataset, samples, self._largest.index)
        made = _one(self._task, copied, batch, self._precision, samples, watch, self._fakes)
        self._cleared(copied)
        return made

    def _cleared(self, copied: nn.Module) -> None:
        copied.zero_grad(set_to_none=True)
        if self._fakes is not None:
            self._fakes.forget()

    def _traces(self, copied: nn.Module, longest: int, watch: _Watch) -> Traces:
        """Of each number of samples: a step, and an evaluation."""
        found = Traces([], [])
        for samples in self._numbers:
            for some, pass_of in ((found.steps, _one), (found.held_out, _held_out)):
                batch = _batch(self._task, self._dataset, samples, longest)
                some.append(pass_of(self._task, copied, batch, self._precision, samples, watch, self._fakes))
                self._cleared(copied)
        return found


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
    num_parameters, scales = sum(_numbers_of(p) for p in weights), packed.scale_bytes(model)
    return TracedTable(
        kind=f"{type(task).__name__} {type(model).__name__} {num_parameters}",
        precision=precision.name,
        weights=[(_NAMES.get(p.dtype, "fp32"), list(p.shape)) for p in weights if p.requires_grad],
        frozen=[*(_size(p) for p in weights if not p.requires_grad and id(p) not in away), *scales.values()],  # those stay, too
        streamed=[_size(p) for p in streamed],
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


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sample(task: Task, dataset: MapDataset, means: Means) -> Largest:
    with _quietly(task):
        return largest(task, dataset, means.beat)


def _batch(task: Task, dataset: MapDataset, samples: int, longest: int) -> Any:
    """So many copies of the largest sample."""
    return Fetch(task, dataset)[0, 0, [longest] * samples]


def _one(task: Task, model: nn.Module, batch: Any, precision: Precision, samples: int, watch: _Watch, fakes: Fakes | None) -> Trace:
    """Forward and backward of one micro-batch, as the engine does it."""
    counts = task.counts(batch)
    weights = [p for p in model.parameters() if p.requires_grad]
    recorder = Recorder(_known(model), weights, watch)
    with fakes or contextlib.nullcontext(), recorder:
        began = time.monotonic()
        given = _losses(task, model, batch, precision, recorder)
        watch.went(time.monotonic() - began)
        total, metrics = taken_apart(task, given, counts)
        recorder.forwards = False
        total.backward()  # type: ignore[no-untyped-call]
        del given, metrics, total
    return recorder.trace(samples)


def _held_out(task: Task, model: nn.Module, batch: Any, precision: Precision, samples: int, watch: _Watch, fakes: Fakes | None) -> Trace:
    """The same micro-batch as an evaluation meets it (evaluation.py)."""
    training = [module for module in model.modules() if module.training]
    recorder = Recorder(_known(model), watch=watch)
    task.ctx.training = False
    for module in training:
        module.training = type(module).__module__.startswith("bitsandbytes")
    try:
        with torch.no_grad(), fakes or contextlib.nullcontext(), recorder:
            given = _losses(task, model, batch, precision, recorder)
            del given
    finally:
        task.ctx.training = True
        for module in training:
            module.training = True
    return recorder.trace(samples)


def _losses(task: Task, model: nn.Module, batch: Any, precision: Precision, recorder: Recorder) -> Any:
    """Over a copy of the batch, as a GPU gets one: nobody but the model holds it."""
    copies = [_copied(batch)]
    recorder.batch, recorder.low_bytes = len(recorder.sizes), precision.dtype.itemsize
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
def _undisturbed(task: Task, model: nn.Module, fakes: Fakes | None) -> Iterator[nn.Module]:
    """A copy of the model in training mode, with memory or without; afterwards the task's context and all random states are as before."""
    with _quietly(task):
        copied = copy.deepcopy(model).to("cpu") if fakes is None else fakes.copied(model)
        copied.train()
        dropout.attach(copied, task.ctx)
        yield copied


@contextlib.contextmanager
def _quietly(task: Task) -> Iterator[None]:
    """The task's context on the CPU; afterwards it and all random states are as before."""
    ctx = task.ctx
    before = dict(vars(ctx))
    with rng.preserved():
        ctx.device = torch.device("cpu")
        try:
            yield
        finally:
            vars(ctx).clear()
            vars(ctx).update(before)
