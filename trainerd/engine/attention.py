"""Which kernel computes torch's attention, for the time of a training, and whether it really does. Must not know any model.

It acts on torch's scaled_dot_product_attention; attention that a model writes out by hand is computed as written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from trainerd.contract.errors import ConfigError

AUTO, FLASH, EFFICIENT, MATH = "auto", "flash", "efficient", "math"
_BACKENDS = {FLASH: SDPBackend.FLASH_ATTENTION, EFFICIENT: SDPBackend.EFFICIENT_ATTENTION, MATH: SDPBackend.MATH}
_SIGNS = {FLASH: "flash_attention", EFFICIENT: "efficient_attention"}  # in the names of the operations
_NO_KERNEL = ("No available kernel", "No viable backend for scaled_dot_product_attention")


@contextmanager
def kernel(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let this kernel compute attention, and no other. Raises ConfigError where it cannot: torch never takes another silently."""
    if name == AUTO:
        yield
        return
    with sdpa_kernel(_BACKENDS[name]):
        found = chosen(device, dtype)
        if found != name:
            message = f"train.attention is {name}, but torch has no such kernel on {device.type} for {str(dtype).removeprefix('torch.')}."
            raise ConfigError([message], "Leave it at auto: torch takes the fastest that can.")
        try:
            yield
        except RuntimeError as error:
            if not _says_none(error):
                raise
            message = f"train.attention is {name}, and that kernel cannot compute this model's attention (its shapes, mask or dropout)."
            raise ConfigError([message], "Leave it at auto: torch takes the fastest that can.") from error


def for_trace(name: str) -> AbstractContextManager[Any]:
    """Around a trace on the CPU: what is fused on a GPU is fused there too, and math is math."""
    return sdpa_kernel(_BACKENDS[MATH]) if name == MATH else nullcontext()


def chosen(device: torch.device, dtype: torch.dtype) -> str | None:
    """The kernel that computes attention as things are now, both ways; None when none can."""
    q, k, v = (torch.zeros(1, 2, 16, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    names = _Names()
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), names:
            torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True).sum(), [q, k, v])
    except RuntimeError as error:
        if not _says_none(error):
            raise
        return None
    return next((name for name, sign in _SIGNS.items() if any(sign in operation for operation in names.seen)), MATH)


def _says_none(error: RuntimeError) -> bool:
    return any(words in str(error) for words in _NO_KERNEL)


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations that were done."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be left alone by torch's compiler, torch would load all of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func.overloadpacket.__name__))
        return func(*args, **(kwargs or {}))
