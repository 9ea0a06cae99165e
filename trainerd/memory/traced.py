"""A model without a table: its allocations as they were traced at some micro-batches, stretched to any other. Must not import torch.

Each storage's size is taken as a + b * samples; of more than two traces as the polynomial of the lowest degree that none of them is above,
or, of many, as a power that is no whole one.
When the traces are not the same in form, only their peaks are fitted. What the trace does not hold, the optimizer, the batches that wait
and a checkpoint's copy, is played as for a table (timeline.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from trainerd.contract import files
from trainerd.contract.errors import Unreadable
from trainerd.memory.tape import ACTIVATIONS, GRADIENTS, Tape, Tensor
from trainerd.memory.timeline import Setup, Timeline, of_model

FORMAT = 8
_WHIM, _ROUNDING_BYTES = 0.05, 64  # oneDNN rounds up to a line of the cache
_EXACT = 0.015  # of so many points that a curve with bends of its own comes near to them all
_SAME = 1e-3  # of two powers
_STEP = 0.28  # in logarithms, how far points may lie from a power: the root of 8 is taken as 2
CHECKED = (8, 16, 32, 64)
"""Numbers of samples that may be traced beside two and four."""
MATH = "math"
"""The only kernel of attention that allocates otherwise than the others, so that a trace is of it or of the others."""


@dataclass(frozen=True)
class Trace:
    """One micro-batch, forwards and (but for an evaluation) back: n is the birth of storage n, ~n its end.

    `batch` storages, the first ones, are the micro-batch itself. `gradients` holds (place in the events, storage, weight) for each
    gradient where it is complete: the first of a step stays, those of later micro-batches are added to it and end there.
    """

    samples: int
    sizes: Sequence[int]
    events: Sequence[int]
    flops: float = 0.0
    batch: int = 0
    gradients: Sequence[Sequence[int]] = ()
    products: int = 0
    """Different shapes that were multiplied, forwards."""
    scratch: Sequence[int] = ()
    """What each convolution may hold beside its tensors on a CPU (scratch.py), in their order; and what it may of a single sample, which
    is computed in another way."""
    scratch_of_one: Sequence[int] = ()

    @property
    def peak(self) -> int:
        live = highest = 0
        for event in self.events:
            live += self.sizes[event] if event >= 0 else -self.sizes[~event]
            highest = max(highest, live)
        return highest


@dataclass(frozen=True)
class Traces:
    """At some micro-batches each, of a step and of an evaluation."""

    steps: list[Trace]
    held_out: list[Trace]


@dataclass(frozen=True)
class TracedTable:
    """What the planner asks, from traces: `modes` by what the model's blocks compute again, and how their frozen weights come (mode()).
    It answers for the precision, the logits and the attention it was traced with, and for no others."""

    kind: str
    precision: str
    weights: Sequence[tuple[str, Sequence[int]]]
    """Type and shape of each that is learned."""
    frozen: Sequence[int]
    """Bytes of each weight that is not, and stays on the device."""
    streamed: Sequence[int]
    """Bytes of each other one: those of the blocks can stay on the host."""
    buffers: Sequence[int]
    num_parameters: int
    modes: Mapping[str, Traces]
    logits: str = "chunked"
    attention: str = "auto"
    process_bytes: int = 0
    """RAM that the last training held beside the model, its data included; 0: not known."""
    on_disk: tuple[int, int] = (0, 0)
    """Bytes of `frozen` and of `streamed` that lie in a file the task has mapped: in no RAM while they are not on a GPU."""
    assumed: tuple[str, ...] = ()
    source: str = ""
    """A hash of the task's code, that of the modules it imports included."""
    format: int = field(default=FORMAT)
    is_traced = True

    @property
    def degree(self) -> int:
        """Of what a micro-batch needs in its samples: 1 is even growth, 2 with their square."""
        return max(1, len(self.modes["none"].steps) - 1)

    @property
    def offers(self) -> tuple[str, ...]:
        return (*(name for name in ("selective", "full") if name in self.modes), *(("base",) if self.streamed else ()))

    def tells(self, setup: Setup) -> bool:
        """Whether it was traced so that it can answer for this setup. With one trace only its own micro-batch is known."""
        if (setup.precision, setup.logits, setup.attention == MATH) != (self.precision, self.logits, self.attention == MATH):
            return False
        steps = self.modes["none"].steps
        return len(steps) > 1 or setup.micro_batch == steps[0].samples

    def timeline(self, setup: Setup) -> Timeline:
        """As for a table: the trace stands for the model's forward and backward passes."""
        assert self.tells(setup), f"{self.kind} was traced otherwise than {setup}"
        found = of_model(lambda tape: _Retold(self, tape, setup), setup)
        on_gpu, streams = setup.device != "cpu", _streams(setup)
        away = sum(self.streamed) if streams and on_gpu else 0
        on_disk = self.on_disk[1] if streams and on_gpu else 0 if on_gpu else sum(self.on_disk)
        pinned, host = found.pinned_bytes + away, found.host_bytes + away
        if on_gpu:
            pinned, host = pinned - on_disk, host - on_disk
        found = replace(found, streamed_bytes=away, pinned_bytes=pinned, host_bytes=host, on_disk_bytes=on_disk)
        return replace(found, num_parameters=self.num_parameters)


