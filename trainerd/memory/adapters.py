"""LoRA and DoRA beside a frozen linear layer, as PEFT 0.21 computes them. Must not know any model.

In fp32 and in PEFT's order, for what it leaves in its local names lives until its forward returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trainerd.memory import kernels, ops, quantised
from trainerd.memory.tape import ADAPTERS, Tape, Tensor


@dataclass(frozen=True)
class Adapter:
    """LoRA of this rank beside a frozen base; `dora` learns the length of each weight row as well."""

    rank: int
    dropout: float = 0.0
    dora: bool = False


class Base(quantised.Packed, Protocol):
    """The frozen layer: `weight` unless it is packed."""

    weight: Tensor | None

    def product(self, x: Tensor) -> Tensor: ...


class Beside:
    """The learned part of one layer."""

    def __init__(self, tape: Tape, base: Base, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.down = tape.parameter(adapter.rank, base.fan_in, kind=ADAPTERS)
        self.up = tape.parameter(base.fan_out, adapter.rank, kind=ADAPTERS)
        self.length = tape.parameter(base.fan_out, kind=ADAPTERS) if adapter.dora else None

    def __call__(self, x: Tensor) -> Tensor:
        """What comes out of the whole layer."""
        result = self.base.product(x)
        given, packed = result.dtype, self.base.base in quantised.NAMES
        if self.base.base == "nf4":
            result = ops.clone(result)
        # PEFT asks whether CUDA's autocast is on: beside a packed base it leaves types as they are only there.
        converts = not (packed and x.tape.casting and x.tape.device == "cuda")
        if converts:
            x = ops.to(x, "fp32")
        if self.length is not None:
            result = self._dora(x, result, self.length)
        else:
            beside = ops.scale(kernels.linear(kernels.linear(ops.dropout(x) if self.adapter.dropout else x, self.down), self.up))
            if packed and converts:
                beside = ops.to(beside, given)
            result = ops.add(result, beside)
        return ops.to(result, given) if converts else result

    def _low_rank(self, x: Tensor) -> Tensor:
        return kernels.linear(kernels.linear(x, self.down), self.up)

    def _dora(self, x: Tensor, result: Tensor, length: Tensor) -> Tensor:
        """result + (length / |W + BA| - 1) * base + length / |W + BA| * BAx. With dropout, where there is any, the base is multiplied
        once more, by what is left of the input."""
        drops = self.adapter.dropout > 0 and x.tape.grad_enabled
        if drops:
            x = ops.dropout(x)
        product = self._product(x)
        whole = self._whole(x)
        norm = self._norm(whole, product)
        factor = ops.reshape(ops.mul(length, norm), 1, -1)
        beside = self._low_rank(x)
        if drops:
            base = kernels.linear(x, whole)
        else:
            base = result if self.base.bias is None else ops.sub(result, self.base.bias)
        more = ops.add(ops.mul(ops.shift(factor), base), ops.scale(ops.mul(factor, beside)))
        del product, whole, norm, factor, beside, base
        return ops.add(result, more)

    def _product(self, x: Tensor) -> Tensor:
        """BA, by an identity that goes through both: it has a way back, which nobody goes, until the forward returns."""
        identity = x.tape.new((self.base.fan_in, self.base.fan_in), self.down.dtype)
        made = self._low_rank(identity)
        return ops.to(ops.transpose(made, self.base.fan_out, self.base.fan_in), x.dtype)

    def _whole(self, x: Tensor) -> Tensor:
        weight = self.base.weight
        return ops.to(weight if weight is not None else quantised.unpacked(self.base, x.tape), x.dtype)

    def _norm(self, whole: Tensor, product: Tensor) -> Tensor:
        """Of each row of W + BA, without a way back."""
        with whole.tape.no_grad():
            summed = ops.add(whole, ops.scale(product.detach()))
            return whole.tape.new(summed.shape[:1], summed.dtype)
