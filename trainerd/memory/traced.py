"""A model without a table: its allocations as they were traced at two micro-batches, stretched to any other. Must not import torch.

Each storage's size is taken as a + b * samples. When the two traces are not the same in form, only their peaks are fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainerd.contract import files
from trainerd.contract.errors import Unreadable
from trainerd.memory.optimizers import state_of
from trainerd.memory.tape import ACTIVATIONS, GRADIENTS, OPTIMIZER, STAGING, WEIGHTS
from trainerd.memory.timeline import EVALUATING, LOADING, SAVING, STEP, Setup, Timeline, peaks
from trainerd.memory.timeline import OPTIMIZER as MAKING_OPTIMIZER

FORMAT = 2


@dataclass(frozen=True)
class Trace:
    """One micro-batch's forward and backward pass: n is the birth of storage n, ~n its end; gradients are what stays."""

    samples: int
    sizes: Sequence[int]
    events: Sequence[int]
    flops: float = 0.0

    @property
    def peak(self) -> int:
        live = highest = 0
        for event in self.events:
            live += self.sizes[event] if event >= 0 else -self.sizes[~event]
            highest = max(highest, live)
        return highest


@dataclass(frozen=True)
class Traces:
    """At some micro-batches each: `first` meets no gradients, `later` those of the micro-batch before."""

    first: list[Trace]
    later: list[Trace]


@dataclass(frozen=True)
class TracedTable:
    """What the planner asks, from traces: `modes` by what the model's blocks compute again."""

    kind: str
    precision: str
    trainable: Sequence[Sequence[int]]
    """Shapes of the weights that are learned."""
    frozen_bytes: int
    buffer_bytes: int
    modes: Mapping[str, Traces]
    assumed: tuple[str, ...] = ("every sample as large as the largest that was found",)
    format: int = field(default=FORMAT)

    @property
    def offers(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if mode != "none")

    def timeline(self, setup: Setup) -> Timeline:
        """Load, optimizer, a step of one or two micro-batches, an evaluation no larger than the forward pass."""
        learned = [_numbers(shape) * 4 for shape in self.trainable]
        states = [n * (1 if dtype == "uint8" else 4) for shape in self.trainable for n, dtype in state_of(setup.optimizer, shape)]
        played = _Player()
        played.phase(LOADING)
        played.hold(WEIGHTS, [*learned, self.frozen_bytes, self.buffer_bytes])
        played.phase(MAKING_OPTIMIZER)
        zeros = played.hold(GRADIENTS, learned)
        played.hold(OPTIMIZER, states)
        played.drop(zeros)
        saved = sum(learned) + sum(states) + self.buffer_bytes
        if setup.device == "cpu":
            played.phase(SAVING)
            played.hold(STAGING, [saved])
        traces = self.modes[setup.checkpointing]
        first, later = (_at(some, setup.micro_batch) for some in (traces.first, traces.later))
        for _ in range(1 if setup.device == "cpu" else 2):
            played.phase(STEP)
            left = played.run(first)
            if setup.accumulation > 1:
                left += played.run(later)
            played.drop(left)
        played.phase(EVALUATING)
        return played.timeline(
            flops=first.flops * setup.effective_batch / setup.micro_batch,
            weight_bytes=sum(learned) + self.buffer_bytes,
            state_bytes=sum(states),
            host_bytes=0 if setup.device == "cpu" else saved,
            operations=len(first.sizes),
            num_parameters=(sum(learned) + self.frozen_bytes) // 4,
            num_trainable=sum(learned) // 4,
        )


class _Player:
    """Strings storages together to one timeline."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.events: list[int] = []
        self.marks: list[tuple[int, str]] = []
        self.alive: dict[int, None] = {}

    def phase(self, name: str) -> None:
        self.marks.append((len(self.events), name))

    def hold(self, kind: str, sizes: Sequence[int]) -> list[int]:
        made = []
        for size in sizes:
            if size:
                made.append(self._birth(kind, size))
        return made

    def drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self.alive:
                self.events.append(~number)
                del self.alive[number]

    def run(self, trace: Trace) -> list[int]:
        """What is left alive afterwards: the gradients."""
        here: dict[int, int] = {}
        for event in trace.events:
            if event >= 0:
                here[event] = self._birth(ACTIVATIONS, trace.sizes[event])
            else:
                self.drop([here.pop(~event)])
        for number in here.values():
            self.kinds[number] = GRADIENTS
        return list(here.values())

    def _birth(self, kind: str, size: int) -> int:
        number = len(self.sizes)
        self.sizes.append(size)
        self.kinds.append(kind)
        self.events.append(number)
        self.alive[number] = None
        return number

    def timeline(self, **numbers: Any) -> Timeline:
        live = highest = 0
        alive: dict[int, None] = {}
        at_peak: list[int] = []
        for event in self.events:
            if event >= 0:
                live += self.sizes[event]
                alive[event] = None
                if live > highest:
                    highest, at_peak = live, []
            else:
                if live == highest and not at_peak:
                    at_peak = list(alive)
                live -= self.sizes[~event]
                alive.pop(~event, None)
        breakdown: dict[str, int] = {}
        for number in at_peak or list(alive):
            breakdown[self.kinds[number]] = breakdown.get(self.kinds[number], 0) + self.sizes[number]
        found = Timeline(self.sizes, self.kinds, self.events, self.marks, peak=highest, breakdown=breakdown, resting_bytes=live, **numbers)
        found.peaks = peaks(found)
        return found


def _at(traces: Sequence[Trace], samples: int) -> Trace:
    """The trace at this micro-batch: every size on the line through the two that were traced."""
    exact = next((trace for trace in traces if trace.samples == samples), None)
    if exact is not None or len(traces) == 1:
        return exact or traces[0]
    low, high = traces[0], traces[-1]
    step = high.samples - low.samples

    def between(one: int, other: int) -> int:
        return max(0, round(one + (other - one) * (samples - low.samples) / step))

    flops = float(between(round(low.flops), round(high.flops)))
    if list(low.events) == list(high.events):
        return Trace(samples, [between(a, b) for a, b in zip(low.sizes, high.sizes, strict=True)], low.events, flops)
    kept = [sum(t.sizes) - sum(t.sizes[~e] for e in t.events if e < 0) for t in (low, high)]
    staying, peak = between(*kept), between(low.peak, high.peak)
    return Trace(samples, [staying, max(0, peak - staying)], [0, 1, ~1], flops)


def _numbers(shape: Sequence[int]) -> int:
    numbers = 1
    for n in shape:
        numbers *= n
    return numbers


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
        return TracedTable(**{**given, "assumed": tuple(given.get("assumed", ()))})
    except (TypeError, KeyError, AttributeError):
        return None


def _traces(document: Mapping[str, Any]) -> Traces:
    return Traces([Trace(**trace) for trace in document["first"]], [Trace(**trace) for trace in document["later"]])