def mode(checkpointing: str, *, streams: bool = False, ahead: bool = False) -> str:
    """What the traces of a way to train are called. `streams`: the blocks' frozen weights are copies, made one block `ahead` on a GPU."""
    return f"{checkpointing}, base{' ahead' if ahead else ''}" if streams else checkpointing


def _streams(setup: Setup) -> bool:
    return setup.offload == "base"


class _Retold:
    """The traced model on a tape."""

    def __init__(self, table: TracedTable, tape: Tape, setup: Setup) -> None:
        self.tape = tape
        self.weights = [tape.parameter(*shape, dtype=dtype) for dtype, shape in table.weights]
        away = _streams(setup) and setup.device != "cpu"
        frozen = [*table.frozen, *(() if away else table.streamed)]
        if setup.device == "cpu":
            frozen = [sum(frozen) - sum(table.on_disk)]
        for number in frozen:
            tape.parameter(number, dtype="uint8", trainable=False)
        for number in table.buffers:
            tape.buffer(number, dtype="uint8")
        traces = table.modes[mode(setup.checkpointing, streams=_streams(setup), ahead=away)]
        sizes = [weight.storage.size for weight in self.weights]
        self.step, self.held_out = (stretched(some, setup.micro_batch, sizes) for some in (traces.steps, traces.held_out))

    def micro_batch(self, tape: Tape, samples: int) -> list[Tensor]:
        return [tape.new((size,), "uint8") for size in self.step.sizes[: self.step.batch]]

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Plays both ways at once: what comes of the backward pass lies in the weights' gradients already."""
        tape = self.tape
        trace = self.step if tape.grad_enabled else self.held_out
        tape.multiplied.extend((-1, number) for number in range(trace.products))
        tape.flops += trace.flops
        tape.scratch = max(tape.scratch, *trace.scratch) if trace.scratch else tape.scratch
        self._play(trace, batch)
        made = tape.new((0,), "fp32")
        tape.record([made], self.weights[:1], lambda node, grads: [None])
        return made

    def evaluate(self, tape: Tape, samples: int, *, worst: bool) -> None:
        """What a task's own evaluate() does is not traced."""

    def _play(self, trace: Trace, batch: list[Tensor]) -> None:
        """A GPU has copied the batch for this micro-batch alone; on a CPU it is the host's, which keeps it for the step."""
        tape, alive = self.tape, dict(enumerate(batch))
        if tape.device != "cpu":
            batch.clear()
        complete: dict[int, list[tuple[int, int]]] = {}
        for place, number, weight in trace.gradients:
            complete.setdefault(place, []).append((number, weight))
        for place, event in enumerate(trace.events):
            if place in complete:
                self._take(complete[place], alive)
            if event >= trace.batch:
                alive[event] = tape.new((trace.sizes[event],), "uint8")
            elif event < 0:
                alive.pop(~event, None)
        self._take(complete.get(len(trace.events), []), alive)

    def _take(self, complete: Sequence[tuple[int, int]], alive: dict[int, Tensor]) -> None:
        """Gradients that are complete: they leave the device, are added to what is there, or are the weights' from here on."""
        tape = self.tape
        for number, place in complete:
            gradient, weight = alive.pop(number, None), self.weights[place]
            if gradient is None or (tape.leaving is not None and tape.leaving(weight)) or weight.grad is not None:
                continue
            tape.given.append((len(tape.events), gradient.storage.number, ACTIVATIONS))
            tape.kinds[gradient.storage.number] = GRADIENTS
            weight.grad = gradient


