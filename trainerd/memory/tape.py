"""Tensors without contents: a training step written with them allocates and frees what torch would. Must not import torch.

A storage is freed when nothing refers to it any more, as in torch; what the backward pass needs is referred to by its
node until that has run (backward.py). When a leaf takes a gradient as it is, is torch's own rule (accumulate_grad.h).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, count
from math import prod
from operator import invert, neg
from typing import Any

from trainerd.memory import backward

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16}
WEIGHTS, ADAPTERS, BUFFERS, OPTIMIZER = "weights", "adapters", "buffers", "optimizer"
GRADIENTS, ACTIVATIONS, LOGITS, CASTS, STAGING = "gradients", "activations", "logits", "casts", "staging"

Shape = tuple[int, ...]
_FIRST = -1  # leaves take their gradient as soon as it is complete


class Storage:
    """Bytes from the allocator; given back when the last tensor that shares them is gone. Made by Tape.new alone."""

    # Without __init__, like Tensor and Node: thousands are made for one answer, and a call costs as much as all the rest. Of more than
    # three values that are assigned at once Python makes a tuple.
    __slots__ = ("ended", "number", "size")
    ended: Callable[[int], None]
    number: int
    size: int

    def __del__(self) -> None:
        self.ended(~self.number)


class Tensor:
    """A shape and a type over a storage. `node` is what made it, when a gradient can flow back through it."""

    __slots__ = ("contiguous", "dtype", "grad", "leaf", "node", "output", "shape", "storage", "tape")
    tape: Tape
    shape: Shape
    dtype: str
    storage: Storage
    node: Node | None
    output: int
    leaf: bool
    grad: Tensor | None
    contiguous: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    def view(self, *shape: int, contiguous: bool = True) -> Tensor:
        """The same bytes, without history: ops.py makes views that gradients flow through."""
        seen = Tensor()
        seen.tape, seen.storage = self.tape, self.storage
        seen.shape, seen.dtype, seen.contiguous = shape, self.dtype, contiguous
        seen.node = seen.grad = None
        seen.output, seen.leaf = 0, False
        return seen

    def detach(self) -> Tensor:
        seen = Tensor()
        seen.tape, seen.storage = self.tape, self.storage
        seen.shape, seen.dtype, seen.contiguous = self.shape, self.dtype, self.contiguous
        seen.node = seen.grad = None
        seen.output, seen.leaf = 0, False
        return seen


Backward = Callable[["Node", "list[Tensor | None]"], "Sequence[Tensor | None]"]


class Node:
    """One step of the way back. `saved` are the tensors it needs, let go as soon as it has run."""

    __slots__ = ("about", "backward", "edges", "grads", "num_outputs", "order", "saved", "shapes", "variable", "waiting")
    backward: Backward
    order: int
    edges: list[tuple[Node, int] | None]
    saved: tuple[Any, ...]
    about: tuple[Any, ...]
    shapes: list[tuple[Shape, str] | None]
    num_outputs: int
    variable: Tensor | None
    waiting: int
    """While the way back is gone: so many edges have not brought their gradient yet."""
    grads: list[Tensor | None] | None

    def needs(self, place: int) -> bool:
        return self.edges[place] is not None


def _node(backward: Backward, order: int, edges: list[tuple[Node, int] | None]) -> Node:
    made = Node()
    made.backward, made.order, made.edges = backward, order, edges
    made.saved = made.about = ()
    made.shapes = []
    made.num_outputs, made.waiting = 1, 0
    made.variable = made.grads = None
    return made


class Tape:
    """Everything that is allocated and freed, in order: `events` holds n for the n-th storage's birth and ~n for its end."""

    def __init__(self, device: str = "cuda", autocast: str | None = None) -> None:
        self.device = device
        self.precision = autocast
        """The type autocast computes in; None: no autocast."""
        self.casting = False
        self.attention = "auto"
        """The kernel of attention that was asked for: math holds a table of scores."""
        self.adds_in_place = True
        """torch adds gradients in place where it may; never while a dispatch mode is counting."""
        self.leaving: Callable[[Tensor], bool] | None = None
        """Takes a gradient as soon as it is complete, and returns that it has left the device: the optimizer is on the host."""
        self.casts: dict[int, Tensor] = {}
        self.grad_enabled = True
        self.kind = WEIGHTS
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.events: list[int] = []
        self.marks: list[tuple[int, str]] = []
        self._ended = self.events.append
        self._live = self._peak = self._peak_event = self._counted = 0
        self.round: tuple[int, int, set[int]] = (0, 0, set())
        """Where storages that had ended began to be born again, under the same number (rounds.py): the next event and the next new
        storage, and what was there. How many were."""
        self.reborn = 0
        self.given: list[tuple[int, int, str]] = []
        """Gradients that leaves took as they were: when, which storage, and of which kind it had been."""
        self.flops = 0.0
        self.scratch = 0
        """The most that one kernel holds beside its tensors, of those that are known (scratch.py); it is in no event."""
        self.keeping: Any = None
        """While a selective checkpoint's block is run: what keeps its products (checkpointing.py)."""
        self.multiplied: list[tuple[int, ...]] = []
        """The shapes of all products, forwards."""
        self.skips = False
        """Whether what is like others may be counted instead of played (losses.py)."""
        self.left_out = 0  # tensors of pieces that were counted without being played, and their bytes (losses.py)
        self.left_out_bytes = 0
        self.reread_bytes = 0
        """Of weights that are gone through once more at each place of a recurrent layer."""
        self.parameters: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self._order = count()

    def new(self, shape: Shape, dtype: str) -> Tensor:
        """A tensor over a storage of its own."""
        size = prod(shape) * BYTES[dtype]  # first: it may be none that can be computed (affine.py)
        storage = Storage()
        sizes = self.sizes
        storage.size = size
        storage.number = number = len(sizes)
        storage.ended = ended = self._ended
        sizes.append(size)
        self.kinds.append(self.kind)
        ended(number)  # events.append: it is born
        made = Tensor()
        made.tape, made.storage = self, storage
        made.shape, made.dtype, made.contiguous = shape, dtype, True
        made.node = made.grad = None
        made.output, made.leaf = 0, False
        return made

    @property
    def live(self) -> int:
        """Bytes held now."""
        self._count()
        return self._live

    @property
    def peak(self) -> int:
        """The most that was held; may be set, to begin anew."""
        self._count()
        return self._peak

    @peak.setter
    def peak(self, held: int) -> None:
        self._count()
        self._peak = held

    def _count(self) -> None:
        """What has happened since this was asked last."""
        events = self.events[self._counted :] if self._counted else self.events
        if events:
            held = levels(self.sizes, events, self._live)
            highest = max(held)
            if highest > self._peak:
                self._peak, self._peak_event = highest, self._counted + held.index(highest)
            self._live = held[-1]
            self._counted += len(events)

    def product(self, shape: Shape, dtype: str, flops: float) -> Tensor:
        """The result of so much work: a checkpoint may keep it."""
        if self.keeping is not None:
            kept: Tensor = self.keeping.result(self, shape, dtype, flops)
            return kept
        self.flops += flops
        return self.new(shape, dtype)

    def parameter(self, *shape: int, dtype: str = "fp32", trainable: bool = True, kind: str = WEIGHTS) -> Tensor:
        """A weight; it lives as long as the tape."""
        with self.counting_as(kind):
            made = self.new(shape, dtype)
        if trainable:
            self.watch(made)
            made.leaf = True
        self.parameters.append(made)
        return made

    def watch(self, tensor: Tensor) -> None:
        """From here on, `tensor.grad` takes the gradient that flows back to it."""
        tensor.node = _node(_accumulate, _FIRST, [])
        tensor.node.variable = tensor

    def buffer(self, *shape: int, dtype: str = "fp32") -> Tensor:
        """A tensor that stays and is not learned."""
        with self.counting_as(BUFFERS):
            made = self.new(shape, dtype)
        self.buffers.append(made)
        return made

    def input(self, *shape: int, dtype: str = "int64") -> Tensor:
        """A part of the batch."""
        return self.new(shape, dtype)

    def mark(self, phase: str) -> None:
        """From here on, this phase."""
        self.marks.append((len(self.events), phase))

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        """Storages made inside are of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    @contextmanager
    def autocast(self, enabled: bool = True) -> Iterator[None]:
        """What torch.autocast does; the outermost one forgets its low copies of the weights at its end."""
        before, self.casting = self.casting, enabled and self.precision is not None
        try:
            yield
        finally:
            self.casting = before
            if not before:
                self.casts.clear()

    def record(
        self, made: Sequence[Tensor], given: Sequence[Tensor | None], backward: Backward, saved: tuple[Any, ...] = (), *about: Any
    ) -> None:
        """Remember how `made` came from `given`, if a gradient can flow back. `saved` lives until the node has run."""
        if not self.grad_enabled:
            return
        edges: list[tuple[Node, int] | None] = []
        shapes: list[tuple[Shape, str] | None] = []
        flows = False
        for t in given:
            if t is None:
                edges.append(None)
                shapes.append(None)
                continue
            shapes.append((t.shape, t.dtype))
            made_by = t.node
            if made_by is None:
                edges.append(None)
            else:
                edges.append((made_by, t.output))
                flows = True
        if not flows:
            return
        node = Node()
        node.backward, node.order, node.edges = backward, next(self._order), edges
        node.saved, node.about, node.shapes = saved, about, shapes
        node.num_outputs, node.waiting = len(made), 0
        node.variable = node.grads = None
        for place, tensor in enumerate(made):
            tensor.node, tensor.output = node, place

    def backward(self, loss: Tensor) -> None:
        """The gradients of every parameter `loss` came from. Later made nodes run first, leaves as soon as they can."""
        assert loss.node is not None, "nothing to learn: no gradient flows to a parameter"
        with self.no_grad(), self.counting_as(ACTIVATIONS):
            first = self.new(loss.shape, loss.dtype)  # torch's caller holds it to the end
            self.run([(loss.node, loss.output, first)])

    def run(self, roots: list[tuple[Node, int, Tensor]]) -> None:
        """The way back from these nodes' outputs, with these gradients; see backward.py."""
        backward.run(roots)

    def here(self) -> tuple[int, int]:
        """The next event, and the next storage."""
        return len(self.events), len(self.sizes)

    def close(self) -> None:
        """Let go of the parameters: each holds its node and this tape, and those it; and of who takes gradients, for it holds the tape.
        What is left in a circle only the collector finds, and that costs an answer a tenth of its time."""
        self.leaving = None
        for parameter in self.parameters:
            parameter.node = parameter.grad = None
        self.parameters, self.buffers = [], []

    def breakdown(self, at: int | None = None, sizes: Sequence[int] | None = None) -> dict[str, int]:
        """Bytes by kind at the peak, or after so many events; `sizes`: where those of the tape are no numbers (affine.py)."""
        if at is None:
            self._count()
        kinds, sizes, found = self.kinds, self.sizes if sizes is None else sizes, dict[str, int]()
        for number in sorted(self.there(self._peak_event if at is None else at)):
            kind = kinds[number]
            found[kind] = found.get(kind, 0) + sizes[number]
        return found

    def there(self, at: int) -> set[int]:
        """The storages that have been born and not ended after so many events."""
        begin, _, before = self.round if at >= self.round[0] else (0, 0, ())
        some = self.events[begin:at]
        found = set(before).union(some).difference(map(invert, some))
        return {number for number in found if number >= 0}


