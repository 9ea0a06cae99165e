"""Sees every operation of one micro-batch: what is born, what ends, which gradients are complete, how much work it is. Must not judge.

Every result of every operation is seen; of the scratch space inside kernels only what a rule is known for (scratch.py).
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainerd.memory import quantised, scratch
from trainerd.memory.traced import Trace

_CONVOLUTION, _CHOICE = torch.ops.aten.convolution.default, torch.ops.aten.masked_select.default
_DEVICE = torch.ops.prim.device.default  # a question of torch's own, about a tensor without memory
_PACKED = frozenset({"gemm_4bit", "int8_scaled_mm", "int8_mixed_scaled_mm"})
"""bitsandbytes' products with a packed weight."""
_PRODUCT = "gemm_4bit"
"""The one of them that a CPU makes in one operation; what is in 8 bits is unpacked outside, and seen."""


def _work(func: Any) -> Callable[..., float] | None:
    """What counts the work of an operation, where it is a product: torch knows its own alone."""
    if func.namespace == "bitsandbytes":
        return _of_packed if func._opname in _PACKED else None
    known: Callable[..., float] | None = flop_registry.get(func.overloadpacket)
    return known


def _of_packed(x: Tensor, *_: Any, out_val: Any, **__: Any) -> float:
    return 2.0 * float(tree_leaves(out_val)[0].numel()) * x.shape[-1]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Births and ends of storages, in order; those known before are left out. `weights`: whose gradients are waited for. `watch` hears
    at each operation how much is held."""

    def __init__(self, known: list[Tensor], weights: Sequence[nn.Parameter] = (), watch: Callable[[int], None] = lambda held: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch
        self._held_bytes = 0
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.gradients: list[tuple[int, int, int]] = []
        self.flops = 0.0
        self.batch = 0
        self.forwards = True
        self.low_bytes = 0
        """Of a number in the type that autocast computes in, while it is on; no dispatch mode is told that it is."""
        self._scratch: tuple[list[int], list[int]] = [], []
        self._products: set[tuple[Any, ...]] = set()
        self._seen: dict[int, Any] = {}
        for storage in (t.untyped_storage() for t in known):
            forgotten = functools.partial(self._forget, storage._cdata)  # its place may be another's later
            self._seen[storage._cdata] = weakref.ref(storage, forgotten)
        self._numbers: dict[int, int] = {}
        self._on = True
        self._hooks = [w.register_post_accumulate_grad_hook(self._completing(place)) for place, w in enumerate(weights)]  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be left alone by torch's compiler, torch would load all of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return func(*args)
        self._watch(self._held_bytes)
        result = func(*args, **(kwargs or {}))
        work = _work(func)
        if work is not None:
            self.flops += work(*args, **(kwargs or {}), out_val=result)
            if self.forwards:
                self._products.add((str(func), *(tuple(given.shape) for given in args if isinstance(given, Tensor))))
        if func is _CONVOLUTION:
            self._convolved(args[0].shape, args[1].shape, result)
        elif func is _CHOICE:
            self._scratch[0].append(scratch.of_masked_select(math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape))))  # type: ignore[no-untyped-call]
            self._scratch[1].append(0)
        inside = self._inside(*args, **(kwargs or {})) if func.namespace == "bitsandbytes" and func._opname == _PRODUCT else None
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        if inside is not None:
            self.events.append(~inside)
        return result

    def _inside(self, x: Tensor, packed: Tensor, shape: Sequence[int], scales: Tensor, block: int, *more: Any, **named: Any) -> int:
        """What that product has made when its result is there: a storage that nobody else sees. After the kind of packing and the bias come
        the scales, where they are packed, too."""
        nested, number = (*more, None, None, None)[2] is not None or named.get("absmax_8bit") is not None, len(self.sizes)
        self.sizes.append(quantised.inside(x.numel() // x.shape[-1], shape, block, x.element_size(), nested=nested, low=self.low_bytes))
        self.events.append(number)
        return number

    def _convolved(self, x: torch.Size, weight: torch.Size, made: Tensor) -> None:
        for found, some in zip(self._scratch, (x[0], 1), strict=True):
            found.append(scratch.of_convolution((some, *x[1:]), weight, (some, *made.shape[1:]), made.element_size()))

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        number, size = len(self.sizes), storage.nbytes()

        def gone(_: Any) -> None:
            self._held_bytes -= size
            self._seen.pop(key, None)
            self._numbers.pop(key, None)
            if self._on:
                self.events.append(~number)

        self._seen[key] = weakref.ref(storage, gone)
        self._numbers[key] = number
        self._held_bytes += size
        self.sizes.append(size)
        self.events.append(number)

    def _forget(self, key: int, _: Any) -> None:
        self._seen.pop(key, None)

    def _completing(self, place: int) -> Callable[[Tensor], None]:
        def complete(weight: Tensor) -> None:
            assert weight.grad is not None
            number = self._numbers.get(weight.grad.untyped_storage()._cdata)
            if number is not None:
                self.gradients.append((len(self.events), number, place))

        return complete

    def trace(self, samples: int) -> Trace:
        """What was recorded so far; later ends do not belong to it."""
        self._on = False
        for hook in self._hooks:
            hook.remove()
        found = Trace(samples, list(self.sizes), list(self.events), self.flops, self.batch, list(self.gradients), len(self._products))
        return replace(found, scratch=list(self._scratch[0]), scratch_of_one=list(self._scratch[1]))
