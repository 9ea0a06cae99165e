"""What memory was in use from moment to moment: RAM, swap, GPU, and the trainer's own share. Must not judge or change it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from trainerd.contract import status
from trainerd.contract.paths import Home
from trainerd.machine.gpu import GpuReader
from trainerd.machine.memory import process_tree_bytes, ram, swap

from . import gpu_driver
from .words import NOT_KNOWN, size


@dataclass(frozen=True)
class Sample:
    """One moment; unknown is None. The GPU is the first one."""

    at: float
    ram_used_bytes: int
    swap_used_bytes: int
    trainer_bytes: int | None
    """RAM of the trainer and all it has started, shared pages counted once."""
    vram_used_bytes: int | None
    gpu_temperature_c: float | None
    gpu_utilization_percent: float | None
    step: int | None


NAMES = tuple(field.name for field in fields(Sample))
MEASURES = NAMES[1:-1]
_HEADS = {"ram_used_bytes": "RAM", "swap_used_bytes": "swap", "trainer_bytes": "trainer", "vram_used_bytes": "VRAM"}
_HEADS |= {"gpu_temperature_c": "GPU heat", "gpu_utilization_percent": "GPU busy"}
_WIDTH = 9


class Sampler:
    """Takes samples of one home; keeps the driver open between them."""

    def __init__(self, home: Home, gpus: GpuReader | None = None) -> None:
        self.home, self.gpus = home, gpus or GpuReader()

    def take(self) -> Sample:
        reading = status.read(self.home)
        shown = reading.status if reading.alive else None
        gpus = gpu_driver.read(self.gpus)
        first = gpus[0] if gpus else None
        return Sample(
            at=time.time(),
            ram_used_bytes=ram().used_bytes,
            swap_used_bytes=swap().used_bytes,
            trainer_bytes=process_tree_bytes(shown.trainer.pid) if shown and shown.trainer.pid else None,
            vram_used_bytes=first.used_bytes if first else None,
            gpu_temperature_c=first.temperature_c if first else None,
            gpu_utilization_percent=first.utilization_percent if first else None,
            step=shown.progress.step if shown else None,
        )

    def close(self) -> None:
        """Let go of the driver, so that an idle GPU may sleep."""
        gpu_driver.close(self.gpus)


def heading() -> str:
    """Above the lines."""
    return f"{'time':<10}" + "".join(f"{_HEADS[name]:>{_WIDTH}}" for name in MEASURES) + f"{'step':>9}"


def line(sample: Sample) -> str:
    """One moment; at most 80 wide."""
    step = f"{sample.step:,}" if sample.step is not None else ""
    return (
        f"{time.strftime('%H:%M:%S', time.localtime(sample.at)):<10}"
        + "".join(f"{shown(name, getattr(sample, name)):>{_WIDTH}}" for name in MEASURES)
        + f"{step:>9}"
    ).rstrip()


def shown(name: str, value: Any) -> str:
    """A measure as a person reads it."""
    if value is None:
        return NOT_KNOWN
    if name.endswith("_bytes"):
        return size(value)
    return f"{value:.0f} °C" if name.endswith("_c") else f"{value:.0f} %"


def summary(samples: Sequence[Sample]) -> dict[str, dict[str, float] | None]:
    """Least, mean and most of each measure; None for one that was never known."""
    found: dict[str, dict[str, float] | None] = {}
    for name in MEASURES:
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        found[name] = {"min": min(values), "mean": statistics.fmean(values), "max": max(values)} if values else None
    return found


def summary_lines(samples: Sequence[Sample]) -> list[str]:
    """The summary under the lines' columns."""
    found = summary(samples)
    return [
        f"{kind:<10}" + "".join(f"{shown(name, part[kind]) if (part := found[name]) else NOT_KNOWN:>{_WIDTH}}" for name in MEASURES)
        for kind in ("min", "mean", "max")
    ]


def row(sample: Sample) -> list[Any]:
    """For a table file: numbers as they are, unknown is empty."""
    return ["" if value is None else value for value in asdict(sample).values()]