def stretched(traces: Sequence[Trace], samples: int, gradients: Sequence[int]) -> Trace:
    """The trace at this micro-batch: every size on the line through those that were traced, or on the curve, where there are more than
    two and it is above the line. `gradients`: the size of each."""
    exact = next((trace for trace in traces if trace.samples == samples), None)
    if exact is not None:
        return exact
    numbers, high = [trace.samples for trace in traces], traces[-1]

    def between(values: Iterable[float]) -> int:
        return max(0, round(_through(numbers, list(values), samples)))

    flops = float(between(trace.flops for trace in traces))
    scratch = [between(some) for some in zip(*(trace.scratch for trace in traces), strict=False)]
    scratch += high.scratch_of_one if samples == 1 else ()
    if all(list(trace.events) == list(high.events) and trace.batch == high.batch for trace in traces):
        sizes = [between(some) for some in zip(*(trace.sizes for trace in traces), strict=True)]
        return replace(high, samples=samples, sizes=sizes, flops=flops, scratch=scratch)
    # Of another form: the batch, the gradients that stay, and all else as one storage that comes and goes.
    stays = sorted({weight for _, _, weight in high.gradients})
    batch = between(sum(trace.sizes[: trace.batch]) for trace in traces)
    sizes = [batch, *(gradients[weight] for weight in stays)]
    rest, born = max(0, between(trace.peak for trace in traces) - sum(sizes)), list(range(len(sizes)))
    events = [*born, len(sizes), ~len(sizes), ~0]
    marks = [[len(events), number, weight] for number, weight in enumerate(stays, 1)]
    return Trace(samples, [*sizes, rest], events, flops, 1, marks, max(trace.products for trace in traces), scratch)


def is_off(value: float, line: float) -> bool:
    """Whether a size is more than rounding and a kernel's whims above what a line says."""
    return value > line * (1 + _WHIM) + _ROUNDING_BYTES


def _through(numbers: Sequence[int], values: Sequence[float], at: int) -> float:
    """The polynomial of the lowest degree through the first points that no later one is above, drawn through points spread over all, where
    none is far below it either; else a power, whole or not; else the polynomial of the highest degree, or what the last two points say."""
    most = len(numbers) - 1
    falls_short = True
    for degree in range(1, most - 1 if most > len(CHECKED) else most):
        first = numbers[: degree + 1], values[: degree + 1]
        if any(is_off(values[place], _polynomial(*first, numbers[place])) for place in range(degree + 1, most + 1)):
            continue
        falls_short = False
        spread = [round(place * most / degree) for place in range(degree + 1)]
        some = [numbers[place] for place in spread], [values[place] for place in spread]
        if all(_explains(_polynomial(*some, number), value, most) for number, value in zip(numbers, values, strict=True)):
            return _polynomial(*some, at)
    whole, line = _polynomial(numbers, values, at), _polynomial(numbers[-2:], values[-2:], at)
    if most < 2 or min(values[-2:]) <= 0 or (falls_short and numbers[-1] < CHECKED[-1] and whole >= line):
        return whole
    return _beyond(numbers, values, at, _power(numbers, values))


