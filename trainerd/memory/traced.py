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

FORMAT = 3
_LANDINGS, _MASTERS = 2, 2  # of an optimizer on the host, as in optimizers.py


@dataclass(frozen=True)
class Trace:
    """One micro-batch's forward and backward pass: n is the birth of storage n, ~n its end; gradients are what stays.

    `complete`: after so many events, this storage is the complete gradient of a weight.
    """

    samples: int
    sizes: Sequence[int]
    events: Sequence[int]
    flops: float = 0.0
    complete: Sequence[Sequence[int]] = ()

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
    """What the planner asks, from traces: `modes` by what the model's blocks compute again, and how their frozen weights come (mode())."""

    kind: str
    precision: str
    trainable: Sequence[Sequence[int]]
    """Shapes of the weights that are learned."""
    frozen_bytes: int
    buffer_bytes: int
    modes: Mapping[str, Traces]
    streamed_bytes: int = 0
    """Of the frozen weights, what can stay on the host: that of the blocks."""
    assumed: tuple[str, ...] = ("every sample as large as the largest that was found",)
    format: int = field(default=FORMAT)

    @property
    def offers(self) -> tuple[str, ...]:
        return (*(name for name in ("selective", "full") if name in self.modes), *(("base",) if self.streamed_bytes else ()))

    def timeline(self, setup: Setup) -> Timeline:
        """Load, optimizer, a step of one or two micro-batches, an evaluation no larger than the forward pass."""
        on_cpu, on_host = setup.device == "cpu", setup.offload == "optimizer"
        learned = [_numbers(shape) * 4 for shape in self.trainable]
        states = [n * (1 if dtype == "uint8" else 4) for shape in self.trainable for n, dtype in state_of(setup.optimizer, shape)]
        streamed = self.streamed_bytes if setup.offload == "base" and not on_cpu else 0
        moving = _MASTERS * sum(learned) if on_host else 0
        played = _Player()
        played.phase(LOADING)
        played.hold(WEIGHTS, [*learned, self.frozen_bytes - streamed, self.buffer_bytes])
        played.phase(MAKING_OPTIMIZER)
        if on_cpu or not on_host:
            zeros = played.hold(GRADIENTS, [] if on_host else learned)
            played.hold(OPTIMIZER, [*states, moving])
            played.drop(zeros)
        saved = sum(learned) + sum(states) + self.buffer_bytes
        if on_cpu:
            played.phase(SAVING)
            played.hold(STAGING, [saved])
        work = self._steps(played, setup)
        played.phase(EVALUATING)
        pinned = streamed + (moving + _LANDINGS * max(learned, default=0) if on_host and not on_cpu else 0)
        return played.timeline(
            flops=work.flops * setup.effective_batch / setup.micro_batch,
            weight_bytes=sum(learned) + self.buffer_bytes,
            state_bytes=sum(states),
            host_bytes=0 if on_cpu else saved + pinned + (sum(states) if on_host else 0),
            pinned_bytes=pinned,
            streamed_bytes=streamed,
            operations=len(work.sizes),
            num_parameters=(sum(learned) + self.frozen_bytes) // 4,
            num_trainable=sum(learned) // 4,
        )

    def _steps(self, played: _Player, setup: Setup) -> Trace:
        """One step, on a GPU two; returned is the first micro-batch, which meets no gradients."""
        traces = self.modes[mode(setup.checkpointing, streams=setup.offload == "base", ahead=setup.device != "cpu")]
        first, later = (_at(some, setup.micro_batch) for some in (traces.first, traces.later))
        leave = setup.offload == "optimizer"
        for _ in range(1 if setup.device == "cpu" else 2):
            played.phase(STEP)
            left = played.run(first, leave=leave)
            if setup.accumulation > 1:
                left += played.run(first if leave else later, leave=leave)
            played.drop(left)
        return first


def mode(checkpointing: str, *, streams: bool = False, ahead: bool = False) -> str:
    """What the traces of a way to train are called. `streams`: the blocks' frozen weights are copies, made one block `ahead` on a GPU."""
    return f"{checkpointing}, base{' ahead' if ahead else ''}" if streams else checkpointing


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

    def run(self, trace: Trace, *, leave: bool = False) -> list[int]:
        """What is left alive afterwards: the gradients, unless they `leave` as soon as they are complete."""
        here: dict[int, int] = {}
        leaving: dict[int, list[int]] = {}
        for at, number in trace.complete if leave else ():
            leaving.setdefault(at, []).append(number)
        for at, event in enumerate([*trace.events, None]):
            for number in leaving.get(at, ()):
                self.drop([here.pop(number)] if number in here else [])
            if event is None:
                break
            if event >= 0:
                here[event] = self._birth(ACTIVATIONS, trace.sizes[event])
            elif ~event in here:
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
        return Trace(samples, [between(a, b) for a, b in zip(low.sizes, high.sizes, strict=True)], low.events, flops, low.complete)
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
