"""How much of a model's frozen weights lies in files that are mapped, and so in no RAM (safetensors, torch.load with mmap). Must not map.

Torch itself does not tell: a storage knows its file's name only where others may write to it too. So the system is asked.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainerd.engine.streaming import streamable
from trainerd.engine.task import Task
from trainerd.machine import mapped


def on_disk(task: Task, model: nn.Module) -> tuple[int, int]:
    """Bytes outside of what can be streamed, and bytes of that. What was written into a part since is RAM, and is left out of the first."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.device.type == "cpu"]
    if not frozen:
        return 0, 0
    lies, written = mapped.in_files([(p.data_ptr(), _bytes(p)) for p in frozen], mapped.parts())
    away = {id(p) for p in streamable(model, task.blocks(model))}
    resident = sum(_bytes(p) for p, there in zip(frozen, lies, strict=True) if there and id(p) not in away)
    streamed = sum(_bytes(p) for p, there in zip(frozen, lies, strict=True) if there and id(p) in away)
    left = min(written, resident)
    return resident - left, max(0, streamed - (written - left))


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()
