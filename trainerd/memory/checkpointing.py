"""Activation checkpointing: a block keeps its inputs, or also what is dear to compute, and is run again on the way back.

Must not know any block. torch's non-reentrant form: the second forward begins when the way back first needs something that the block
would have saved, and stops as soon as the last such tensor is there.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from trainerd.memory.ops import Unpacked
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
    """block(*given), without what it would save; with `keeps`, but for the results of its products."""
    tape = given[0].tape
    if not tape.grad_enabled:
        return block(*given)
    first, run = len(tape.parameters), _Run(tape, block, given, _Keeping() if keeps else None)
    with run.forwards():
        made = block(*given)
    assert len(tape.parameters) == first, "a checkpointed block must not make parameters"
    return made


class _Run:
    """One run of a block: its way back is there from the beginning, and what the nodes have saved is made again when the first of them
    needs it. What comes before that node on the way back and saves nothing is done by then, as in torch."""

    def __init__(self, tape: Tape, block: Callable[..., Tensor], given: Sequence[Tensor], keeping: _Keeping | None) -> None:
        self._tape, self._block, self._keeping, self._casting = tape, block, keeping, tape.casting
        self._given = [(t.detach(), t.requires_grad) for t in given]
        self._stop: _Stop | None = None
        self._waiting: list[weakref.ref[Backward]] = []
        """The way back of each node that has saved something: gone where nothing leads to the node any more (the end of a chain that was
        computed and dropped), and what it saves the second time nobody keeps."""

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """While the block is run for the first time."""
        with self._recording(self._record), self._kept(again=False):
            yield

    @contextmanager
    def _recording(self, record: Callable[..., None]) -> Iterator[None]:
        tape: Any = self._tape
        tape.record = record
        try:
            yield
        finally:
            del tape.record  # the method is there again

    def _kept(self, *, again: bool) -> AbstractContextManager[None]:
        return self._keeping.on(self._tape, again=again) if self._keeping else nullcontext()

    def _record(self, made: Sequence[Tensor], given: Any, backward: Backward, saved: tuple[Any, ...] = (), *about: Any) -> None:
        if any(isinstance(t, Tensor) for t in saved):
            unpacking = self._unpacking(len(self._waiting), backward)
            Tape.record(self._tape, made, given, unpacking, (), *about)
            if made[0].node is not None:
                self._waiting.append(weakref.ref(unpacking))
        else:
            Tape.record(self._tape, made, given, backward, saved, *about)

    def _unpacking(self, place: int, backward: Backward) -> Backward:
        def unpacked(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
            stop = self._stop or self._again()
            node.saved, stop.saved[place] = Unpacked(stop.saved[place]), ()
            node.backward = backward  # nothing holds this run, and its inputs, when the last of its nodes is done
            return backward(node, grads)

        return unpacked

    def _again(self) -> _Stop:
        """The second run, up to the last tensor that the way back needs."""
        tape, stop = self._tape, _Stop(self._tape, [of() is not None for of in self._waiting])
        self._stop = stop
        inputs = [_leaf(t, needed) for t, needed in self._given]
        before, tape.grad_enabled = tape.grad_enabled, True
        try:
            with tape.autocast(self._casting), self._kept(again=True), self._recording(stop.record):
                made = self._block(*inputs)
        finally:
            tape.grad_enabled = before
        del made
        for leaf in inputs:
            node, leaf.node = leaf.node, None
            if node is not None:
                node.variable = None  # a circle would keep its bytes
        stop.apply()
        assert len(stop.saved) == len(self._waiting), "a block that is computed again must do the same again"
        return stop


class _Stop:
    """Where the second forward ends: what comes after the last saved tensor is played, and taken back.

    An operation that saves its inputs is not computed any more. If a checkpoint has kept its result, that waits for the block's end.
    """

    def __init__(self, tape: Tape, wanted: Sequence[bool]) -> None:
        self._tape, self._began, self._wanted = tape, len(tape.sizes), wanted
        self._at = self._first = -1
        self._flops = self._before = tape.flops
        self._waits: Tensor | None = None
        self.saved: list[tuple[Any, ...]] = []

    def record(self, made: Sequence[Tensor], given: Any, backward: Backward, saved: tuple[Any, ...] = (), *about: Any) -> None:
        Tape.record(self._tape, made, given, backward, saved, *about)
        flops, self._before = self._before, self._tape.flops
        kept = {t.storage.number for t in saved if isinstance(t, Tensor)}
        if not kept or made[0].node is None:
            return
        place = len(self.saved)
        self.saved.append(saved if place < len(self._wanted) and self._wanted[place] else ())
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
        tape.flops = self._flops


def _leaf(saved: Tensor, needed: bool) -> Tensor:
    """The input again, collecting its gradient."""
    leaf = saved.detach()
    if needed:
        leaf.tape.watch(leaf)
    return leaf
