"""A frozen linear layer in NF4 or int8, as bitsandbytes 0.50 keeps and multiplies it. Must not know any model.

On a CPU every allocation is held against the real layers, those inside its operations as well; a GPU's are read from its source
(backends/cuda/ops.py) and have not been compared with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trainerd.memory import kernels, ops
from trainerd.memory.tape import Node, Shape, Tape, Tensor

NAMES = ("nf4", "int8")
_BLOCK, _NESTED = 64, 256
_TABLES = (16 + 256) * 4 + 4  # the code, the nested code, the offset
_FUSED_ROWS = 4  # up to so many every GPU multiplies packed weights as they are; from there to 1,536 some do, beyond none


class Packed(Protocol):
    """What a layer says of itself."""

    fan_in: int
    fan_out: int
    base: str
    nested: bool
    compute: str
    loaded: str
    bias: Tensor | None


def sizes(fan_in: int, fan_out: int, base: str, nested: bool) -> list[int]:
    """Bytes of the packed weight and of its scales."""
    numbers = fan_in * fan_out
    if base == "int8":
        return [numbers, fan_out * 4]
    blocks = _blocks(fan_in, fan_out)
    if not nested:
        return [-(-numbers // 2), blocks * 4, 16 * 4]
    return [-(-numbers // 2), blocks, -(-blocks // _NESTED) * 4, _TABLES]


def linear(layer: Packed, x: Tensor) -> Tensor:
    """The layer's product; the weight is unpacked for it and forgotten, and on the way back once more."""
    return _int8(layer, x) if layer.base == "int8" else _nf4(layer, x)


def unpacked(layer: Packed, tape: Tape) -> Tensor:
    """The whole weight, as PEFT asks for it (dequantize_module_weight)."""
    if layer.base == "int8":
        between = tape.new(_shape(layer), "fp32")
        whole = tape.new(_shape(layer), "fp32")
        del between
        return whole
    return _from_nf4(layer, tape)


def _shape(layer: Packed) -> Shape:
    return layer.fan_out, layer.fan_in


def _blocks(fan_in: int, fan_out: int) -> int:
    return -(-fan_in * fan_out // _BLOCK)


def _product(x: Tensor, whole: Tensor, bias: Tensor | None) -> Tensor:
    """torch's linear, under autocast as well; inside an operation of bitsandbytes' no checkpoint sees it to keep its result."""
    tape = x.tape
    before, tape.keeping = tape.keeping, None
    try:
        return kernels.linear(x, whole, bias)
    finally:
        tape.keeping = before


# Four bits


def _nf4(layer: Packed, x: Tensor) -> Tensor:
    """Linear4bit: in the type it computes in, and back into that of its input. The input is not kept."""
    tape, given = x.tape, x.dtype
    x = ops.to(x, layer.compute)
    rows = x.numel // x.shape[-1]
    with tape.no_grad():
        if tape.device == "cuda" and rows <= _FUSED_ROWS:
            made = tape.new((*x.shape[:-1], layer.fan_out), x.dtype)
            tape.flops += 2.0 * rows * layer.fan_in * layer.fan_out
        else:
            made = _of_unpacked(layer, x)
    tape.record([made], [x], _nf4_back, (), layer)
    del x
    return ops.to(made, given)


def _of_unpacked(layer: Packed, x: Tensor) -> Tensor:
    """The weight in the input's type, and scales in fp32 beside it until the product is there."""
    tape = x.tape
    scales = tape.new((_blocks(layer.fan_in, layer.fan_out),), "fp32") if layer.nested else None
    shifted = tape.new(scales.shape, "fp32") if scales is not None else None
    if tape.device != "cuda":
        scales = None
    whole = tape.new(_shape(layer), x.dtype)
    made = _product(x, whole, layer.bias)
    del scales, shifted, whole
    return made


def _from_nf4(layer: Packed, tape: Tape) -> Tensor:
    """dequantize_4bit: in the type that was loaded."""
    scales = tape.new((_blocks(layer.fan_in, layer.fan_out),), "fp32") if layer.nested else None
    whole = tape.new(_shape(layer), layer.loaded)
    del scales
    return whole


def _nf4_back(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    g, about = ops.only(grads), node.shapes[0]
    if g is None or about is None:
        return [None]
    layer: Packed = node.about[0]
    whole = ops.to(_from_nf4(layer, g.tape), g.dtype)
    found = g.tape.new(about[0], g.dtype)
    g.tape.flops += 2.0 * found.numel * layer.fan_out
    del whole, g
    return [ops.to(found, about[1])]


def inside(rows: int, shape: Sequence[int], block: int, size: int, *, nested: bool, low: int) -> int:
    """Bytes that a CPU's gemm_4bit makes beside its result, unseen by who calls it: the weight unpacked in the input's type of so many
    bytes, its scales where they were packed once more, and under autocast to a type of `low` bytes (0: none) input and weight again."""
    numbers = shape[0] * shape[1]
    scales = 4 * -(-numbers // block) if nested else 0
    return scales + numbers * size + ((numbers + rows * shape[1]) * low if 0 < low < size else 0)


# Eight bits


def _int8(layer: Packed, x: Tensor) -> Tensor:
    """Linear8bitLt without outliers, in training. It keeps its input as an attribute of the graph: as long as there is a graph."""
    tape = x.tape
    with tape.no_grad():
        if tape.device == "cuda":
            made = _int8_by_int8(layer, x)
        else:
            made = kernels.linear(x, _scaled(layer, x), layer.bias)
    tape.record([made], [x], _int8_back, (), layer, x.detach())
    return made


def _int8_by_int8(layer: Packed, x: Tensor) -> Tensor:
    """A GPU's: the input in eight bits by way of fp16, whole numbers of the product, fp16, and the input's type."""
    tape, shape = x.tape, (*x.shape[:-1], layer.fan_out)
    half = ops.to(x, "fp16")
    scales = tape.new((x.numel // x.shape[-1],), "fp32")
    low = tape.new(x.shape, "uint8")
    del half
    whole = tape.new(shape, "int32")
    made = ops.to(tape.new(shape, "fp16"), x.dtype)
    tape.flops += 2.0 * x.numel * layer.fan_out
    del scales, low, whole
    return made


def _scaled(layer: Packed, x: Tensor) -> Tensor:
    """The weight in the input's type, times its rows' scales."""
    whole = x.tape.new(_shape(layer), x.dtype)
    x.tape.new((layer.fan_out, 1), "fp32")
    return whole


def _int8_back(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    g, about = ops.only(grads), node.shapes[0]
    if g is None or about is None:
        return [None]
    layer: Packed = node.about[0]
    kept: Tensor = node.about[1]
    if len(g.shape) == 3 and not g.contiguous:
        g = g.tape.new(g.shape, g.dtype)
    whole = _scaled(layer, kept)
    lowered = ops.to(g, kept.dtype)
    found = g.tape.new(*about)
    g.tape.flops += 2.0 * found.numel * layer.fan_out
    del whole, lowered
    return [found]
