"""The optimizer of a run: which parameters, which kernel, which decay. Must not step: the loop does.

The learning rate is set before every step from the schedule (see schedules.py); a group's `lr_scale` multiplies it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainerd.config.model import TrainConfig
from trainerd.contract.errors import ConfigError, TrainerdError
from trainerd.engine import eager
from trainerd.engine.lanes import lane_of
from trainerd.engine.offload import Offload
from trainerd.engine.task import Task

_MOMENTUM = 0.9
_EIGHT_BIT = ("adamw8bit", "paged_adamw8bit")


def build(model: nn.Module, task: Task, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, its state already allocated: so that memory is known before step 1."""
    return _of_groups(_groups(model, task, config), config)


def build_on_host(model: nn.Module, task: Task, config: TrainConfig, device: torch.device) -> tuple[torch.optim.Optimizer, Offload]:
    """The same on the CPU, for weights on `device`; and what carries gradients there and weights back."""
    if config.optimizer in _EIGHT_BIT:
        message = f"memory.offload = optimizer: the small state of train.optimizer = {config.optimizer} stays on the device"
        raise ConfigError([f"{message}; choose one of the two."])
    groups = _groups(model, task, config)
    weights = [p for group in groups for p in group["params"]]
    offload = Offload(weights, lane_of(device, max(p.numel() * p.element_size() for p in weights)))
    optimizer = _of_groups([{**group, "params": [offload.master(p) for p in group["params"]]} for group in groups], config)
    offload.attach(optimizer)
    return optimizer, offload


def build_bare(model: nn.Module, task: Task, config: TrainConfig) -> torch.optim.Optimizer:
    """The same without a state: for somebody who puts other tensors in the weights' place."""
    groups = _groups(model, task, config)
    return _fused(config, groups) or _plain(config, groups)


def _groups(model: nn.Module, task: Task, config: TrainConfig) -> list[dict[str, Any]]:
    groups = task.parameter_groups(model) or _own_groups(model, config.weight_decay)
    groups = [{"lr_scale": 1.0, **group, "params": list(group["params"])} for group in groups]
    if not any(group["params"] for group in groups):
        raise TrainerdError("The model has no trainable parameter.", "Leave requires_grad on for what is to be learned.")
    return groups


def _of_groups(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer in _EIGHT_BIT:
        from trainerd.engine import eightbit

        return eightbit.make(config.optimizer, groups, config.lr, config.weight_decay)
    optimizer = _fused(config, groups) or _plain(config, groups)
    _allocate_state(optimizer)
    return optimizer


def kernel(optimizer: torch.optim.Optimizer) -> str:
    """What the plan calls it: adamw, fused or not."""
    name = getattr(optimizer, "known_as", type(optimizer).__name__.lower())
    return name + (" (fused)" if optimizer.param_groups[0].get("fused") else "")


def warning(config: TrainConfig) -> str | None:
    """A sentence for a person where an optimizer does less than its name says."""
    if config.optimizer not in _EIGHT_BIT:
        return None
    from trainerd.engine import eightbit

    return eightbit.warning(config.optimizer)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def _own_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, biases and norms (everything of one dimension) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _fused(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
    # Adam looks at the types in its first step only.
    if config.optimizer == "adafactor" or not all(torch.is_floating_point(p) for group in groups for p in group["params"]):
        return None
    try:
        return _make(config, groups, {"fused": True})
    except RuntimeError:
        # No fused kernel for this device or for these parameter types.
        return None


def _plain(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return _make(config, groups, {})


def _make(config: TrainConfig, groups: list[dict[str, Any]], kernel_choice: dict[str, Any]) -> torch.optim.Optimizer:
    groups = [dict(group) for group in groups]
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "adamw":
        return eager.plain(torch.optim.AdamW)(groups, lr=lr, weight_decay=decay, **kernel_choice)
    if config.optimizer == "adam":
        return eager.plain(torch.optim.Adam)(groups, lr=lr, weight_decay=decay, **kernel_choice)
    if config.optimizer == "sgd":
        return eager.plain(torch.optim.SGD)(groups, lr=lr, weight_decay=decay, momentum=_MOMENTUM, **kernel_choice)
    return eager.plain(torch.optim.Adafactor)(groups, lr=lr, weight_decay=decay)


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer allocate now what it would in the first step: a step with zero gradients and no learning rate.

    It changes no weight, and the counters start at zero again; an out-of-memory here costs nothing.
    """
    kept = [{name: group[name] for name in ("lr", "weight_decay")} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0  # an L2 decay would be a gradient
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
    for state in optimizer.state.values():
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            step.zero_()
        elif step is not None:
            state["step"] = 0
