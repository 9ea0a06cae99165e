"""Activation checkpointing: a block keeps only its inputs and is computed again on the way back. Must not know any block.

torch's non-reentrant form: the second forward begins when the way back reaches the block, and stops as soon as it has made
what the way back needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainerd.memory.tape import Node, Tensor


def checkpointed(block: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """block(*given), without what it would save. Gradients of its parameters are made when the way back comes by."""
    tape = given[0].tape
    if not tape.grad_enabled:
        return block(*given)
    first = len(tape.parameters)
    with tape.no_grad():
        made = block(*given)
    assert len(tape.parameters) == first, "a checkpointed block must not make parameters"
    # The parameters the block will lead back to are not known before it is run again: a leaf of this tape stands for them.
    anchor = next((p for p in tape.parameters if p.requires_grad), None)
    tape.record([made], [*given, None if anchor is None else anchor], _again, tuple(t.detach() for t in given), block, tape.casting)
    return made


def _again(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    g, grads[0] = grads[0], None
    if g is None:
        return [None] * len(node.edges)
    block, casting = node.about
    tape = g.tape
    inputs = [_leaf(t, node.needs(place)) for place, t in enumerate(node.saved)]
    before, tape.grad_enabled = tape.grad_enabled, True
    try:
        with tape.autocast(casting):
            made = block(*inputs)
    finally:
        tape.grad_enabled = before
    root, output = made.node, made.output
    del made
    roots = [] if root is None else [(root, output, g)]
    del g
    tape.run(roots)
    found = [t.grad for t in inputs]
    for leaf in inputs:
        if leaf.node is not None:
            leaf.node.variable = leaf.node = leaf.grad = None  # a circle would keep its bytes
    return [*found, None]


def _leaf(saved: Tensor, needed: bool) -> Tensor:
    """The input again, collecting its gradient."""
    leaf = saved.detach()
    if needed:
        leaf.tape.watch(leaf)
    return leaf
