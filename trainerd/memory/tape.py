"""Tensors without contents: a training step written with them allocates and frees what torch would. Must not import torch.

A storage is freed when nothing refers to it any more, as in torch; what the backward pass needs is referred to by its
node until that has run. The order of the backward pass, and when gradients are added in place, are torch's own rules
(torch/csrc/autograd/engine.cpp, input_buffer.cpp, accumulate_grad.h).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from math import prod
from typing import Any

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
WEIGHTS, ADAPTERS, BUFFERS, OPTIMIZER = "weights", "adapters", "buffers", "optimizer"
GRADIENTS, ACTIVATIONS, LOGITS, CASTS, STAGING = "gradients", "activations", "logits", "casts", "staging"

Shape = tuple[int, ...]
_FIRST = -1  # leaves take their gradient as soon as it is complete


class Storage:
    """Bytes from the allocator; given back when the last tensor that shares them is gone."""

    __slots__ = ("number", "size", "tape")

    def __init__(self, tape: Tape, size: int) -> None:
        self.tape = tape
        self.size = size
        sizes, events = tape.sizes, tape.events
        self.number = number = len(sizes)
        sizes.append(size)
        tape.kinds.append(tape.kind)
        events.append(number)
        tape.live = live = tape.live + size
        if live > tape.peak:
            tape.peak, tape.peak_event = live, len(events)

    def __del__(self) -> None:
        self.tape.live -= self.size
        self.tape.events.append(~self.number)


class Tensor:
    """A shape and a type over a storage. `node` is what made it, when a gradient can flow back through it."""

    __slots__ = ("contiguous", "dtype", "grad", "leaf", "node", "output", "shape", "storage", "tape")

    def __init__(self, tape: Tape, shape: Shape, dtype: str, storage: Storage) -> None:
        self.tape = tape
        self.shape = shape
        self.dtype = dtype
        self.storage = storage
        self.node: Node | None = None
        self.output = 0
        self.leaf = False
        self.grad: Tensor | None = None
        self.contiguous = True

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    def view(self, *shape: int, contiguous: bool = True) -> Tensor:
        """The same bytes, without history: ops.py makes views that gradients flow through."""
        seen = Tensor(self.tape, shape, self.dtype, self.storage)
        seen.contiguous = contiguous
        return seen

    def detach(self) -> Tensor:
        return self.view(*self.shape, contiguous=self.contiguous)


Backward = Callable[["Node", "list[Tensor | None]"], "Sequence[Tensor | None]"]


class Node:
    """One step of the way back. `saved` are the tensors it needs, let go as soon as it has run."""

    __slots__ = ("about", "backward", "edges", "num_outputs", "order", "saved", "shapes", "variable")

    def __init__(self, backward: Backward, order: int, edges: list[tuple[Node, int] | None]) -> None:
        self.backward = backward
        self.order = order
        self.edges = edges
        self.saved: tuple[Any, ...] = ()
        self.about: tuple[Any, ...] = ()
        self.shapes: list[tuple[Shape, str] | None] = []
        self.num_outputs = 1
        self.variable: Tensor | None = None

    def needs(self, place: int) -> bool:
        return self.edges[place] is not None


class Tape:
    """Everything that is allocated and freed, in order: `events` holds n for the n-th storage's birth and ~n for its end."""

    def __init__(self, device: str = "cuda", autocast: str | None = None) -> None:
        self.device = device
        self.precision = autocast
        """The type autocast computes in; None: no autocast."""
        self.casting = False
        self.adds_in_place = True
        """torch adds gradients in place where it may; never while a dispatch mode is counting."""
        self.gradients_leave = False
        """A gradient leaves the device as soon as it is complete: the optimizer is on the host."""
        self.casts: dict[int, Tensor] = {}
        self.grad_enabled = True
        self.kind = WEIGHTS
        self.sizes: list[int] = []
        self.kinds: list[str] = []
        self.events: list[int] = []
        self.marks: list[tuple[int, str]] = []
        self.live = self.peak = self.peak_event = 0
        self.flops = 0.0
        self.keeping: Any = None
        """While a selective checkpoint's block is run: what keeps its products (checkpointing.py)."""
        self.products: set[tuple[int, ...]] = set()
        """The different shapes that were multiplied, forwards."""
        self.parameters: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self._order = count()

    def new(self, shape: Shape, dtype: str) -> Tensor:
        """A tensor over a storage of its own."""
        return Tensor(self, shape, dtype, Storage(self, prod(shape) * BYTES[dtype]))

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
        tensor.node = Node(_accumulate, _FIRST, [])
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
            if t.node is None:
                edges.append(None)
            else:
                edges.append((t.node, t.output))
                flows = True
        if not flows:
            return
        node = Node(backward, next(self._order), edges)
        node.saved, node.about, node.num_outputs, node.shapes = saved, about, len(made), shapes
        for place, tensor in enumerate(made):
            tensor.node, tensor.output = node, place

    def backward(self, loss: Tensor) -> None:
        """The gradients of every parameter `loss` came from. Later made nodes run first, leaves as soon as they can."""
        assert loss.node is not None, "nothing to learn: no gradient flows to a parameter"
        with self.no_grad(), self.counting_as(ACTIVATIONS):
            first = self.new(loss.shape, loss.dtype)  # torch's caller holds it to the end
            self.run([(loss.node, loss.output, first)])

    def run(self, roots: list[tuple[Node, int, Tensor]]) -> None:
        """The engine: nodes in order, each when all that lead to it have run. `roots` is emptied: nobody else may hold those."""
        waiting = _dependencies([node for node, _, _ in roots])
        buffers: dict[int, list[Tensor | None]] = {}
        ready: list[tuple[int, int, Node]] = []
        turn = count()  # of leaves, the one that was complete first
        for node, output, grad in roots:
            buffers.setdefault(id(node), [None] * node.num_outputs)[output] = grad
            if not waiting.get(id(node)):
                heappush(ready, (-node.order if node.order >= 0 else -sys.maxsize, next(turn), node))
        roots.clear()
        grad = None  # type: ignore[assignment]
        while ready:
            node = heappop(ready)[2]
            grads = buffers.pop(id(node), [None])
            outputs = list(node.backward(node, grads))
            del grads
            node.saved = ()
            outputs.reverse()
            for edge in node.edges:
                grad_out = outputs.pop()
                if edge is None:
                    continue
                target, place = edge
                buffer = buffers.setdefault(id(target), [None] * target.num_outputs)
                if grad_out is not None:
                    _add(buffer, place, [grad_out])
                del grad_out
                waiting[id(target)] -= 1
                if not waiting[id(target)]:
                    heappush(ready, (-target.order if target.order >= 0 else -sys.maxsize, next(turn), target))

    def repeat(self, began: int) -> None:
        """The events since `began` once more, but for what was made in them and is still there."""
        played = self.events[began:]
        ended = {~event for event in played if event < 0}
        born = [event for event in played if event in ended]
        again = dict(zip(born, range(len(self.sizes), len(self.sizes) + len(born)), strict=True))
        again |= {~event: ~number for event, number in again.items()}
        self.sizes += [self.sizes[event] for event in born]
        self.kinds += [self.kinds[event] for event in born]
        self.events += [again[event] for event in played if event in again]

    def close(self) -> None:
        """Let go of the parameters: each holds its node, and that the parameter."""
        for parameter in self.parameters:
            parameter.node = parameter.grad = None

    def breakdown(self) -> dict[str, int]:
        """Bytes by kind at the peak."""
        before = self.events[: self.peak_event]
        ended = {~event for event in before if event < 0}
        found: dict[str, int] = {}
        for number in before:
            if number >= 0 and number not in ended:
                found[self.kinds[number]] = found.get(self.kinds[number], 0) + self.sizes[number]
        return found


