"""torch's GRU: unrolled step by step on a CPU, one fused kernel with a reserve on a GPU. Must not know any task."""

from __future__ import annotations

from collections.abc import Sequence

from trainerd.memory import kernels, ops
from trainerd.memory.tape import Node, Tape, Tensor

# What cuDNN keeps for the way back, in numbers per unit, sample and place: three gates, the recurrent part of the third, the
# state. Not measured here, and the upper bound gives it no more room than everything else on a GPU (estimate.py).
_RESERVE = 5


class Gru:
    """nn.GRU of one layer, samples first."""

    def __init__(self, tape: Tape, width: int, hidden: int) -> None:
        self.hidden = hidden
        self.from_input = tape.parameter(3 * hidden, width)
        self.from_past = tape.parameter(3 * hidden, hidden)
        self.biases = [tape.parameter(3 * hidden), tape.parameter(3 * hidden)]

    def __call__(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        """Hidden states (samples, places, hidden), from `start` on (samples, hidden), else from zeros."""
        return self._fused(x) if x.tape.device == "cuda" else self._unrolled(x, start)

    def _unrolled(self, x: Tensor, start: Tensor | None) -> Tensor:
        """ATen's own cell (RNN.cpp, GRUCell): the input's part for all places at once, the rest in place."""
        samples, places, width = x.shape
        start = x.tape.new((samples, self.hidden), x.dtype) if start is None else start
        turned = ops.transpose(x, places, samples, width)
        turned.contiguous = places == 1 or samples == 1
        given = kernels.linear(turned, self.from_input, self.biases[0])
        past = start
        del turned, start
        states: list[Tensor] = []
        for here in ops.pieces(given, (samples, 3 * self.hidden), places):
            past = self._cell(here, past)
            states.append(past)
        del here
        made = ops.cat(states, places, samples, self.hidden)
        del given, states, past
        last = x.tape.new((1, samples, self.hidden), made.dtype)
        turned = ops.transpose(made, samples, places, self.hidden)
        del last
        return turned

    def _cell(self, given: Tensor, past: Tensor) -> Tensor:
        shape = (given.shape[0], self.hidden)
        from_input = ops.pieces(given, shape, 3)
        from_past = ops.pieces(kernels.linear(past, self.from_past, self.biases[1]), shape, 3)
        reset = ops.unary_(ops.add_(from_past[0], from_input[0]))
        update = ops.unary_(ops.add_(from_past[1], from_input[1]))
        new = ops.unary_(ops.add(from_input[2], ops.mul_(from_past[2], reset)))
        return ops.add_(ops.mul_(ops.sub(past, new), update), new)

    def _fused(self, x: Tensor) -> Tensor:
        """_cudnn_rnn: under autocast, weights in one low buffer; a reserve that only the way back reads."""
        weights = [self.from_input, self.from_past, *self.biases]
        tape = x.tape
        x = ops.low(x)
        numbers = sum(w.numel for w in weights)
        buffer = tape.new((numbers,), x.dtype)
        samples, places, width = x.shape
        turned = ops.clone(x)
        made = tape.new((samples, places, self.hidden), x.dtype)
        reserve = tape.new((samples * places * self.hidden * _RESERVE,), x.dtype)
        work = 2.0 * samples * places * 3 * self.hidden * (width + self.hidden)
        tape.flops += work
        tape.record([made], [turned, *weights], _fused_back, (buffer, turned.detach(), made.detach(), reserve), work)
        return made


def _fused_back(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    g, grads[0] = grads[0], None
    if g is None:
        return [None] * len(node.edges)
    g.tape.flops += 2 * node.about[0]
    flat = g.tape.new(node.saved[0].shape, g.dtype)  # the weights' gradients, in one buffer of the same form
    found = [g.tape.new(*about) if about and node.needs(place) else None for place, about in enumerate(node.shapes)]
    del flat
    return found
