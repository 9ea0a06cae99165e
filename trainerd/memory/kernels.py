"""Products, convolutions, norms, pools and attention: what they allocate, save, and allocate on the way back. Must not know any model.

Like ops.py, held against torch to the byte; kernels' own scratch space is not here, but for what CUDA's attention adds up in; a CPU's
convolutions say the most they hold (scratch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from trainerd.memory import scratch
from trainerd.memory.ops import (
    LOW,
    Unpacked,
    add,
    add_,
    clone,
    high,
    low,
    mean,
    mul,
    only,
    part_back,
    reshape,
    scale,
    to,
    transpose,
    unary,
    wider,
)
from trainerd.memory.tape import BYTES, Node, Shape, Tape, Tensor

Grads = list[Tensor | None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias over the last dimension. `weight` is (out, in)."""
    given = x  # as it came: autocast's copy does not let go of it
    bias = low(bias, weight=True) if bias is not None else None
    weight, x = low(weight, weight=True), low(x)  # C++ evaluates arguments from the last: the way back begins with x
    tape, rows = x.tape, prod(x.shape[:-1])
    flops = 2.0 * rows * weight.numel
    tape.multiplied.append((rows, *weight.shape))
    shape = (*x.shape[:-1], weight.shape[0])
    if x.contiguous or len(x.shape) == 2:
        made = tape.product(shape, x.dtype, flops)
        _record_linear(made, x, weight, bias)
        return made
    flat = reshape(x, rows, x.shape[-1])
    made = tape.product(shape, x.dtype, flops)
    _record_linear(made, flat, weight, None)
    del given
    return made if bias is None else add(made, bias)


def _record_linear(made: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    saved = (x.detach() if weight.requires_grad else None, weight.detach() if x.requires_grad else None)
    made.tape.record([made], [bias, x, weight], _linear_back, saved)


def _linear_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    if g is None:
        return [None, None, None]
    found: list[Tensor | None] = [None, None, None]
    rows = prod(g.shape[:-1])
    for place in (1, 2, 0):
        about = node.shapes[place]
        if about is None or not node.needs(place):
            continue
        if not place and isinstance(node.saved, Unpacked):
            node.saved = ()
        found[place] = g.tape.new(about[0], g.dtype)
        if place:
            g.tape.flops += 2.0 * rows * g.shape[-1] * about[0][-1]
    return found


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """A batched product (…, n, k) @ (…, k, m); one whose dimensions before the last two cannot be read as one is copied first."""
    y, x = low(y), low(x)
    x, y = (t if _is_batched(t) else clone(t) for t in (x, y))
    tape = x.tape
    made = tape.product((*x.shape[:-1], y.shape[-1]), x.dtype, 2.0 * x.numel * y.shape[-1])
    tape.multiplied.append((*x.shape, y.shape[-1]))
    saved = (x.detach() if y.requires_grad else None, y.detach() if x.requires_grad else None)
    tape.record([made], [x, y], _matmul_back, saved)
    return made


def _is_batched(x: Tensor) -> bool:
    """Of one sample, or one head, no copy is made, also where its bytes have gaps: the way back then holds what it is a view of."""
    return x.contiguous or sum(n > 1 for n in x.shape[:-2]) < 2


def _matmul_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    found: list[Tensor | None] = [None, None]
    for place in (0, 1):
        about = node.shapes[place]
        if g is not None and about is not None and node.needs(place):
            found[place] = g.tape.new(about[0], about[1])
            g.tape.flops += 2.0 * g.numel * about[0][-1 if place == 0 else -2]
    return found


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, size: Shape) -> Tensor:
    """conv2d and conv3d; `weight` is (out, in, …), `size` the spatial shape of the result."""
    bias = low(bias, weight=True) if bias is not None else None
    weight, x = low(weight, weight=True), low(x)  # C++ evaluates arguments from the last: the way back begins with x
    work = 2.0 * x.shape[0] * prod(size) * weight.numel
    made = x.tape.product((x.shape[0], weight.shape[0], *size), x.dtype, work)
    if x.tape.adds_in_place:  # what counts tensors sees nothing of it
        x.tape.scratch = max(x.tape.scratch, scratch.of_convolution(x.shape, weight.shape, made.shape, BYTES[x.dtype]))
    x.tape.record([made], [x, weight, bias], _convolution_back, (x.detach(), weight.detach()), work)
    return made


def _convolution_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    found: list[Tensor | None] = [None, None, None]
    for place, about in enumerate(node.shapes):
        if g is not None and about is not None and node.needs(place):
            found[place] = g.tape.new(about[0], about[1])
            g.tape.flops += node.about[0] if place < 2 else 0
    return found


