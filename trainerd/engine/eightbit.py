"""bitsandbytes' 8-bit AdamW, resumable: a state is put back into the memory it already has. Must not choose, nor step.

Imported only when a run asks for it: bitsandbytes takes seconds to load. Its own load_state_dict() makes new tensors, all of
them on the device: a paged state would not be paged any more after a resume.
"""

from __future__ import annotations

import sys
import warnings
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from trainerd.contract.errors import ConfigError, TrainerdError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # what it uses of torch.jit
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    from bitsandbytes.optim.optimizer import Optimizer2State

_SMALLEST = 4096
"""Tensors below this many numbers keep their state in fp32."""


class _Kept(Optimizer2State):  # type: ignore[misc]
    """AdamW8bit, paged or not, whose state is made at once, and filled in place."""

    def allocate(self) -> None:
        """All states now: in the first step it would be too late for an out-of-memory to cost nothing."""
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                self.init_state(group, parameter, number, place)

    def state_dict(self) -> dict[str, Any]:
        _wait_for_pages(self)
        found: dict[str, Any] = super().state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Raises TrainerdError when it is the state of other parameters, or of a bitsandbytes that kept it differently."""
        _wait_for_pages(self)
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
            raise _another_form()
        for group, saved in zip(groups, saved_groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        parameters = chain.from_iterable(group["params"] for group in groups)
        numbers = chain.from_iterable(group["params"] for group in saved_groups)
        for parameter, number in zip(parameters, numbers, strict=True):
            _fill(self.state[parameter], _flat(state_dict["state"][number]))


class EightBit(_Kept, AdamW8bit):  # type: ignore[misc]
    """All states on the device."""

    known_as = "adamw8bit"


class PagedEightBit(_Kept, PagedAdamW8bit):  # type: ignore[misc]
    """States of large tensors in memory that the driver moves to the GPU and back by pages."""

    known_as = "paged_adamw8bit"


def make(name: str, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimizer with its state. Raises ConfigError when this machine cannot compute it."""
    device = next(p for group in groups for p in group["params"]).device
    _try(name, device)
    made: _Kept = (PagedEightBit if name == PagedEightBit.known_as else EightBit)(groups, lr=lr, weight_decay=weight_decay)
    made.allocate()
    return made


def warning(name: str) -> str | None:
    """A sentence for a person where an optimizer does less than its name says."""
    if name == PagedEightBit.known_as and sys.platform == "win32":
        return (
            "Windows moves pages to the GPU only when they are touched, and gives the GPU no more memory than it has: "
            "paged_adamw8bit saves nothing over adamw8bit here, and may be slower."
        )
    return None


def _try(name: str, device: torch.device) -> None:
    """A step with one small tensor: which kernels there are differs between versions, systems and devices."""
    if name == PagedEightBit.known_as and device.type != "cuda":
        raise ConfigError(
            [f"train.optimizer = {name}: needs an NVIDIA GPU; on a CPU there is no memory to page to."],
            "Set train.optimizer=adamw8bit, which is the same without paging.",
        )
    tried = torch.nn.Parameter(torch.zeros(_SMALLEST, device=device))
    tried.grad = torch.ones_like(tried)
    try:
        AdamW8bit([tried], lr=1.0).step()
        works = bool(torch.isfinite(tried).all()) and bool((tried != 0).all())
        why = "a step with it changes nothing"
    except (RuntimeError, NotImplementedError, AttributeError, OSError, ValueError) as error:
        works, why = False, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if not works:
        raise ConfigError(
            [f"train.optimizer = {name}: the installed bitsandbytes cannot compute it on this {device.type.upper()} ({why})."],
            "Update bitsandbytes (0.50 computes it on CPUs too), or set train.optimizer=adamw.",
        )


def _flat(saved: dict[str, Any]) -> dict[str, Any]:
    """One level: newer versions of bitsandbytes put their tensors into a dictionary of their own."""
    flat: dict[str, Any] = {}
    for name, value in saved.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def _fill(state: dict[str, Any], saved: dict[str, Any]) -> None:
    if state.keys() != saved.keys():
        raise _another_form()
    for name, value in saved.items():
        kept = state[name]
        if not isinstance(kept, Tensor):
            state[name] = value
        elif not isinstance(value, Tensor) or kept.shape != value.shape or kept.dtype != value.dtype:
            raise _another_form()
        else:
            kept.copy_(value)


def _another_form() -> TrainerdError:
    message = "The optimizer's state in the checkpoint does not fit: it is of other weights, or of another version of bitsandbytes."
    return TrainerdError(message, "Use the version that wrote it, or begin a new run with --no-resume.")


def _wait_for_pages(optimizer: _Kept) -> None:
    """Managed memory must not be touched from here while a kernel runs: on Windows that is a crash."""
    if optimizer.is_paged and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
