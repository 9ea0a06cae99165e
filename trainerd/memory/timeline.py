"""A run as its allocations in order: load, optimizer, steps, evaluation, checkpoint. Must not know what they mean for a machine.

The engine's order (trainerd/engine/building.py, step.py, state.py): optimizer state before the first step; all micro-batches of
a step on the host together; gradients live from the first micro-batch of a step to its update.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from operator import invert
from typing import Any, Protocol

from trainerd.memory import orders, rounds, zero2
from trainerd.memory.native import Order
from trainerd.memory.optimizers import Optimizer
from trainerd.memory.tape import ACTIVATIONS, STAGING, Tape, Tensor, levels

LOADING, OPTIMIZER, STEP, EVALUATING, SAVING = "loading", "optimizer", "training", "evaluating", "checkpointing"
_WINDOW = 64  # a step's micro-batches lie on the host together; those beyond this many are played as one storage
_STATISTICS_BYTES = 1 << 20  # buffers up to this are kept twice, for a step that is tried again


@dataclass(frozen=True)
class Setup:
    """Everything of a plan that memory depends on."""

    device: str = "cpu"
    precision: str = "fp32"
    micro_batch: int = 1
    effective_batch: int = 1
    optimizer: str = "adamw"
    logits: str = "chunked"
    """chunked or full: the loss over many words, of a table that offers it."""
    offload: str = "none"
    """none; optimizer: its state, its own copy of the weights and the gradients lie on the host; base: frozen weights of the blocks do;
    zero2: as optimizer, in DeepSpeed's way."""
    checkpointing: str = "none"
    """none, selective or full: what the model's blocks compute again on the way back."""
    attention: str = "auto"
    """The kernel of scaled_dot_product_attention that was asked for (train.attention)."""
    compiled: bool = False
    """Whether torch.compile is on: then the estimate is that of the model without it, and says so."""
    allocator: str = ""
    """What torch's CUDA allocator is asked for by its variable (allocator_settings.py); empty: nothing, or a CPU."""
    buckets: zero2.Buckets | None = None
    """DeepSpeed's, where offload is zero2; None: its sizes as nobody says otherwise."""
    heap: str = ""
    """How the trainer's C library holds large blocks on a CPU (heap.py); empty: as it comes, or a GPU."""

    @property
    def accumulation(self) -> int:
        return -(-self.effective_batch // self.micro_batch)

    def with_micro_batch(self, samples: int) -> Setup:
        return replace(self, micro_batch=samples)


class Table(Protocol):
    """A task's model for the estimate. What a task's blocks.py brings, or what was traced."""

    @property
    def kind(self) -> str:
        """What receipts are compared by, e.g. "cadence gru"."""

    @property
    def assumed(self) -> Sequence[str]:
        """What had to be guessed, in words."""

    @property
    def offers(self) -> Collection[str]:
        """Techniques that this model's training can take: "chunked" logits, and what of checkpointing its blocks allow."""

    def timeline(self, setup: Setup) -> Timeline: ...


def tells(table: Table, setup: Setup) -> bool:
    """Whether the table can answer for this setup: one that was traced knows what it was traced with."""
    knows: Callable[[Setup], bool] = getattr(table, "tells", lambda setup: True)
    return knows(setup)


@dataclass
class Timeline:
    """The births (n) and ends (~n) of storages, their sizes, and what they were for. `host_*` lie in RAM whatever the device."""

    sizes: list[int]
    kinds: list[str]
    events: list[int]
    marks: list[tuple[int, str]]
    peak: int
    breakdown: dict[str, int]
    flops: float
    """Of one step."""
    weight_bytes: int
    """Weights that are learned, and buffers: what a checkpoint holds of the model."""
    state_bytes: int
    host_bytes: int = 0
    """Optimizer state that lives in RAM; when the device is a GPU also a checkpoint's staging copy, and a step's batches that wait."""
    pinned_bytes: int = 0
    """The part of it that a GPU copies from and to by itself."""
    streamed_bytes: int = 0
    """Frozen weights that come from the host for every micro-batch, twice."""
    on_disk_bytes: int = 0
    """Frozen weights that are read from a file as they are needed, and take no RAM."""
    resting_bytes: int = 0
    """Between steps: weights, optimizer, and what stays."""
    worst_evaluation_bytes: int = 0
    """What an evaluation may need in its worst case, beyond weights and optimizer."""
    scratch_bytes: int = 0
    """The most that one kernel of a CPU may hold beside its tensors, of those whose rule is known (scratch.py)."""
    operations: float = 0.0
    """Results made in one micro-batch, both ways."""
    made_bytes: float = 0.0
    """Of the results made in one micro-batch, both ways: what is written, and read again."""
    largest_bytes: int = 0
    """The largest of them."""
    reread_bytes: int = 0
    """Of weights that a micro-batch goes through more than once, both ways."""
    num_products: int = 0
    """Different shapes of products in a step, forwards; on a GPU nobody asks."""
    num_parameters: int = 0
    num_trainable: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    """The peak of each phase."""
    again: tuple[int, int] | None = None
    """The events from there to there happen twice, the second time right after the first, and leave nothing behind: a step, and
    the next one. None: there is no second step, or it is another one."""
    order: Callable[[], Order] | None = field(default=None, compare=False)
    """On a GPU: makes the events as they are replayed (orders.py); and the sizes they speak of, without that of cuBLAS's workspace."""
    ordered_sizes: list[int] = field(default_factory=list, compare=False)


class Built(Protocol):
    """A model on a tape. What it allocates once its optimizer is there, if anything, is made by its `ready()`."""

    def micro_batch(self, tape: Tape, samples: int) -> Any:
        """The largest micro-batch of so many samples."""

    def loss(self, batch: Any) -> Tensor: ...

    def evaluate(self, tape: Tape, samples: int, *, worst: bool) -> None:
        """What an evaluation allocates, beside the losses."""


def of_model(build: Callable[[Tape], Built], setup: Setup) -> Timeline:
    """The timeline of the model that `build` puts on a tape."""
    return told(play(build, setup, setup.micro_batch), setup)


@dataclass
class Played:
    """What happens from loading to evaluating, a step once, as it is for any accumulation: sizes and work are numbers, or lines in the
    number of samples (affine.py)."""

    tape: Tape
    events: list[int]
    """Without what ends as the tape is put away."""
    began: int
    """The first event of the step and the last one; and the first storage it makes."""
    ended: int
    first: int
    second: list[int]
    """The next step, if it is played; and the places of the first one's events that are not in it."""
    left_out: list[int]
    batch_bytes: Any
    """Of one micro-batch as it is given; and which storage stands for all others that lie on the host beside it."""
    rest: int | None
    flops: Any
    """Of one micro-batch."""
    operations: float
    steps: int
    """Micro-batches that are played of a step, and what they make in all."""
    made_bytes: Any
    reread_bytes: int
    worst_evaluation_bytes: Any
    optimizer: Optimizer
    weight_bytes: int
    num_parameters: int
    num_trainable: int
    which: list[int] | None = None
    """Where sizes are lines: of each storage its line's place, and the same for each event, of an end ~ that."""
    codes: list[int] | None = None
    order: Order | None = None


def play(build: Callable[[Tape], Built], setup: Setup, samples: Any) -> Played:
    """The model with micro-batches of so many samples; `setup` says all else."""
    collecting = gc.isenabled()
    gc.disable()  # nothing here is circular but the leaves, and thousands of small objects come and go
    tape = Tape(setup.device, None if setup.precision == "fp32" else setup.precision)
    tape.skips, tape.attention = True, setup.attention
    try:
        return _played(tape, build, setup, samples)
    finally:
        tape.close()
        if collecting:
            gc.enable()


def _played(tape: Tape, build: Callable[[Tape], Built], setup: Setup, samples: Any) -> Played:
    """On a GPU two steps, for the second meets the holes the first has left; on a CPU one, beside a checkpoint's copy."""
    tape.mark(LOADING)
    model = build(tape)
    trainable = [p for p in tape.parameters if p.requires_grad]
    saved = [t.storage.size for t in [*trainable, *tape.buffers]]
    copies = [tape.new(b.shape, b.dtype) for b in tape.buffers if b.storage.size <= _STATISTICS_BYTES]
    tape.mark(OPTIMIZER)
    optimizer = _optimizer(tape, setup)
    optimizer.allocate()
    ready: Callable[[], None] = getattr(model, "ready", _as_it_is)
    ready()
    kept: list[Tensor] = []
    if setup.device == "cpu":
        tape.mark(SAVING)
        with tape.counting_as(STAGING):
            kept.append(tape.new((sum(saved) + optimizer.state_bytes,), "uint8"))
    tape.kind = ACTIVATIONS
    tape.mark(STEP)
    began = tape.here()
    batch_bytes, rest = _step(tape, model, optimizer, setup, samples)
    flops, reread_bytes, steps = tape.flops, tape.reread_bytes, 1 if setup.device == "cpu" else min(2, setup.accumulation)
    operations = (len(tape.sizes) - began[1] + tape.reborn) / steps + tape.left_out
    ended = len(tape.events)
    births = filter((0).__le__, tape.events[began[0] : ended])
    made_bytes = sum(map(tape.sizes.__getitem__, births)) + tape.left_out_bytes * steps
    second, left_out = rounds.again(tape, began) if setup.device != "cpu" else ([], [])
    worst = _evaluation(tape, model, setup, samples)
    found = Played(
        tape=tape,
        events=list(tape.events),
        began=began[0],
        ended=ended,
        first=began[1],
        second=second,
        left_out=left_out,
        batch_bytes=batch_bytes,
        rest=rest,
        flops=flops,
        operations=operations,
        steps=steps,
        made_bytes=made_bytes,
        reread_bytes=reread_bytes,
        worst_evaluation_bytes=worst,
        optimizer=optimizer,
        weight_bytes=sum(saved),
        num_parameters=sum(p.numel for p in tape.parameters),
        num_trainable=sum(p.numel for p in trainable),
    )
    del copies, kept
    return found


def _as_it_is() -> None:
    """Of a model that allocates nothing between its optimizer and its first step."""


def _optimizer(tape: Tape, setup: Setup) -> Optimizer:
    if setup.offload == zero2.NAME:
        return zero2.Partitions(tape, setup.optimizer, setup.buckets or zero2.Buckets(), accumulates=setup.accumulation > 1)
    return Optimizer(tape, setup.optimizer, on_host=setup.offload == "optimizer")


def _step(tape: Tape, model: Built, optimizer: Optimizer, setup: Setup, samples: Any) -> tuple[Any, int | None]:
    """One step of the engine; of several micro-batches two are played (on a CPU the second), for the others meet the same. Returned are
    a micro-batch's bytes, and which storage stands for the others of the step.

    On a CPU all of its batches are there from the beginning: those that are not played, as one storage.
    """
    tape.flops = 0.0
    on_cpu, several = setup.device == "cpu", setup.accumulation > 1
    began = tape.here()
    batch = model.micro_batch(tape, samples)
    waiting = batch if on_cpu else None
    batch_bytes = _held_since(tape, began)
    rest = tape.new((0,), "uint8") if on_cpu and several else None
    if on_cpu and several:
        optimizer.give_gradients()
    began = began if not on_cpu else tape.here()
    with tape.autocast():
        loss = model.loss(batch)
    del batch
    tape.backward(loss)
    del loss
    optimizer.after_backward()
    given = batch_bytes, None if rest is None else rest.storage.number
    if several and not on_cpu:
        rounds.follow(tape, began)
    optimizer.clip()
    optimizer.work()
    optimizer.zero_grad()
    del rest, waiting
    return given


def _held_since(tape: Tape, began: tuple[int, int]) -> Any:
    """The bytes of what was made since then, and is there."""
    events = tape.events[began[0] :]
    return sum(tape.sizes[number] for number in set(events).difference(map(invert, events)) if number >= began[1])


def _evaluation(tape: Tape, model: Built, setup: Setup, samples: Any) -> Any:
    """Losses over held-out micro-batches, and what the task adds; the worst of the latter is returned, not played."""
    tape.mark(EVALUATING)
    with tape.no_grad(), tape.autocast():
        batch = model.micro_batch(tape, samples)
        loss = model.loss(batch)
        del batch, loss
        model.evaluate(tape, samples, worst=False)
    aside = Tape(setup.device, tape.precision)
    with aside.no_grad(), aside.autocast():
        model.evaluate(aside, samples, worst=True)
    return aside.peak


def told(played: Played, setup: Setup, at: Callable[[Any], Any] = lambda number: number, lines: list[int] | None = None) -> Timeline:
    """The timeline with this accumulation. Where sizes are `lines`: what they are at this micro-batch, and what says any other number
    `at` it."""
    tape, optimizer, batch_bytes = played.tape, played.optimizer, at(played.batch_bytes)
    lines, codes = (tape.sizes, played.events) if lines is None or played.codes is None else (lines, played.codes)
    sizes = lines if played.which is None else list(map(lines.__getitem__, played.which))
    window, beyond = min(setup.accumulation, _WINDOW), max(0, setup.effective_batch - _WINDOW * setup.micro_batch)
    waiting = 0
    if setup.device != "cpu":
        waiting = batch_bytes * setup.effective_batch // setup.micro_batch + played.weight_bytes + optimizer.state_bytes
    if played.rest is not None:
        sizes[played.rest] = batch_bytes * (window - 1) + batch_bytes * beyond // setup.micro_batch
        lines, codes = sizes, played.events
    held = levels(lines, codes)
    phases, highest, at_peak = _by_phase(tape.marks, held)
    breakdown, marks, events, again = tape.breakdown(at_peak, sizes), tape.marks, played.events, None
    if played.second:  # no higher than the first, but for what that left
        ended, second = played.ended, played.second
        if played.left_out:
            phases[STEP] = max(phases[STEP], rounds.highest_again(held, played.began, ended, played.left_out))
        else:
            again = played.began, ended
        events = [*events[:ended], *second, *events[ended:]]
        marks = [*marks[:-1], (ended, STEP), (ended + len(second), EVALUATING)]
    return Timeline(
        sizes=sizes,
        kinds=tape.kinds,
        events=events,
        marks=marks,
        peak=highest,
        breakdown=breakdown,
        flops=at(played.flops) * setup.effective_batch / setup.micro_batch,
        weight_bytes=played.weight_bytes,
        state_bytes=optimizer.state_bytes,
        host_bytes=optimizer.host_bytes + waiting,
        pinned_bytes=optimizer.pinned_bytes,
        resting_bytes=held[-1],
        worst_evaluation_bytes=at(played.worst_evaluation_bytes),
        scratch_bytes=at(tape.scratch) if setup.device == "cpu" else 0,
        operations=played.operations,
        made_bytes=at(played.made_bytes) / played.steps,
        reread_bytes=played.reread_bytes,
        largest_bytes=_largest(sizes, played.first, played.rest) if setup.device == "cpu" else 0,
        num_products=len({tuple(map(at, shape)) for shape in tape.multiplied}) if setup.device == "cpu" else 0,
        num_parameters=played.num_parameters,
        num_trainable=played.num_trainable,
        peaks=phases,
        again=again,
        order=partial(orders.of, played, len(lines)) if setup.device != "cpu" else None,
        ordered_sizes=lines,
    )


def _largest(sizes: Sequence[int], first: int, rest: int | None) -> int:
    """Of what a step makes; the batches that wait, as one storage, are none of it."""
    parts = (sizes[first:],) if rest is None else (sizes[first:rest], sizes[rest + 1 :])
    return max((max(part) for part in parts if part), default=0)


def _by_phase(marks: Sequence[tuple[int, str]], held: list[int]) -> tuple[dict[str, int], int, int]:
    """The highest point of every phase, of all, and after how many events that was first held."""
    found: dict[str, int] = {}
    best = at = 0
    for (begin, phase), (end, _) in pairwise([*marks, (len(held) - 1, "")]):
        some = held[begin : end + 1]
        highest = max(some)
        found[phase] = max(found.get(phase, 0), highest)
        if highest > best:
            best, at = highest, begin + some.index(highest)
    return found, best, at
