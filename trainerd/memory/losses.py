"""What a loss over a vocabulary holds: whole logits, or logits in pieces. Must not know any model.

`linear_cross_entropy` is the engine's (trainerd/engine/chunked.py): gradients are made on the way forward, piece by piece.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainerd.memory import ops
from trainerd.memory.chunks import cut
from trainerd.memory.tape import BYTES, GRADIENTS, LOGITS, Node, Tensor

_ROWS, _SCALED_BYTES = 16, 4 << 20
_PLAYED = 64  # of more pieces than that, all but the last are alike: these are played, the others counted


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


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The summed loss of a last layer (words, width) over `hidden` (tokens, width), made in pieces with its gradients."""
    tape = hidden.tape
    work = _Pieces(hidden, weight, bias)
    with tape.no_grad():
        work.run()
    tape.record([work.total], [hidden, weight, bias], _pieces_back, (work.gradients,))
    return work.total


class _Pieces:
    """What trainerd/engine/chunked.py allocates, in its order."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        tape = self.tape = hidden.tape
        self.hidden, self.weight = hidden, weight
        self.exact = "fp64" if weight.dtype == "fp64" else "fp32"
        lowers = tape.casting and self.exact == "fp32"
        self.dtype = (tape.precision or weight.dtype) if lowers else weight.dtype
        self.mixed = self.dtype != self.exact
        self.cut = cut(tape.device, weight.shape[0], weight.shape[1], self.dtype, BYTES[weight.dtype])
        self.bias = None if bias is None else ops.to(bias.detach(), self.dtype)
        self.total = tape.new((), self.exact)
        self.gradients: list[Tensor | None] = [None, None, None]
        if tape.grad_enabled:
            with tape.counting_as(GRADIENTS):
                self.gradients = [
                    tape.new(t.shape, t.dtype if place == 0 else self.exact) if t is not None and t.requires_grad else None
                    for place, t in enumerate((hidden, weight, bias))
                ]
        self.learns = any(gradient is not None for gradient in self.gradients)

    def run(self) -> None:
        tokens, words = self.hidden.shape[0], self.weight.shape[0]
        whole = self.cut.words >= words
        low = ops.to(self.weight.detach(), self.dtype) if whole else None
        pieces = -(-max(1, tokens) // self.cut.tokens)
        counted = pieces - _PLAYED if self.tape.skips and pieces > _PLAYED else 0
        for place in [*range(pieces - counted - 1), pieces - 1]:
            born, flops = len(self.tape.sizes), self.tape.flops
            start = place * self.cut.tokens
            some = ops.to(self.hidden.view(min(self.cut.tokens, tokens - start), self.hidden.shape[1]), self.dtype)
            with self.tape.counting_as(LOGITS):
                if whole:
                    self._whole(some)
                else:
                    self._by_words(some)
            if counted and place == _PLAYED - 2:  # those left out are as this one, and leave nothing behind either
                self.tape.left_out += counted * (len(self.tape.sizes) - born)
                self.tape.left_out_bytes += counted * sum(self.tape.sizes[born:])
                self.tape.flops += counted * (self.tape.flops - flops)
        del low

    def _whole(self, some: Tensor) -> None:
        tape, shape = self.tape, (some.shape[0], self.weight.shape[0])
        logits: Tensor | None = self._product(shape, self.dtype)
        chance = tape.new(shape, self.exact)
        if self.mixed and tape.device == "cpu" and tape.adds_in_place:  # inside the kernel: what counts tensors sees nothing of it
            rows = tape.new((min(_ROWS, shape[0]), shape[1]), self.exact)
            del rows
        hit = tape.new((shape[0], 1), self.exact)
        self._nats(hit)
        if not self.learns:
            return
        if not self.mixed:
            logits = None  # what is low is the chances themselves; else they are put where the logits were
        if self.gradients[0] is not None:
            tape.flops += 2.0 * some.numel * shape[1]
            if self.gradients[0].dtype != self.dtype:
                tape.new(some.shape, self.dtype)
        self._add(chance, some)
        del logits, hit

    def _nats(self, hit: Tensor) -> None:
        """-log of what the wanted words were given, which is summed at once."""
        logs = hit.tape.new(hit.shape, hit.dtype)
        nats = hit.tape.new(hit.shape, hit.dtype)
        del logs, nats

    def _by_words(self, some: Tensor) -> None:
        tape, number = self.tape, self.weight.shape[0]
        blocks = [min(self.cut.words, number - start) for start in range(0, number, self.cut.words)]
        for words in blocks:
            self._block(some, words, sums=True)
        if not self.learns:
            return
        out = tape.new(some.shape, self.exact) if self.gradients[0] is not None else None
        for words in blocks:
            weight, chance = self._block(some, words)
            low = ops.to(chance, self.dtype)
            if out is not None:
                tape.flops += 2.0 * some.numel * words
                if self.mixed:
                    tape.new(some.shape, self.dtype)
            self._add(chance, some)
            del weight, chance, low
        del out

    def _block(self, some: Tensor, words: int, *, sums: bool = False) -> tuple[Tensor | None, Tensor]:
        """The weight of these words in the type of products, and their logits in the exact one; for the sums, one more for a moment."""
        shape, width = (some.shape[0], words), self.weight.shape[1]
        weight = self.tape.new((words, width), self.dtype) if self.dtype != self.weight.dtype else None
        logits = self._product(shape, self.dtype)
        if sums:
            weight = None
        return weight, ops.to(logits, self.exact)

    def _product(self, shape: tuple[int, int], dtype: str) -> Tensor:
        self.tape.flops += 2.0 * shape[0] * shape[1] * self.weight.shape[1]
        return self.tape.new(shape, dtype)

    def _add(self, chance: Tensor, some: Tensor) -> None:
        words = chance.shape[1]
        summed = self.tape.new((words,), self.exact) if self.gradients[2] is not None else None
        if self.gradients[1] is not None:
            self.tape.flops += 2.0 * some.numel * words
            if self.mixed:
                self.tape.new((words, some.shape[1]), self.dtype)
        del summed


def _pieces_back(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    """They have been made already, and are scaled in place: low ones a part at a time."""
    found: list[Tensor | None] = [t if node.needs(place) else None for place, t in enumerate(node.saved[0])]
    grads[0] = None
    node.saved = ()
    first = found[0]
    if first is not None and BYTES[first.dtype] < 4:
        first.tape.new((min(first.numel, _SCALED_BYTES // 4),), "fp32")
    return found
