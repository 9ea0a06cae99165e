"""A run as its allocations in order: load, optimizer, steps, evaluation, checkpoint. Must not know what they mean for a machine.

The engine's order (trainerd/engine/building.py, step.py, state.py): optimizer state before the first step; all micro-batches of
a step on the host together; gradients live from the first micro-batch of a step to its update.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import invert
from typing import Any, Protocol

from trainerd.memory import alike, rounds, zero2
from trainerd.memory.alike import NotAlike
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
    operations: float = 0.0
    """Results made in one micro-batch, both ways."""
    made_bytes: float = 0.0
    """Of the results made in one micro-batch, both ways: what is written, and read again."""
    num_products: int = 0
    """Different shapes of products in a step, forwards."""
    num_parameters: int = 0
    num_trainable: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    """The peak of each phase."""


class Built(Protocol):
    """A model on a tape."""

    def micro_batch(self, tape: Tape, samples: int) -> Any:
        """The largest micro-batch of so many samples."""

    def loss(self, batch: Any) -> Tensor: ...

    def evaluate(self, tape: Tape, samples: int, *, worst: bool) -> None:
        """What an evaluation allocates, beside the losses."""


def of_model(build: Callable[[Tape], Built], setup: Setup) -> Timeline:
    """The timeline of the model that `build` puts on a tape."""
    try:
        return _of_model(build, setup, skips=True)
    except NotAlike:
        return _of_model(build, setup, skips=False)


def _of_model(build: Callable[[Tape], Built], setup: Setup, *, skips: bool) -> Timeline:
    collecting = gc.isenabled()
    gc.disable()  # nothing here is circular but the leaves, and thousands of small objects come and go
    tape = Tape(setup.device, None if setup.precision == "fp32" else setup.precision)
    tape.skips, tape.attention = skips, setup.attention
    try:
        return _played(tape, build, setup)
    finally:
        tape.close()
        if collecting:
            gc.enable()


def _played(tape: Tape, build: Callable[[Tape], Built], setup: Setup) -> Timeline:
    """On a GPU two steps, for the second meets the holes the first has left; on a CPU one, beside a checkpoint's copy."""
    tape.mark(LOADING)
    model = build(tape)
    trainable = [p for p in tape.parameters if p.requires_grad]
    saved = [t.storage.size for t in [*trainable, *tape.buffers]]
    copies = [tape.new(b.shape, b.dtype) for b in tape.buffers if b.storage.size <= _STATISTICS_BYTES]
    tape.mark(OPTIMIZER)
    optimizer = _optimizer(tape, setup)
    optimizer.allocate()
    state_bytes, host_bytes = optimizer.state_bytes, optimizer.host_bytes
    staging = sum(saved) + state_bytes
    kept: list[Tensor] = []
    if setup.device == "cpu":
        tape.mark(SAVING)
        with tape.counting_as(STAGING):
            kept.append(tape.new((staging,), "uint8"))
    else:
        host_bytes += staging
    tape.kind = ACTIVATIONS
    tape.mark(STEP)
    began = tape.here()
    flops, waiting = _step(tape, model, optimizer, setup)
    played = 1 if setup.device == "cpu" else min(2, setup.accumulation)
    operations = (len(tape.sizes) - began[1] + tape.reborn) / played + tape.left_out
    made_bytes = operations * sum(tape.sizes[began[1] :]) / max(1, len(tape.sizes) - began[1])
    ended = len(tape.events)
    second, left_out = rounds.again(tape, began) if setup.device != "cpu" else ([], [])
    worst = _evaluation(tape, model, setup)
    held = levels(tape.sizes, tape.events)
    phases, highest, at_peak = _by_phase(tape.marks, held)
    breakdown, marks = tape.breakdown(at_peak), tape.marks
    if second:  # no higher than the first, but for what that left
        phases[STEP] = max(phases[STEP], rounds.highest_again(held, began[0], ended, left_out))
        tape.events[ended:ended] = second
        marks = [*marks[:-1], (ended, STEP), (ended + len(second), EVALUATING)]
    found = Timeline(
        sizes=tape.sizes,
        kinds=tape.kinds,
        events=list(tape.events),
        marks=marks,
        peak=highest,
        breakdown=breakdown,
        flops=flops,
        weight_bytes=sum(saved),
        state_bytes=state_bytes,
        host_bytes=host_bytes + waiting,
        pinned_bytes=optimizer.pinned_bytes,
        resting_bytes=held[-1],
        worst_evaluation_bytes=worst,
        operations=operations,
        made_bytes=made_bytes,
        num_products=len(set(tape.multiplied)),
        num_parameters=sum(p.numel for p in tape.parameters),
        num_trainable=sum(p.numel for p in trainable),
        peaks=phases,
    )
    del copies, kept
    return found


