"""The GPU's driver, asked for one command: for so long at most, and not again once it has not answered. Must not judge what it tells.

What is stuck may never answer, and takes no other question then: what it would have told counts as unknown, and that can be said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trainerd.machine import gpu
from trainerd.machine.asking import Asking

T = TypeVar("T")
PATIENCE_SECONDS = 5.0
"""To wake a sleeping laptop's GPU takes one or two."""
STUCK = "The GPU's driver does not answer: nothing is known of the GPU."


class Driver:
    """Every question goes through one thread; who has waited `patience_seconds` for one in vain waits for no other."""

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._asking: Asking[bool] = Asking(lambda work: work(), patience_seconds)
        self.is_stuck = False
        """The last question was not answered."""

    def ask(self, ask: Callable[[], T], otherwise: T) -> T:
        """The answer; `otherwise` where there is none in time, and at once while one before is still owed."""
        found: list[T] = []

        def work() -> bool:
            found.append(ask())
            return True

        self.is_stuck = self._asking.ask(work, seconds=self._patience_seconds) is None
        return otherwise if self.is_stuck else found[0]


_driver = Driver()


def devices() -> list[gpu.GpuFacts]:
    """The GPUs this process may use, in torch's order; [] without a driver that answers."""
    return _driver.ask(lambda: gpu.devices(), [])


def version() -> str | None:
    """Of the driver; None when there is none that answers."""
    return _driver.ask(lambda: gpu.driver_version(), None)


def cuda() -> int | None:
    """The newest major version of CUDA it can run; None: not known."""
    return _driver.ask(lambda: gpu.driver_cuda(), None)


def compute_capability(index: int) -> tuple[int, int] | None:
    """Of the GPU with torch's number; None: not known."""
    return _driver.ask(lambda: gpu.compute_capability(index), None)


def processes() -> list[gpu.GpuProcess]:
    """Who holds memory of the GPUs; [] without a driver that answers."""
    return _driver.ask(lambda: gpu.processes(), [])


def read(reader: gpu.GpuReader) -> list[gpu.GpuFacts]:
    """What a reader that is kept open tells now."""
    return _driver.ask(reader.read, [])


def close(reader: gpu.GpuReader) -> None:
    """Let go of a reader, so that an idle GPU may sleep; not of one whose driver is stuck."""
    _driver.ask(reader.close, None)


def is_stuck() -> bool:
    """Whether the last question had no answer."""
    return _driver.is_stuck