# Norms, pools, attention


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Mean and deviation of each row are kept, in fp32. Autocast computes it in fp32 on a GPU."""
    x = high(x) if x.tape.device == "cuda" else x
    made = x.tape.new(x.shape, x.dtype)
    stats = [x.tape.new(x.shape[:-1], "fp32") for _ in (0, 1)]
    x.tape.record([made], [x, weight, bias], _norm_back, (x.detach(), *stats))
    return made


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean and deviation of each channel are kept, in fp32; an evaluation, which has no gradients, takes the running ones."""
    made = x.tape.new(x.shape, x.dtype)
    stats = [x.tape.new((x.shape[1],), "fp32") for _ in (0, 1)] if x.tape.grad_enabled else []
    x.tape.record([made], [x, weight, bias], _norm_back, (x.detach(), *stats))
    return made


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Mean and deviation of each group are kept."""
    x = high(x) if x.tape.device == "cuda" else x
    made = x.tape.new(x.shape, x.dtype)
    stats = [x.tape.new((x.shape[0], groups), "fp32") for _ in (0, 1)]
    x.tape.record([made], [x, weight, bias], _norm_back, (x.detach(), *stats))
    return made


def _norm_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    return [g.tape.new(*about) if g is not None and about and node.needs(place) else None for place, about in enumerate(node.shapes)]


def pool(x: Tensor, size: Shape, *, indices: bool) -> Tensor:
    """Max pooling keeps where the largest was (`indices`); mean pooling does not. Both keep their input.

    In three dimensions a CPU's autocast computes it in fp32.
    """
    given, x = x, high(x) if len(size) == 3 and x.tape.device == "cpu" else x
    made = x.tape.new((*x.shape[:2], *size), x.dtype)
    where = (x.tape.new(made.shape, "int64"),) if indices else ()
    del given
    x.tape.record([made], [x], part_back, (x.detach(), *where), x.shape)
    return made


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """scaled_dot_product_attention of (samples, heads, places, width): flash or memory-efficient without its table, unless math is set."""
    v, k, q = low(v), low(k), low(q)
    tape = q.tape
    if tape.attention == "math":
        with tape.autocast(False):
            return _math_attention(q, k, v, causal)
    work = 4.0 * q.numel * k.shape[-2]
    made = tape.product(q.shape, q.dtype, work)
    made.contiguous = False  # laid out as (samples, places, heads, width)
    logsumexp = tape.product(q.shape[:-1], "fp32", 0.0)
    saved = (q.detach(), k.detach(), v.detach(), made.detach(), logsumexp)
    tape.record([made], [q, k, v], _attention_back, saved, work)
    return made


def _math_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """_scaled_dot_product_attention_math: the table of scores, in fp32 whatever is given; its result is laid out as its operands are."""
    tape, given = q.tape, q.dtype
    exact = [_laid_out(to(t, "fp32"), t) for t in (q, k, v)] if given in LOW else [q, k, v]
    scaled = _laid_out(scale(exact[0]), exact[0])
    mask = _mask(tape, q.shape[-2], k.shape[-2], scaled.dtype) if causal else None
    turned = _laid_out(scale(exact[1]), exact[1])
    scores = matmul(scaled, transpose(turned, *k.shape[:-2], k.shape[-1], k.shape[-2]))
    del turned
    if mask is not None:
        scores = add_(scores, mask) if tape.adds_in_place else add(scores, mask)
    chances = unary(scores, saves="result")
    del scores
    beside = tape.new(chances.shape, given) if given in LOW else None  # the table in the type that was given is a second result
    made = to(matmul(chances, exact[2]), given)
    del beside, exact, scaled, mask
    return made


def _laid_out(made: Tensor, like: Tensor) -> Tensor:
    made.contiguous = like.contiguous
    return made


def _mask(tape: Tape, places: int, others: int, dtype: str) -> Tensor:
    """Below the diagonal, from booleans."""
    ones = tape.new((places, others), "bool")
    below = tape.new((places, others), "bool")
    del ones
    values = [tape.new((), dtype) for _ in (0, 1)]
    made = tape.new((places, others), dtype)
    del below, values
    return made


def _attention_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    if g is None:
        return [None, None, None]
    tape = g.tape
    tape.flops += 2.5 * node.about[0]
    # The GPU's kernels add dq up in fp32, and keep a row sum of gradient times output.
    beside = [tape.new(g.shape, "fp32"), tape.new(g.shape[:-1], "fp32")] if tape.device == "cuda" else []
    found = [tape.new(*about) if about else None for about in node.shapes]
    del beside
    return [t if node.needs(place) else None for place, t in enumerate(found)]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """nn.RMSNorm: on a CPU it is made of elementary operations; on a GPU one kernel, in fp32 under autocast."""
    if x.tape.device != "cuda":
        return mul(mul(x, unary(mean(square(x)), saves="result")), weight)
    x = high(x)
    made = x.tape.new(x.shape, wider(x, weight))
    kept = x.tape.new((*x.shape[:-1], 1), "fp32")
    x.tape.record([made], [x, weight], _norm_back, (x.detach(), kept))
    return made


def square(x: Tensor) -> Tensor:
    """x.pow(2): going back, the power of one less, and its double, before the product with the gradient."""
    made = x.tape.new(x.shape, x.dtype)
    x.tape.record([made], [x], _square_back, (x.detach(),))
    return made


def _square_back(node: Node, grads: Grads) -> Sequence[Tensor | None]:
    g = only(grads)
    if g is None:
        return [None]
    between = [g.tape.new(g.shape, g.dtype) for _ in (0, 1)]
    made = g.tape.new(g.shape, g.dtype)
    del between
    return [made]
