"""The blocks models are made of, as modules over tensors without contents. Must not know any task.

They hold parameters and are called like torch's modules of the same name. A base in NF4 or int8 is bitsandbytes' (quantised.py);
an adapter is what PEFT adds beside it (adapters.py).
"""

from __future__ import annotations

from trainerd.memory import kernels, ops, quantised
from trainerd.memory.adapters import Adapter, Beside
from trainerd.memory.tape import BUFFERS, Shape, Tape, Tensor


class Linear:
    """nn.Linear. `base`: fp32, bf16, fp16, nf4 (doubly quantised unless `nested` is off) or int8; the last two are frozen.

    A quantised base was loaded as `loaded`, and is multiplied as `compute`.
    """

    def __init__(
        self,
        tape: Tape,
        fan_in: int,
        fan_out: int,
        *,
        bias: bool = True,
        base: str = "fp32",
        nested: bool = True,
        trainable: bool = True,
        adapter: Adapter | None = None,
        compute: str | None = None,
        loaded: str | None = None,
    ) -> None:
        self.fan_in, self.fan_out, self.base, self.nested = fan_in, fan_out, base, nested
        self.compute = compute or tape.precision or "fp32"
        self.loaded = loaded or self.compute
        packed = base in quantised.NAMES
        trainable = trainable and adapter is None and not packed
        self.weight: Tensor | None = None
        if packed:
            for number in quantised.sizes(fan_in, fan_out, base, nested):
                tape.parameter(number, dtype="uint8", trainable=False)
        else:
            self.weight = tape.parameter(fan_out, fan_in, dtype=base, trainable=trainable)
        self.bias = tape.parameter(fan_out, dtype=self.compute if packed else base, trainable=trainable) if bias else None
        self.beside = Beside(tape, self, adapter) if adapter is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x) if self.beside is None else self.beside(x)

    def product(self, x: Tensor) -> Tensor:
        """The base's own."""
        return quantised.linear(self, x) if self.weight is None else kernels.linear(x, self.weight, self.bias)


class Embedding:
    """nn.Embedding; `tied` shares another's weight."""

    def __init__(self, tape: Tape, number: int, width: int, *, trainable: bool = True, base: str = "fp32") -> None:
        self.weight = tape.parameter(number, width, trainable=trainable, dtype=base)

    def __call__(self, index: Tensor) -> Tensor:
        return ops.embedding(index, self.weight)


class Norm:
    """LayerNorm, or RMSNorm when `root` is set: (features) is the last dimension."""

    def __init__(self, tape: Tape, width: int, *, root: bool = False, trainable: bool = True) -> None:
        self.root = root
        self.weight = tape.parameter(width, trainable=trainable)
        self.bias = None if root else tape.parameter(width, trainable=trainable)

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight) if self.root else kernels.layer_norm(x, self.weight, self.bias)


