"""Device and precision: autocast, the gradient scaler, and accelerate, which provides them. Must not know the loop.

Weights and gradients stay in float32 always. accelerate has no fp16 on the CPU; there torch's own parts are used.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from trainerd.machine import cpu

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OLDER = {
    "amx_bf16": "_is_amx_tile_supported",
    "amx_fp16": "_is_amx_fp16_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
}
"""Where get_capabilities() does not know a name; whoever has AMX's tiles computes bf16 in them."""


def resolve(wanted: str, device: torch.device) -> str:
    """What "auto" means on this machine: the fastest it computes natively."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _cpu_computes_bf16() else "fp32"


def slow_here(name: str, device: torch.device) -> str | None:
    """A sentence for a person when the chosen precision is not what this machine is good at."""
    return cpu.slow_with(name, _instructions()) if device.type == "cpu" else None


def _cpu_computes_bf16() -> bool:
    """AMX, or AVX-512's bf16 dot product alone: the latter was 1.6 to 1.8 times as fast as fp32 on a GRU LM (docs/log.md)."""
    return bool(_instructions() & {"amx_bf16", "avx512_bf16"})


def _instructions() -> set[str]:
    """What this processor has for low precisions. torch knows on every system, by names that have changed between its versions."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    older = {name for name, function in _OLDER.items() if name not in capabilities and getattr(torch.cpu, function, bool)()}
    return older | {name for name, has in capabilities.items() if has is True}


class Precision:
    """One training's device, autocast and scaler."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.dtype = _DTYPES[name]
        # accelerate keeps one setting per process; a library user may train twice, in two precisions.
        AcceleratorState._reset_state(True)
        self._accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="no" if name == "fp32" else name, gradient_accumulation_steps=1
        )
        self.device: torch.device = self._accelerator.device
        self._own_fp16 = name == "fp16" and device.type == "cpu"
        self._scales_on_host = False
        self.scaler: torch.amp.GradScaler | None = torch.amp.GradScaler("cpu") if self._own_fp16 else self._accelerator.scaler

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model, its forward under autocast. It is where it belongs already: parts of it may lie on the host.

        The optimizer is not given to accelerate: its wrapper looks for packages in every step (0.1 ms), and moves counters
        to the GPU that torch wants on the CPU.
        """
        prepared: nn.Module = self._accelerator.prepare(model, device_placement=[False])
        return prepared

    def scale_on_host(self) -> None:
        """Whatever the device, the scaler meets the gradients on the CPU."""
        self._scales_on_host = True
        if self.scaler is not None:
            self.scaler = self._fresh_scaler()

    def autocast(self) -> AbstractContextManager[Any]:
        """A context for everything that computes."""
        if self.name == "fp32":
            return nullcontext()
        if self._own_fp16:
            return torch.autocast("cpu", torch.float16)
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def backward(self, total: Tensor) -> None:
        (total if self.scaler is None else self.scaler.scale(total)).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step; under fp16 it is left out when a gradient overflowed, and the scale halved."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def forget_step(self) -> None:
        """A step was broken off between unscale() and update(): the scaler must not remember it."""
        if self.scaler is not None:
            fresh = self._fresh_scaler()
            fresh.load_state_dict(self.scaler.state_dict())
            self.scaler = fresh

    def _fresh_scaler(self) -> torch.amp.GradScaler:
        if not self._scales_on_host:
            return torch.amp.GradScaler(self.device.type)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))  # its scale lies where the first loss did: later ones are on the device, the gradients are not
        return scaler

    def state(self) -> dict[str, Any] | None:
        return None if self.scaler is None else self.scaler.state_dict()

    def restore(self, state: dict[str, Any] | None) -> None:
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)
