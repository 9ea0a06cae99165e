"""Activation checkpointing: a block keeps its inputs, or also what is dear to compute, and is run again on the way back.

Must not know any block. torch's non-reentrant form: the second forward begins when the way back reaches the block, and stops as
soon as the last tensor has been saved that the way back needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from trainerd.memory.tape import Backward, Node, Shape, Tape, Tensor


class _Keeping:
    """Results of products, in order: made the first time, given back the second."""

    def __init__(self) -> None:
        self._kept: deque[Tensor] = deque()
        self._again = False

    def result(self, tape: Tape, shape: Shape, dtype: str, flops: float) -> Tensor:
        """What a product makes, at this price the first time."""
        if self._again:
            return self._kept.popleft()
        tape.flops += flops
        made = tape.new(shape, dtype)
        self._kept.append(made.detach())
        return made

    @contextmanager
    def on(self, tape: Tape, *, again: bool) -> Iterator[None]:
        """While a block is run, the first or the second time."""
        self._again, before, tape.keeping = again, tape.keeping, self
        try:
            yield
        finally:
            tape.keeping = before


def checkpointed(block: Callable[..., Tensor], *given: Tensor, keeps: bool = False) -> Tensor:
    """block(*given), without what it would save; with `keeps`, but for the results of its products. Gradients of its parameters are
    made when the way back comes by."""
    tape = given[0].tape
    if not tape.grad_enabled:
        return block(*given)
    first = len(tape.parameters)
    keeping = _Keeping() if keeps else None
    with tape.no_grad(), keeping.on(tape, again=False) if keeping else nullcontext():
        made = block(*given)
    assert len(tape.parameters) == first, "a checkpointed block must not make parameters"
    # The parameters the block will lead back to are not known before it is run again: a leaf of this tape stands for them.
    anchor = next((p for p in tape.parameters if p.requires_grad), None)
    tape.record([made], [*given, anchor], _again, tuple(t.detach() for t in given), block, tape.casting, keeping)
    return made


def _again(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    g, grads[0] = grads[0], None
    if g is None:
        return [None] * len(node.edges)
    block, casting, keeping = node.about
    tape = g.tape
    inputs = [_leaf(t, node.needs(place)) for place, t in enumerate(node.saved)]
    before, tape.grad_enabled = tape.grad_enabled, True
    stop = _Stop(tape)
    try:
        with tape.autocast(casting), keeping.on(tape, again=True) if keeping else nullcontext(), stop.looking():
            made = block(*inputs)
    finally:
        tape.grad_enabled = before
    root, output = made.node, made.output
    del made
    stop.apply()
    roots = [] if root is None else [(root, output, g)]
    del g
    tape.run(roots)
    found = [t.grad for t in inputs]
    for leaf in inputs:
        if leaf.node is not None:
            leaf.node.variable = leaf.node = leaf.grad = None  # a circle would keep its bytes
    return [*found, None]


class _Stop:
    """Where the second forward ends: what comes after the last saved tensor is played, and taken back.

    An operation that saves its inputs is not computed any more. If a checkpoint has kept its result, that waits for the block's end.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape, self._began = tape, len(tape.sizes)
        self._at = self._first = -1
        self._flops = self._before = tape.flops
        self._waits: Tensor | None = None

    @contextmanager
    def looking(self) -> Iterator[None]:
        """While the block is run."""
        tape: Any = self._tape
        tape.record = self._record
        try:
            yield
        finally:
            del tape.record  # the method is there again

    def _record(self, made: Sequence[Tensor], given: Any, backward: Backward, saved: tuple[Any, ...] = (), *about: Any) -> None:
        Tape.record(self._tape, made, given, backward, saved, *about)
        flops, self._before = self._before, self._tape.flops
        kept = {t.storage.number for t in saved if isinstance(t, Tensor)}
        if not kept or made[0].node is None:
            return
        events, self._waits = self._tape.events, None
        self._at, self._first, self._flops = len(events), len(self._tape.sizes), self._before
        born, anew = made[0].storage.number, made[0].storage.number >= self._began
        if born in kept or (anew and max(kept) > born):
            return  # a result of it is saved, too
        self._flops = flops
        if anew:
            self._first, self._at = born, len(events) - 1 - events[::-1].index(born)
        else:
            self._waits = made[0].detach()

    def apply(self) -> None:
        """The block's result is gone: so is all that was made after that point, as if it had had no bytes."""
        tape = self._tape
        if self._at < 0:
            return
        for event in tape.events[self._at :]:
            if ~event >= self._first:
                tape.sizes[~event] = 0
        if not tape.cuts:
            tape.flops = self._flops


def _leaf(saved: Tensor, needed: bool) -> Tensor:
    """The input again, collecting its gradient."""
    leaf = saved.detach()
    if needed:
        leaf.tape.watch(leaf)
    return leaf
