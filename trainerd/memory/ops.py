"""What torch's operations allocate, save for the way back, and allocate on the way back. Must not know any model.

One function per operation, named like torch's, with the saved tensors of torch's derivatives.yaml. `tests/test_memory_tables.py`
holds each against torch itself, to the byte. Kernels' own scratch space is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from trainerd.memory.tape import CASTS, Node, Shape, Tensor

Grads = list[Tensor | None]
LOW = ("bf16", "fp16")


class Unpacked(tuple[Any, ...]):
    """What a node has saved, when it is there for this way back alone (checkpointing.py): it ends with its last use, not with the node."""


def low(x: Tensor, *, weight: bool = False) -> Tensor:
    """The autocast copy of x for a matrix product; that of a leaf is kept until autocast ends."""
    tape = x.tape
    if not tape.casting or x.dtype != "fp32" or tape.precision is None:
        return x
    if not (weight or x.leaf) or not x.requires_grad:
        return to(x, tape.precision)
    kept = tape.casts.get(id(x))
    if kept is None:
        with tape.counting_as(CASTS):
            kept = tape.casts[id(x)] = to(x, tape.precision)
    return kept


def high(x: Tensor) -> Tensor:
    """fp32, for what autocast computes exactly."""
    return to(x, "fp32") if x.tape.casting else x


def to(x: Tensor, dtype: str) -> Tensor:
    if x.dtype == dtype:
        return x
    made = x.tape.new(x.shape, dtype)
    x.tape.record([made], [x], _to_back, (), x.dtype)
    return made


def _to_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [g and g.tape.new(g.shape, node.about[0])]


# Views and copies


def reshape(x: Tensor, *shape: int) -> Tensor:
    """A view of contiguous bytes, else a copy."""
    if -1 in shape:
        rest = x.numel // prod(n for n in shape if n != -1)
        shape = tuple(rest if n == -1 else n for n in shape)
    made = x.view(*shape) if x.contiguous else x.tape.new(shape, x.dtype)
    x.tape.record([made], [x], _reshape_back, (), x.shape)
    return made


def _reshape_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    if g is None:
        return [None]
    return [g.view(*node.about[0]) if g.contiguous else g.tape.new(node.about[0], g.dtype)]


def transpose(x: Tensor, *shape: int) -> Tensor:
    """A view with dimensions exchanged: `shape` is the new one. Size 1 in between is still contiguous."""
    made = x.view(*shape, contiguous=sum(n > 1 for n in shape) < 2 and x.contiguous)
    x.tape.record([made], [x], _transpose_back, (), x.shape)
    return made


def _transpose_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [g and g.view(*node.about[0], contiguous=True)]


def clone(x: Tensor) -> Tensor:
    made = x.tape.new(x.shape, x.dtype)
    x.tape.record([made], [x], _through)
    return made


def _through(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    return [only(grads)]


def part(x: Tensor, *shape: int, contiguous: bool = False) -> Tensor:
    """x[…, a:b] or x[i]: a view; going back, a tensor of zeros as large as x."""
    made = x.view(*shape, contiguous=contiguous)
    x.tape.record([made], [x], part_back, (), x.shape)
    return made


def part_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [g and g.tape.new(node.about[0], g.dtype)]


def expand(x: Tensor, *shape: int) -> Tensor:
    made = x.view(*shape, contiguous=False)
    x.tape.record([made], [x], _expand_back, (), x.shape)
    return made


def _expand_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [g and _reduced(g, node.about[0])]


def pieces(x: Tensor, shape: Shape, number: int) -> list[Tensor]:
    """unbind, chunk or split: views of equal shape; going back, one tensor as large as x."""
    made = [x.view(*shape, contiguous=False) for _ in range(number)]
    x.tape.record(made, [x], _part_back_all, (), x.shape)
    return made


def _part_back_all(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    """stack or cat of the gradients; zeros stand for those that are missing."""
    known = next(g for g in grads if g is not None)
    missing = [known.tape.new(known.shape, known.dtype) for g in grads if g is None]
    whole = known.tape.new(node.about[0], known.dtype)
    del missing
    return [whole]


def cat(parts: Sequence[Tensor], *shape: int) -> Tensor:
    """cat or stack; going back, views."""
    made = parts[0].tape.new(shape, max((p.dtype for p in parts), key=_rank))
    made.tape.record([made], parts, _cat_back, (), [(p.shape, p.dtype) for p in parts])
    return made


def _cat_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    if g is None:
        return [None] * len(node.edges)
    views = [g.view(*shape, contiguous=False) for shape, _ in node.about[0]]
    return [view if view.dtype == dtype else view.tape.new(shape, dtype) for view, (shape, dtype) in zip(views, node.about[0], strict=True)]


def gather_rows(x: Tensor, index: Tensor, *shape: int) -> Tensor:
    """x[index]; going back, zeros as large as x, added into."""
    made = x.tape.new(shape, x.dtype)
    x.tape.record([made], [x], part_back, (index,), x.shape)
    return made


def embedding(index: Tensor, weight: Tensor) -> Tensor:
    made = weight.tape.new((*index.shape, weight.shape[-1]), weight.dtype)
    weight.tape.record([made], [weight], part_back, (index,), weight.shape)
    return made


# Element by element


def unary(x: Tensor, *, saves: str) -> Tensor:
    """tanh, sigmoid, relu, exp save their "result"; gelu, silu, abs, log their "self"; neg and others "nothing"."""
    made = x.tape.new(x.shape, x.dtype)
    saved: tuple[Tensor, ...] = (x.detach(),) if saves == "self" else (made.detach(),) if saves == "result" else ()
    x.tape.record([made], [x], _unary_back, saved)
    return made


def _unary_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [g and g.tape.new(g.shape, g.dtype)]


def tanh(x: Tensor) -> Tensor:
    return unary(x, saves="result")


def relu(x: Tensor) -> Tensor:
    return unary(x, saves="result")


def gelu(x: Tensor) -> Tensor:
    return unary(x, saves="self")


def silu(x: Tensor) -> Tensor:
    return unary(x, saves="self")


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y or x - y: nothing is saved, the gradient passes through."""
    made = x.tape.new(_broadcast(x.shape, y.shape), wider(x, y))
    x.tape.record([made], [x, y], _add_back)
    return made


