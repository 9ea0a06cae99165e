"""What a configuration asks of this machine that it cannot do, found before anything is started. Must not import torch.

What only torch knows is found out by the trainer, before its first step.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainerd.config import deepspeed
from trainerd.config.model import RunConfig
from trainerd.contract.errors import ConfigError

from . import gpu_driver, packages

_EIGHT_BIT, _PAGED = "adamw8bit", "paged_adamw8bit"


def refuse_impossible(config: RunConfig) -> None:
    """Raise ConfigError with every problem, each with what to set instead."""
    missing = deepspeed.missing(packages.version("deepspeed")) if config.memory.offload == deepspeed.OFFLOAD else None
    if missing is not None:
        raise ConfigError([missing])
    if config.train.optimizer not in (_EIGHT_BIT, _PAGED):
        return
    facts = packages.torch_facts()
    on_gpu = facts is not None and facts.cuda is not None and bool(gpu_driver.devices())
    found = problems(config, on_gpu, packages.bitsandbytes_steps_on_cpus())
    if found:
        raise ConfigError(found)


def problems(config: RunConfig, on_gpu: bool, steps_on_cpus: bool | None) -> Sequence[str]:
    """In words; `steps_on_cpus`: what packages says of bitsandbytes."""
    said = f"train.optimizer = {config.train.optimizer}: "
    if steps_on_cpus is None:
        return [f"{said}needs bitsandbytes, which is not installed; pip install bitsandbytes, or set train.optimizer=adamw."]
    if on_gpu:
        return []
    if config.train.optimizer == _PAGED:
        instead = f"set train.optimizer={_EIGHT_BIT if steps_on_cpus else 'adamw'}."
        return [f"{said}needs an NVIDIA GPU that torch can use; on a CPU there is no memory to page to: {instead}"]
    if not steps_on_cpus:
        return [f"{said}the installed bitsandbytes computes it on GPUs only; update bitsandbytes, or set train.optimizer=adamw."]
    return []
