"""Memory limits that are passed before a training begins, in words. Must not set or change one."""

from __future__ import annotations

from collections.abc import Sequence

from trainerd.machine import gpu
from trainerd.machine.memory import RamFacts, ram
from trainerd.memory.limits import ADVICE, used_already

from . import gpu_driver


def warnings(ram_limit: str, vram_limit: str) -> list[str]:
    """What a person who starts a training now should know. Looks at the machine."""
    return [f"{text} {ADVICE}" for text in passed(ram_limit, vram_limit, ram(), gpu_driver.devices())]


def passed(ram_limit: str, vram_limit: str, now: RamFacts, gpus: Sequence[gpu.GpuFacts]) -> list[str]:
    """One sentence for each limit below what is in use now; of several GPUs the first is the one a training takes."""
    found = [used_already("memory.ram_limit", ram_limit, now.used_bytes, now.total_bytes)]
    for one in gpus[:1]:
        if one.used_bytes is not None and one.total_bytes is not None:
            found.append(used_already("memory.vram_limit", vram_limit, one.used_bytes, one.total_bytes))
    return [text for text in found if text]
