"""bitsandbytes' layers in 4 and 8 bits (QLoRA's base) in a form that can be streamed: to the bit their own, but no weight is kept for the
way back.

Their autograd functions keep a layer's packed weight, or its state, as an attribute of the graph from the way there on, where no
checkpoint takes it away; so every block's would stay. Here it is a saved tensor like any other. The scales stay on the device: in 4
bits an eighth of the weights, packed once more a thirtieth. Must not copy weights: streaming.py does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_BITS = {"Linear4bit.forward": 4, "Linear8bitLt.forward": 8}


def pack(model: nn.Module, device: torch.device) -> None:
    """What is not packed yet becomes so, on the device that will train it (another one may round otherwise), layer by layer, and lies in
    RAM again afterwards. bitsandbytes would do it when the model is moved, after the estimate."""
    packed_any = False
    for layer in model.modules():
        if not _is_unpacked(layer):
            continue
        packed_any = True
        layer.to(device)
        if device.type != "cpu":
            layer.to("cpu")
            settle(layer, torch.device("cpu"))
    if packed_any and device.type == "cuda":
        torch.cuda.empty_cache()


def settle(model: nn.Module, device: torch.device) -> None:
    """After a move to the device: bitsandbytes moves the weights in 8 bits, and forgets what it has noted on them."""
    for layer in model.modules():
        weight: Any = layer._parameters.get("weight")
        if getattr(weight, "SCB", None) is not None and weight.dtype == torch.int8:
            weight.CB, weight.SCB = weight.data, weight.SCB.to(device)


def is_weight(module: nn.Module, name: str) -> bool:
    """Whether this is the packed weight of a layer that computes as bitsandbytes does it by default."""
    layer: Any = module
    bits = _bits(module) if name == "weight" else 0
    if bits == 8:
        return layer.weight.dtype == torch.int8 and not layer.state.has_fp16_weights and _noted_scales(module) is not None
    state: Any = getattr(layer.weight, "quant_state", None) if bits == 4 else None
    if state is None or getattr(state, "packing_format_for_cpu", False):  # that order, for inference, has no way back
        return False
    return tuple(state.shape) == (layer.out_features, layer.in_features)


def scale_bytes(model: nn.Module) -> dict[int, int]:
    """What the scales take, by the id of the packed weight that they are of."""
    found: dict[int, int] = {}
    for layer in model.modules():
        for weight in layer._parameters.values():
            state = getattr(weight, "quant_state", None)
            parts = [getattr(level, name, None) for level in (state, getattr(state, "state2", None)) for name in ("absmax", "code")]
            tensors = [part for part in (*parts, _noted_scales(layer)) if isinstance(part, Tensor)]
            if weight is not None and tensors and (state is not None or weight.dtype == torch.int8):
                found[id(weight)] = sum(t.numel() * t.element_size() for t in tensors)
    return found


def plain(weight: Tensor) -> Tensor:
    """The numbers of a weight, without the kind that bitsandbytes gives it."""
    return weight.detach().as_subclass(Tensor)


def held(numbers: Tensor, home: nn.Parameter) -> nn.Parameter:
    """A weight to compute with, that is a copy of the one at home: of bitsandbytes' kind where that is, with all that is noted on it, for
    others ask for it (PEFT's DoRA unpacks the weight itself)."""
    if type(home) in (nn.Parameter, FakeTensor):
        weight = nn.Parameter(numbers, requires_grad=False)
    else:
        weight = torch.Tensor._make_subclass(type(home), numbers, False)
    vars(weight).update(vars(home))
    return weight


def replace_forward(layer: Any, device: torch.device) -> None:
    """Let the layer compute by the functions here, its scales on the device."""
    if _bits(layer) == 4:
        layer.weight.quant_state.to(device)
        layer.forward = _Forward4(layer)
        return
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    layer.state.SCB = layer.state.SCB.to(device)
    layer.forward = _Forward8(layer)


def restore_forward(layer: nn.Module) -> None:
    """As it came."""
    vars(layer).pop("forward", None)


def _bits(layer: nn.Module) -> int:
    """4 or 8 where bitsandbytes' own forward computes, or ours in its place; 0 for any other layer, a person's own among them."""
    instead = vars(layer).get("forward")
    own: Any = type(layer).forward
    if (instead is not None and not isinstance(instead, _Forward)) or not str(getattr(own, "__module__", "")).startswith("bitsandbytes"):
        return 0
    return _BITS.get(getattr(own, "__qualname__", ""), 0)


def _is_unpacked(layer: nn.Module) -> bool:
    weight: Any = layer._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or not weight.is_floating_point():
        return False
    bits = _bits(layer)
    kept = {4: "bnb_quantized", 8: "has_fp16_weights"}.get(bits)
    return kept is not None and not getattr(weight, kept, True)


def _noted_scales(layer: nn.Module) -> Tensor | None:
    """Of a layer in 8 bits: on its weight until its first pass, on its state afterwards."""
    weight, state = layer._parameters.get("weight"), vars(layer).get("state")
    found = getattr(weight, "SCB", None)
    found = found if found is not None else vars(state).get("SCB") if hasattr(state, "__dict__") else None
    return found if isinstance(found, Tensor) else None


class _Forward:
    """A layer's forward, as bitsandbytes' own but for what multiplies."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer


class _Forward4(_Forward):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        if not layer.compute_type_is_set:
            layer.set_compute_type(x)
            layer.compute_type_is_set = True
        given = x.dtype
        if layer.compute_dtype is not None:
            x = x.to(layer.compute_dtype)
        bias = layer.bias
        if bias is not None:
            if bias.dtype != x.dtype:
                bias.data = bias.data.to(x.dtype)
            bias = bias.to(layer.compute_dtype)
        product: Tensor = _Product4.apply(x, plain(layer.weight), bias, layer.weight.quant_state)  # type: ignore[no-untyped-call]
        return product.to(given)


class _Forward8(_Forward):
    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        layer.state.is_training = layer.training
        if layer.bias is not None and layer.bias.dtype != x.dtype:
            layer.bias.data = layer.bias.data.to(x.dtype)
        product: Tensor = _Product8.apply(x, plain(layer.weight), layer.bias, layer.state)  # type: ignore[no-untyped-call]
        return product


class _Product4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        from bitsandbytes import matmul_4bit

        ctx.save_for_backward(packed)
        ctx.state, ctx.bias_dtype = state, None if bias is None else bias.dtype
        product: Tensor = matmul_4bit(x, packed, state, bias=bias)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from bitsandbytes.functional import dequantize_4bit

        def of_input(grad: Tensor, packed: Tensor) -> Tensor:
            return torch.matmul(grad, dequantize_4bit(packed.view(-1, 1), ctx.state).to(grad.dtype))

        return _back(ctx, grads[0], of_input)


class _Product8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        from bitsandbytes import matmul

        ctx.save_for_backward(packed)
        ctx.scales, ctx.dtype, ctx.shape = state.SCB, x.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        with_copy = copy.copy(state)  # theirs has the weight in a state that outlives the block
        with_copy.CB = packed
        product: Tensor = matmul(x, packed, bias=bias, state=with_copy)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def of_input(grad: Tensor, packed: Tensor) -> Tensor:
            if grad.dim() == 3:
                grad = grad.reshape(-1, grad.shape[-1]).contiguous()
            unpacked = packed.to(ctx.dtype, copy=True).mul_(ctx.scales.unsqueeze(1).mul(1.0 / 127.0))
            return torch.matmul(grad.to(ctx.dtype), unpacked).view(ctx.shape)

        return _back(ctx, grads[0], of_input)


def _back(ctx: Any, grad: Tensor, of_input: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of input and bias, as far as they are asked for."""
    (packed,) = ctx.saved_tensors
    of_bias = grad.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return of_input(grad, packed) if ctx.needs_input_grad[0] else None, None, of_bias, None