def _add_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [None if s is None or g is None or not node.needs(i) else _fitted(g, *s) for i, s in enumerate(node.shapes)]


def sub(x: Tensor, y: Tensor) -> Tensor:
    """x - y: the second gradient is a tensor of its own."""
    made = x.tape.new(_broadcast(x.shape, y.shape), wider(x, y))
    x.tape.record([made], [x, y], _sub_back)
    return made


def _sub_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    found = list(_add_back(node, grads))
    if (g := found[1]) is not None:
        found[1] = g.tape.new(g.shape, g.dtype)
    return found


def add_(x: Tensor, y: Tensor) -> Tensor:
    """x += y."""
    made = x.detach()
    x.tape.record([made], [x, y], _add_back)
    return made


def mul_(x: Tensor, y: Tensor) -> Tensor:
    """x *= y: what x was is copied when y's gradient needs it."""
    before = x.tape.new(x.shape, x.dtype) if y.requires_grad and x.tape.grad_enabled else None
    made = x.detach()
    x.tape.record([made], [x, y], _mul_back, (before, y.detach() if x.requires_grad else None))
    return made


def unary_(x: Tensor) -> Tensor:
    """sigmoid_, tanh_, relu_: the result is saved, in x's own bytes."""
    made = x.detach()
    x.tape.record([made], [x], _unary_back, (made.detach(),))
    return made


def scale(x: Tensor) -> Tensor:
    """x times a number: nothing is saved."""
    return unary(x, saves="nothing")


