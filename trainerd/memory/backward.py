"""torch's way back: later made nodes run first, leaves as soon as their gradient is complete, and what meets is added up.

The rules are those of torch/csrc/autograd/engine.cpp and input_buffer.cpp. When something may be changed in place is seen from
who else refers to it, as in torch. Must not know any operation.
"""

from __future__ import annotations

import sys
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainerd.memory.tape import Node, Tensor


def run(roots: list[tuple[Node, int, Tensor]]) -> None:
    """The engine: nodes in order, each when all that lead to it have run. `roots` is emptied: nobody else may hold those."""
    leaves = _dependencies([node for node, _, _ in roots])
    if not roots:
        return
    turn = count()  # of leaves, the one that was complete first
    ready = _first(roots, turn)
    while ready:
        node = heappop(ready)[2]
        grads, node.grads = node.grads or [None], None
        outputs = list(node.backward(node, grads))
        del grads
        node.saved = ()
        outputs.reverse()
        for edge in node.edges:
            grad_out = outputs.pop()
            if edge is None:
                continue
            target, place = edge
            buffer = target.grads
            if buffer is None:
                buffer = target.grads = [None] * target.num_outputs
            if grad_out is not None:
                if buffer[place] is None:
                    buffer[place] = grad_out
                else:
                    _add(buffer, place, [grad_out])
            del grad_out
            target.waiting -= 1
            if not target.waiting:
                heappush(ready, (-target.order if target.order >= 0 else -sys.maxsize, next(turn), target))
    for leaf, waiting, kept in leaves:
        leaf.waiting, leaf.grads = waiting, kept


def _first(roots: list[tuple[Node, int, Tensor]], turn: count[int]) -> list[tuple[int, int, Node]]:
    """The roots that nothing else leads to, with their gradients; the list they came in is emptied."""
    ready: list[tuple[int, int, Node]] = []
    while roots:
        node, output, grad = roots.pop(0)
        node.grads = node.grads or [None] * node.num_outputs
        node.grads[output] = grad
        del grad
        if not node.waiting:
            heappush(ready, (-node.order if node.order >= 0 else -sys.maxsize, next(turn), node))
    return ready


def _dependencies(roots: list[Node]) -> list[tuple[Node, int, list[Tensor | None] | None]]:
    """Writes into each node how many edges lead to it. Returned are the leaves, with what another way back, which this one is
    a part of, has written there."""
    leaves: list[tuple[Node, int, list[Tensor | None] | None]] = []
    seen = set(roots)
    left = list(roots)
    while left:
        for edge in left.pop().edges:
            if edge is None:
                continue
            target = edge[0]
            if target not in seen:
                seen.add(target)
                left.append(target)
                if target.order < 0:
                    leaves.append((target, target.waiting, target.grads))
                    target.grads = None
                    target.waiting = 0
            target.waiting += 1
    return leaves


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