def _explains(told: float, value: float, most: int) -> bool:
    """Whether a curve over all points is not far above one of them. To many points it must be near: one with bends of its own is soon."""
    return abs(told - value) <= value * _EXACT + 1 if most >= len(CHECKED) else not is_off(told, value)


def _beyond(numbers: Sequence[int], values: Sequence[float], at: int, power: tuple[float, float] | None) -> float:
    """On the line between two points, and beyond the last with the power; without one, as it grew between the last two. It may grow by
    steps, and a curve through all points may go anywhere between them."""
    after = max(1, next((place for place, number in enumerate(numbers) if number >= at), len(numbers) - 1))
    line = _polynomial(numbers[after - 1 : after + 1], values[after - 1 : after + 1], at)
    if at <= numbers[-1]:
        return line
    above, grows = power or (1.0, math.log(values[-1] / values[-2]) / math.log(numbers[-1] / numbers[-2]))
    return max(line, values[-1] * above * float((at / numbers[-1]) ** grows))


def _power(numbers: Sequence[int], values: Sequence[float]) -> tuple[float, float] | None:
    """How far the last point may lie below a power through all (but the first of many), by the rounding of sizes, and which power that is;
    None where none is so near to them. One that falls from point to point goes on as at the last ones; one that rises is a polynomial's."""
    some = slice(1 if len(numbers) > len(CHECKED) + 1 else 0, None)
    xs, ys = [math.log(number) for number in numbers[some]], [math.log(value) for value in values[some] if value > 0]
    if len(ys) < len(CHECKED) or len(ys) < len(xs):
        return None
    grown = [(y - x) / (after - before) for x, y, before, after in zip(ys, ys[1:], xs, xs[1:], strict=False)]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    power = sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True)) / sum((one - x) ** 2 for one in xs)
    off = [other - y - power * (one - x) for one, other in zip(xs, ys, strict=True)]
    if max(map(abs, off)) > _STEP:
        return None
    changes = [other - one for one, other in itertools.pairwise(grown)]
    if min(changes) > _SAME:
        return None
    lately = (ys[-1] - ys[-3]) / (xs[-1] - xs[-3])
    return (1.0, lately) if max(changes) < -_SAME else (math.exp(max(off) - off[-1]), max(power, lately))


def _polynomial(numbers: Sequence[int], values: Sequence[float], at: int) -> float:
    """Through all of these points (Lagrange's form)."""
    total = 0.0
    for number, value in zip(numbers, values, strict=True):
        for other in numbers:
            value *= (at - other) / (number - other) if other != number else 1.0
        total += value
    return total


def write(path: Path, table: TracedTable) -> None:
    """Keep a trace. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"schema": files.SCHEMA, **asdict(table)})


def read(path: Path) -> TracedTable | None:
    """The trace that was kept, None when there is none of this format."""
    try:
        document = files.read_json(path, "A memory trace")
    except (OSError, Unreadable):
        return None
    if document.get("format") != FORMAT:
        return None
    try:
        given = {name: value for name, value in document.items() if name in {f.name for f in fields(TracedTable)}}
        given["modes"] = {mode: _traces(some) for mode, some in given["modes"].items()}
        given["weights"] = [(str(dtype), [int(n) for n in shape]) for dtype, shape in given["weights"]]
        of_files, others = given.get("on_disk", (0, 0))
        given |= {"on_disk": (int(of_files), int(others)), "process_bytes": int(given.get("process_bytes", 0))}
        return TracedTable(**{**given, "assumed": tuple(given.get("assumed", ()))})
    except (TypeError, KeyError, AttributeError, ValueError):
        return None


def _traces(document: Mapping[str, Any]) -> Traces:
    return Traces(*([Trace(**trace) for trace in document[name]] for name in ("steps", "held_out")))