def shift(x: Tensor) -> Tensor:
    """x plus a number: nothing is saved, the gradient passes through."""
    return clone(x)


def mul(x: Tensor, y: Tensor) -> Tensor:
    made = x.tape.new(_broadcast(x.shape, y.shape), wider(x, y))
    saved = (x.detach() if y.requires_grad else None, y.detach() if x.requires_grad else None)
    x.tape.record([made], [x, y], _mul_back, saved)
    return made


def _mul_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    if g is None:
        return [None, None]
    found = [g.tape.new(g.shape, g.dtype) if node.needs(place) else None for place in (0, 1)]
    for place, about in enumerate(node.shapes):
        product = found[place]
        if product is not None and about is not None:
            found[place] = _fitted(product, *about)
            del product
    return found


def softmax(x: Tensor) -> Tensor:
    return unary(high(x) if x.tape.device == "cuda" else x, saves="result")


def dropout(x: Tensor) -> Tensor:
    """nn.Dropout: a mask of bytes on a GPU; on a CPU a tensor of noise like x. An evaluation, which has no gradients, is without it."""
    if not x.tape.grad_enabled:
        return x
    made_first = x.tape.new(x.shape, "bool" if x.tape.device == "cuda" else x.dtype)
    made = x.tape.new(x.shape, x.dtype)
    x.tape.record([made], [x], _unary_back, (made_first,))
    return made


def only(grads: Grads) -> Tensor | None:
    """The one gradient, taken out, so that nobody else holds it."""
    grad, grads[0] = grads[0], None
    return grad


def _fitted(g: Tensor, shape: Shape, dtype: str) -> Tensor:
    """The gradient summed over what was broadcast, in the input's type."""
    g = _reduced(g, shape)
    return g if g.dtype == dtype else g.tape.new(shape, dtype)


def _reduced(g: Tensor, shape: Shape) -> Tensor:
    if g.shape == shape:
        return g
    return g.view(*shape) if g.numel == prod(shape) else g.tape.new(shape, g.dtype)


def _broadcast(one: Shape, other: Shape) -> Shape:
    if one == other:
        return one
    length = max(len(one), len(other))
    pairs: Any = zip((1,) * (length - len(one)) + one, (1,) * (length - len(other)) + other, strict=True)
    return tuple(max(a, b) if min(a, b) else 0 for a, b in pairs)


def wider(x: Tensor, y: Tensor) -> str:
    """The type of what comes of both."""
    return x.dtype if x.dtype == y.dtype else max(x.dtype, y.dtype, key=_rank)


def _rank(dtype: str) -> int:
    """Which type wins when two meet."""
    return ("bool", "uint8", "int32", "int64", "bf16", "fp16", "fp32", "fp64").index(dtype)


def mean(x: Tensor) -> Tensor:
    """Over the last dimension, which stays."""
    made = x.tape.new((*x.shape[:-1], 1), x.dtype)
    x.tape.record([made], [x], _repeat_back, (), x.shape)
    return made


def total(x: Tensor) -> Tensor:
    """sum(): one number; going back, a view of it."""
    made = x.tape.new((), x.dtype)
    x.tape.record([made], [x], _total_back, (), x.shape)
    return made


def _total_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [g and g.view(*node.about[0], contiguous=False)]


def repeat(x: Tensor, *shape: int) -> Tensor:
    """repeat_interleave of heads: a copy; going back, a sum."""
    made = x.tape.new(shape, x.dtype)
    x.tape.record([made], [x], _repeat_back, (), x.shape)
    return made


def _repeat_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [g and g.tape.new(node.about[0], g.dtype)]


def regroup(x: Tensor, *shape: int) -> Tensor:
    """view() that only splits the last dimension: possible also where the bytes have gaps."""
    made = x.view(*shape, contiguous=x.contiguous)
    x.tape.record([made], [x], _reshape_back, (), x.shape)
    return made