def _dependencies(roots: list[Node]) -> dict[int, int]:
    """How many edges lead to each node."""
    waiting: dict[int, int] = {}
    seen = {id(node) for node in roots}
    left = list(roots)
    while left:
        for edge in left.pop().edges:
            if edge is None:
                continue
            key = id(edge[0])
            waiting[key] = waiting.get(key, 0) + 1
            if key not in seen:
                seen.add(key)
                left.append(edge[0])
    return waiting


def owned(tensor: Tensor, others: int) -> bool:
    """Whether only the caller refers to this tensor and its bytes, so that it may be changed in place.

    `others` is how many references besides the buffer's own the caller knows of.
    """
    return sys.getrefcount(tensor) <= others + 3 and sys.getrefcount(tensor.storage) <= 2


def _add(buffer: list[Tensor | None], place: int, given: list[Tensor]) -> None:
    """Add a gradient to what has come before: in place when nobody else looks at it, else into a new tensor."""
    old = buffer[place]
    if old is None:
        buffer[place] = given.pop()
    elif not (old.tape.adds_in_place and owned(old, 1) and old.contiguous):
        buffer[place] = None
        total = old.tape.new(old.shape, old.dtype)
        buffer[place] = total


def _accumulate(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    """A leaf takes its gradient: the tensor itself the first time, added in place later."""
    variable, grad = node.variable, grads[0]
    grads[0] = None
    if variable is None or grad is None or (variable.leaf and grad.tape.gradients_leave):
        return ()
    if variable.grad is None:
        if sys.getrefcount(grad) > 2:
            grad = grad.tape.new(grad.shape, grad.dtype)
        variable.grad = grad
        if variable.leaf:
            grad.tape.kinds[grad.storage.number] = GRADIENTS
    elif not grad.tape.adds_in_place:
        variable.grad = None
        variable.grad = grad.tape.new(grad.shape, grad.dtype)
        if variable.leaf:
            grad.tape.kinds[variable.grad.storage.number] = GRADIENTS
    return ()
