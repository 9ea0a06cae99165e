"""The loss of a last layer over many words, without its table of logits: linear and cross-entropy in pieces, in plain torch.

For tasks: the same loss and gradients as cross_entropy(linear(hidden, weight, bias), targets, reduction="sum"), with at most
64 MiB of its own at 50,000 words, however many tokens. Must not know any task, and keeps nothing between calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainerd.memory.chunks import Cut, cut

_ROWS = 16  # a softmax of low logits makes them high first: so many rows at a time
_SCALED_BYTES = 4 << 20
_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, ignore_index: int | None = -100
) -> Tensor:
    """The sum over tokens of the cross-entropy, in nats, of the logits hidden @ weight.T + bias.

    `hidden` is (…, width), `weight` (words, width), `targets` (…) with a word's number, or `ignore_index` for a token that does not
    count; None says that all count. Under autocast products are made in its type; sums, and the gradient of the weight, in float32.
    Gradients are made on the way forward, so this may be differentiated once. Whatever needs no gradient (a frozen weight) costs none.
    A `hidden` that is not contiguous is copied: rather than cutting off the last place, let its target be `ignore_index`.
    """
    device = hidden.device.type
    lowers = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if lowers else weight.dtype
    if not lowers and hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: without autocast both must be of one type.")
    rows, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if len(rows) != len(wanted):
        raise ValueError(f"hidden has {len(rows)} tokens {tuple(hidden.shape[:-1])}, and targets {len(wanted)} {tuple(targets.shape)}.")
    wanted, counts = _counting(wanted, ignore_index, len(weight))
    with torch.autocast(device, enabled=False):
        pieces = cut(device, len(weight), weight.shape[1], _NAMES[dtype], weight.element_size())
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, weight, bias)):
            loss: Tensor = _Loss.apply(rows, weight, bias, wanted, counts, dtype, pieces)  # type: ignore[no-untyped-call]
            return loss
        return _Work(rows, weight, bias, wanted, counts, dtype, pieces, (False,) * 3).run()


def _counting(targets: Tensor, ignore_index: int | None, words: int) -> tuple[Tensor, Tensor | None]:
    """Targets that are all words, and which of them count: None for all. On a GPU it is not looked, which would be a wait."""
    counts = None if ignore_index is None else targets != ignore_index
    if targets.device.type == "cpu" and targets.numel():
        if counts is not None and bool(counts.all()):
            counts = None
        least, most = (targets if counts is None else targets.masked_fill(~counts, 0)).aminmax()
        if least < 0 or most >= words:
            raise IndexError(f"Target {int(least if least < 0 else most)} is out of bounds: there are {words} words.")
    return targets if counts is None else targets.masked_fill(~counts, 0), counts


class _Loss(torch.autograd.Function):
    """Gradients are made on the way forward, while a piece's logits are there; going back only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counts: Tensor | None,
        dtype: torch.dtype,
        pieces: Cut,
    ) -> Tensor:
        work = _Work(hidden, weight, bias, targets, counts, dtype, pieces, ctx.needs_input_grad[:3])
        loss = work.run()
        ctx.gradients = work.gradients()
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("The loss of linear_cross_entropy can be differentiated once; compute it again for a second time.")
        found, ctx.gradients = ctx.gradients, None  # scaled in place, to spare a second copy as large as the layer
        return *(None if gradient is None else _scaled(gradient, scale) for gradient in found), None, None, None, None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient * scale, in place. torch would round the scale first to a low gradient's type, where it can overflow."""
    if gradient.dtype == scale.dtype:
        return gradient.mul_(scale)
    for some in torch.split(gradient, max(1, _SCALED_BYTES // (4 * gradient.shape[-1]))):
        some.copy_(some.to(scale.dtype).mul_(scale))
    return gradient


class _Work:
    """One call: tokens in pieces, and for each its part of the loss and of the gradients that are needed."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counts: Tensor | None,
        dtype: torch.dtype,
        pieces: Cut,
        needs: tuple[bool, ...],
    ) -> None:
        self.hidden, self.weight, self.targets, self.counts, self.dtype, self.pieces = hidden, weight, targets, counts, dtype, pieces
        self.bias = None if bias is None else bias.to(dtype)
        self.exact = torch.promote_types(weight.dtype, torch.float32)
        self.loss = hidden.new_zeros((), dtype=self.exact)
        self.to_hidden = torch.empty_like(hidden) if needs[0] else None
        self.to_weight = weight.new_empty(weight.shape, dtype=self.exact) if needs[1] else None
        self.to_bias = weight.new_empty(len(weight), dtype=self.exact) if needs[2] else None
        self.first = True

    def run(self) -> Tensor:
        """The loss; the gradients are there afterwards."""
        whole = self.pieces.words >= len(self.weight)
        low_weight = self.weight.to(self.dtype) if whole else None
        for start in range(0, max(1, len(self.hidden)), self.pieces.tokens):
            here = slice(start, start + self.pieces.tokens)
            some, wanted = self.hidden[here].to(self.dtype), self.targets[here].unsqueeze(1)
            counts = None if self.counts is None else self.counts[here].unsqueeze(1).to(self.exact)
            if low_weight is not None:
                self._whole(some, low_weight, wanted, counts, here)
            else:
                self._by_words(some, wanted, counts, here)
            self.first = False
        return self.loss

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, weight and bias, as if 1 was flowing back, in their types."""
        to_weight, to_bias = (g if g is None else g.to(self.weight.dtype) for g in (self.to_weight, self.to_bias))
        return self.to_hidden, to_weight, to_bias

    @property
    def _learns(self) -> bool:
        return self.to_hidden is not None or self.to_weight is not None or self.to_bias is not None

    # All words at once: logits are made once

    def _whole(self, some: Tensor, weight: Tensor, wanted: Tensor, counts: Tensor | None, here: slice) -> None:
        logits = self._logits(some, weight, slice(None))
        chance = self._chances(logits)
        hit = chance.gather(1, wanted)
        self._add_loss(self._nats(some, weight, logits, chance, hit, wanted), counts)
        if not self._learns:
            return
        chance.scatter_(1, wanted, hit - 1)
        low = chance if self.dtype == self.exact else logits.copy_(chance)
        del logits
        if self.to_hidden is not None:
            out = self.to_hidden[here]
            if out.dtype == self.dtype:
                torch.mm(low, weight, out=out)
            else:
                out.copy_(torch.mm(low, weight))
            if counts is not None:
                out.mul_(counts.to(out.dtype))
        self._add(chance, low, some, counts, slice(None))

    def _chances(self, logits: Tensor) -> Tensor:
        """Their softmax. From low logits a CPU makes high ones first: of a few rows at a time."""
        if logits.dtype == self.exact or logits.device.type != "cpu":
            return torch.softmax(logits, 1, dtype=self.exact)
        chance = torch.empty_like(logits, dtype=self.exact)
        for some, out in zip(torch.split(logits, _ROWS), torch.split(chance, _ROWS), strict=True):
            torch.softmax(some, 1, dtype=self.exact, out=out)
        return chance

    def _nats(self, some: Tensor, weight: Tensor, logits: Tensor, chance: Tensor, hit: Tensor, wanted: Tensor) -> Tensor:
        """-log(chance) of the wanted words, also where that chance is too small for a number."""
        if chance.device.type != "cpu":
            likely = chance.argmax(1, keepdim=True)
            total = logits.gather(1, likely).to(self.exact) - chance.gather(1, likely).log()
            return total - logits.gather(1, wanted).to(self.exact)
        nats = -hit.log()
        lost = _places((hit < torch.finfo(self.exact).tiny).squeeze(1)).squeeze(1)
        for rows in torch.split(lost, _ROWS) if len(lost) else ():
            again = self._logits(some[rows], weight, slice(None)).to(self.exact)
            nats[rows] = functional.cross_entropy(again, wanted[rows, 0], reduction="none").unsqueeze(1)
        return nats

    # Some words at a time: logits are made twice, first for their sum

    def _by_words(self, some: Tensor, wanted: Tensor, counts: Tensor | None, here: slice) -> None:
        total, target = self._totals(some, wanted)
        self._add_loss(total - target, counts)
        if not self._learns:
            return
        out = None if self.to_hidden is None else torch.zeros_like(some, dtype=self.exact)
        for words in self._words():
            weight = self.weight[words].to(self.dtype)
            chance = self._logits(some, weight, words).to(self.exact).sub_(total).exp_()
            place, inside = _inside(wanted, words)
            chance.scatter_(1, place, chance.gather(1, place) - inside)
            low = chance.to(self.dtype)
            if out is not None:
                if self.dtype == self.exact:
                    out.addmm_(low, weight)
                else:
                    out += torch.mm(low, weight)
            self._add(chance, low, some, counts, words)
            del chance, low, weight
        if out is not None and self.to_hidden is not None:
            self.to_hidden[here] = out if counts is None else out.mul_(counts)

    def _totals(self, some: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the sum of all words' exponentials, and the logit of the wanted one."""
        total = some.new_full((len(some), 1), -torch.inf, dtype=self.exact)
        target = torch.zeros_like(total)
        for words in self._words():
            logits = self._logits(some, self.weight[words].to(self.dtype), words).to(self.exact)
            place, inside = _inside(wanted, words)
            target += logits.gather(1, place) * inside
            most = torch.maximum(total, logits.amax(1, keepdim=True))
            total = most + torch.log((total - most).exp_() + logits.sub_(most).exp_().sum(1, keepdim=True))
            del logits
        return total, target

    def _words(self) -> Iterator[slice]:
        number = len(self.weight)
        for start in range(0, number, self.pieces.words):
            yield slice(start, min(number, start + self.pieces.words))

    # Both

    def _logits(self, some: Tensor, weight: Tensor, words: slice) -> Tensor:
        return torch.mm(some, weight.t()) if self.bias is None else torch.addmm(self.bias[words], some, weight.t())

    def _add_loss(self, nats: Tensor, counts: Tensor | None) -> None:
        self.loss += (nats if counts is None else nats.where(counts > 0, 0.0)).sum()

    def _add(self, chance: Tensor, low: Tensor, some: Tensor, counts: Tensor | None, words: slice) -> None:
        """What this piece adds to the gradients of these words. The first spares filling them with zeros, and reading those."""
        if self.to_bias is not None:
            found = chance.sum(0) if counts is None else (counts.t() @ chance).squeeze(0)
            if self.first:
                self.to_bias[words] = found
            else:
                self.to_bias[words] += found
        if self.to_weight is None:
            return
        out = self.to_weight[words]
        if counts is not None:
            some = some * counts.to(some.dtype)
        if self.dtype != self.exact:
            product = low.t() @ some
            if self.first:
                out.copy_(product)
            else:
                out += product
        elif self.first:
            torch.mm(low.t(), some, out=out)
        else:
            out.addmm_(low.t(), some)


def _places(where: Tensor) -> Tensor:
    """Its true places. Without memory (fakes.py) it is not known which: none, as with weights that have learned nothing yet."""
    return where.new_empty((0, 1), dtype=torch.int64) if isinstance(where, FakeTensor) else where.nonzero()


def _inside(wanted: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """The place among these words of each wanted one, and 1 where it is there at all; elsewhere any place, and 0."""
    inside = (wanted >= words.start) & (wanted < words.stop)
    return (wanted - words.start).clamp_(0, words.stop - words.start - 1), inside.float()