class Convolution:
    """nn.Conv2d and nn.Conv3d, by the number of sizes in `kernel`; the result keeps the input's size over `stride`."""

    def __init__(self, tape: Tape, channels_in: int, channels_out: int, kernel: Shape, *, stride: int = 1, bias: bool = True) -> None:
        self.stride = stride
        self.weight = tape.parameter(channels_out, channels_in, *kernel)
        self.bias = tape.parameter(channels_out) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.convolution(x, self.weight, self.bias, tuple(-(-n // self.stride) for n in x.shape[2:]))


class BatchNorm:
    """nn.BatchNorm2d and 3d, with running statistics."""

    def __init__(self, tape: Tape, channels: int) -> None:
        self.weight, self.bias = tape.parameter(channels), tape.parameter(channels)
        self.running = [tape.buffer(channels), tape.buffer(channels), tape.buffer(dtype="int64")]

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.batch_norm(x, self.weight, self.bias)


class SelfAttention:
    """Projections, heads, and the product: `fused` is torch's scaled_dot_product_attention, else scores in a table."""

    def __init__(
        self,
        tape: Tape,
        width: int,
        heads: int,
        *,
        key_heads: int | None = None,
        bias: bool = True,
        fused: bool = True,
        base: str = "fp32",
        adapter: Adapter | None = None,
        rotary: bool = False,
        joined: bool = True,
    ) -> None:
        self.heads, self.key_heads, self.size = heads, key_heads or heads, width // heads
        self.fused, self.rotary, self.joined = fused, rotary, joined
        outs = [width, self.key_heads * self.size, self.key_heads * self.size]
        widths = [sum(outs)] if joined else outs
        self.inner = [Linear(tape, width, out, bias=bias, base=base, adapter=adapter) for out in widths]
        self.outer = Linear(tape, width, width, bias=bias, base=base, adapter=adapter)

    def __call__(self, x: Tensor) -> Tensor:
        samples, places, width = x.shape
        if self.joined:
            flat = ops.pieces(self.inner[0](x), (samples, places, width), 3)
        else:
            flat = [layer(x) for layer in self.inner]
        split = [self._split(t, heads) for t, heads in zip(flat, (self.heads, self.key_heads, self.key_heads), strict=True)]
        del flat
        if self.rotary:
            split[:2] = [rotate(t) for t in split[:2]]
        if self.key_heads != self.heads:
            split[1:] = [ops.repeat(t, samples, self.heads, places, self.size) for t in split[1:]]
        mixed = kernels.attention(*split) if self.fused else table_attention(*split)
        back = ops.transpose(mixed, samples, places, self.heads, self.size)
        back.contiguous = not mixed.contiguous  # what is fused is laid out for this
        return self.outer(ops.reshape(back, samples, places, width))  # meanwhile its heads are there: a forward holds its local names

    def _split(self, x: Tensor, heads: int) -> Tensor:
        samples, places = x.shape[:2]
        apart = ops.regroup(x, samples, places, heads, self.size)
        return ops.transpose(apart, samples, heads, places, self.size)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions: x * cos + cat(-x2, x1) * sin."""
    half = (*x.shape[:-1], x.shape[-1] // 2)
    first, second = ops.part(x, *half), ops.part(x, *half)
    turned = ops.cat([ops.scale(second), first], *x.shape)
    table = x.tape.new((x.shape[-2], x.shape[-1]), "fp32")
    return ops.add(ops.mul(x, table), ops.mul(turned, table))


def table_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(width)) v with the whole table of scores, as written by hand."""
    scores = ops.scale(kernels.matmul(q, ops.transpose(k, *k.shape[:-2], k.shape[-1], k.shape[-2])))
    return kernels.matmul(ops.softmax(scores), v)


class Mlp:
    """Two layers with GELU between."""

    def __init__(self, tape: Tape, width: int, inner: int, *, bias: bool = True) -> None:
        self.up = Linear(tape, width, inner, bias=bias)
        self.down = Linear(tape, inner, width, bias=bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(x)))


class SwiGlu:
    """silu(gate(x)) * up(x), then down."""

    def __init__(self, tape: Tape, width: int, inner: int, *, base: str = "fp32", adapter: Adapter | None = None) -> None:
        self.gate, self.up = (Linear(tape, width, inner, bias=False, base=base, adapter=adapter) for _ in (0, 1))
        self.down = Linear(tape, inner, width, bias=False, base=base, adapter=adapter)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(ops.mul(ops.silu(self.gate(x)), self.up(x)))


class SampleDropout:
    """The engine's dropout keyed by sample (trainerd/engine/dropout.py): numbers made from keys, a factor per unit saved."""

    def __init__(self, p: float, units: int | None = None) -> None:
        self.p, self.units = p, units
        self._units: Tensor | None = None

    def lay_out(self, tape: Tape) -> None:
        """The units' numbers, before the first step: where it is known how many there are."""
        if self.p and self.units is not None:
            with tape.counting_as(BUFFERS):
                self._units = tape.new((self.units,), "int32")

    def __call__(self, x: Tensor) -> Tensor:
        if not self.p or not x.tape.grad_enabled:
            return x
        tape, places = x.tape, x.shape[:-1] if len(x.shape) >= 3 else x.shape[:1]
        with tape.no_grad():
            rows = tape.new(places, "int32")
            if self._units is None:
                with tape.counting_as(BUFFERS):
                    self._units = tape.new((x.shape[-1],), "int32")
            mixed = tape.new(x.shape, "int32")
            tape.new(x.shape, "int32")
            smaller = tape.new(x.shape, "bool")
            keep = ops.to(smaller, x.dtype)
            del smaller
        made = ops.mul(x, keep)
        del mixed, rows
        return made