def levels(sizes: Sequence[int], events: Sequence[int], before: int = 0) -> list[int]:
    """What is held before the first event, and after each."""
    # An end is looked up from the back: sizes[n] for n, -sizes[n] for ~n.
    changes = [*sizes, *map(neg, reversed(sizes))]
    return list(accumulate(map(changes.__getitem__, events), initial=before))


def _accumulate(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    """A leaf takes its gradient: the tensor itself the first time, added in place later."""
    variable, grad = node.variable, grads[0]
    grads[0] = None
    if variable is None or grad is None or (variable.leaf and grad.tape.leaving is not None and grad.tape.leaving(grad)):
        return ()
    if variable.grad is None:
        tape, taken = grad.tape, sys.getrefcount(grad) == 2
        if not taken:
            grad = tape.new(grad.shape, grad.dtype)
        variable.grad = grad
        if variable.leaf:
            number = grad.storage.number
            if taken:
                tape.given.append((len(tape.events), number, tape.kinds[number]))
            tape.kinds[number] = GRADIENTS
    elif not grad.tape.adds_in_place:
        variable.grad = None
        variable.grad = grad.tape.new(grad.shape, grad.dtype)
        if variable.leaf:
            grad.tape.kinds[variable.grad.storage.number] = GRADIENTS
    return ()