def _optimizer(tape: Tape, setup: Setup) -> Optimizer:
    if setup.offload == zero2.NAME:
        return zero2.Partitions(tape, setup.optimizer, setup.buckets or zero2.Buckets(), accumulates=setup.accumulation > 1)
    return Optimizer(tape, setup.optimizer, on_host=setup.offload == "optimizer")


def _step(tape: Tape, model: Built, optimizer: Optimizer, setup: Setup) -> tuple[float, int]:
    """One step of the engine; of several micro-batches two are played (on a CPU the second), for the others meet the same.

    Its work, and the bytes of its batches that wait in RAM while a GPU computes: each is copied there in its turn.
    """
    tape.flops = 0.0
    on_cpu, several = setup.device == "cpu", setup.accumulation > 1
    began = tape.here()
    window = [model.micro_batch(tape, setup.micro_batch) for _ in range(min(setup.accumulation, _WINDOW))] if on_cpu else []
    rest = _rest_of_window(tape, began, setup) if on_cpu else None
    if on_cpu and several:
        optimizer.give_gradients()
    began = began if not on_cpu else tape.here()
    batch = window[0] if window else model.micro_batch(tape, setup.micro_batch)
    waiting = 0 if on_cpu else _held_since(tape, began) * setup.effective_batch // setup.micro_batch
    with tape.autocast():
        loss = model.loss(batch)
    del batch
    tape.backward(loss)
    del loss
    optimizer.after_backward()
    alike.write_out(tape, began[0])
    if several and not on_cpu:
        rounds.follow(tape, began)
    optimizer.clip()
    optimizer.work()
    optimizer.zero_grad()
    del rest
    return tape.flops * setup.effective_batch / setup.micro_batch, waiting


def _rest_of_window(tape: Tape, began: tuple[int, int], setup: Setup) -> Tensor | None:
    """The micro-batches that wait beside those that were made since `began`."""
    left_out = setup.effective_batch - _WINDOW * setup.micro_batch
    if left_out <= 0:
        return None
    return tape.new((_held_since(tape, began) * left_out // (_WINDOW * setup.micro_batch),), "uint8")


def _held_since(tape: Tape, began: tuple[int, int]) -> int:
    """The bytes of what was made since then, and is there."""
    events = tape.events[began[0] :]
    return sum(tape.sizes[number] for number in set(events).difference(map(invert, events)) if number >= began[1])


def _evaluation(tape: Tape, model: Built, setup: Setup) -> int:
    """Losses over held-out micro-batches, and what the task adds; the worst of the latter is returned, not played."""
    tape.mark(EVALUATING)
    began = tape.here()
    with tape.no_grad(), tape.autocast():
        batch = model.micro_batch(tape, setup.micro_batch)
        loss = model.loss(batch)
        del batch, loss
        model.evaluate(tape, setup.micro_batch, worst=False)
    alike.write_out(tape, began[0])
    aside = Tape(setup.device, tape.precision)
    with aside.no_grad(), aside.autocast():
        model.evaluate(aside, setup.micro_batch, worst=True)
    return aside.peak


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
