"""What a loss over a vocabulary holds: whole logits, or logits in slices. Must not know any model.

`sliced` is CADENCE's (trainerd/tasks/cadence/softmax.py): gradients are made on the way forward, slice by slice.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainerd.memory import kernels, ops
from trainerd.memory.checkpointing import checkpointed
from trainerd.memory.tape import GRADIENTS, LOGITS, Node, Tensor

SLICE_CPU, SLICE_GPU = 256, 8192


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """torch's: log-probabilities as large as the logits are kept, in fp32 also under autocast."""
    tape = logits.tape
    with tape.counting_as(LOGITS):
        logits = ops.high(logits)
        chances = ops.unary(logits, saves="result")
        loss, weight = tape.new((), chances.dtype), tape.new((), chances.dtype)
        tape.record([loss], [chances], _nll_back, (chances.detach(), targets, weight), chances.shape)
    return loss


def _nll_back(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    g, grads[0] = grads[0], None
    if g is None:
        return [None]
    with g.tape.counting_as(LOGITS):
        return [g.tape.new(node.about[0], g.dtype)]


def sliced(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropy of `hidden` (tokens, width) with the logits of one slice at a time."""
    tape = hidden.tape
    dtype = (tape.precision or "fp32") if tape.casting else weight.dtype
    with tape.autocast(False):
        hidden = ops.to(hidden, weight.dtype)
        if not tape.grad_enabled:
            return _sliced_value(hidden, weight, bias, dtype)
        gradients, total = _sliced_gradients(hidden, weight, bias, dtype)
    tape.record([total], [hidden, weight, bias], _sliced_back, (gradients,))
    return total


def _slices(hidden: Tensor) -> list[int]:
    tokens, step = hidden.shape[0], SLICE_CPU if hidden.tape.device == "cpu" else SLICE_GPU
    return [min(step, tokens - start) for start in range(0, tokens, step)]


def _sliced_gradients(hidden: Tensor, weight: Tensor, bias: Tensor, dtype: str) -> tuple[list[Tensor], Tensor]:
    tape, outputs, width = hidden.tape, weight.shape[0], hidden.shape[1]
    exact, mixed = weight.dtype, dtype != weight.dtype
    with tape.no_grad():
        lowered = [ops.to(t, dtype) for t in (hidden, weight, bias)]
        with tape.counting_as(GRADIENTS):
            to_hidden = tape.new(hidden.shape, dtype)
        total = tape.new((), exact)
        to_weight = to_bias = None
        for number in _slices(hidden):
            tape.flops += 6.0 * number * outputs * width
            with tape.counting_as(LOGITS):
                logits = tape.new((number, outputs), dtype)
                exact_logits = ops.to(logits, exact) if tape.device == "cpu" or dtype == "bf16" else logits
                chance = tape.new((number, outputs), exact)
                del logits, exact_logits
                hit = tape.new((number, 1), exact)
                low = ops.to(chance, dtype)
            if to_weight is None or to_bias is None:
                with tape.counting_as(GRADIENTS):
                    to_weight = ops.to(tape.new(weight.shape, dtype), exact)
                    to_bias = tape.new(bias.shape, exact)
            else:
                tape.new(bias.shape, exact)
                if mixed:
                    tape.new(weight.shape, dtype)
            del hit, low, chance
        del lowered
        with tape.counting_as(GRADIENTS):
            to_hidden = ops.to(to_hidden, hidden.dtype)
    assert to_weight is not None and to_bias is not None
    return [to_hidden, to_weight, to_bias], total


def _sliced_back(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    """They have been made already, and are scaled in place."""
    found: list[Tensor | None] = [t if node.needs(place) else None for place, t in enumerate(node.saved[0])]
    node.saved = ()
    return found


def _sliced_value(hidden: Tensor, weight: Tensor, bias: Tensor, dtype: str) -> Tensor:
    """Without gradients: the loss alone."""
    tape = hidden.tape
    lowered = [ops.to(t, dtype) for t in (weight, bias, hidden)]
    total = tape.new((), hidden.dtype)
    for number in _slices(hidden):
        tape.flops += 2.0 * number * weight.numel
        with tape.counting_as(LOGITS):
            logits = ops.to(tape.new((number, weight.shape[0]), dtype), hidden.dtype)
            chances = tape.new(logits.shape, logits.dtype)
            del logits, chances
    del lowered
    return total


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
    """Logits of `chunk` tokens at a time, each chunk checkpointed: they are made again on the way back."""
    tokens, width = hidden.shape
    total: Tensor | None = None
    for start in range(0, tokens, chunk):
        some = ops.part(hidden, min(chunk, tokens - start), width, contiguous=True)

        def one(piece: Tensor) -> Tensor:
            with piece.tape.counting_as(LOGITS):
                logits = kernels.linear(piece, weight, bias)
            return cross_entropy(logits, targets)

        part = checkpointed(one, some)
        total = part if total is None else ops.add(total, part)
    assert total is not None
    return total
