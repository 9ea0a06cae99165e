"""Looks at the machine once a second and puts what it sees into the status. Must not act on it, nor wait for a driver.

The GPU is asked only while the trainer uses it: asking wakes a sleeping laptop GPU and keeps it awake. It and the trainer's processes
are asked from threads of their own: a driver that is stuck, or a process that is stuck in it, may never answer.
"""

from __future__ import annotations

import time
from typing import Any

from trainerd.contract import clock
from trainerd.contract.status import Status
from trainerd.machine import memory
from trainerd.machine.asking import Asking
from trainerd.machine.gpu import GpuFacts, GpuReader
from trainerd.machine.power import power
from trainerd.memory.limits import resolve_limit

_SECOND = 0.95  # a little less, so that a tick that comes early by a hair is not skipped
_POWER_SECONDS = 5.0
_TREE_SECONDS = 15.0
_YOUNG_SECONDS, _YOUNG_TREE_SECONDS = 30.0, 3.0  # a trainer that has just started is not as small as it will be


class Sensors:
    """`limits` is the memory section of the configuration."""

    def __init__(self, limits: dict[str, Any], gpus: GpuReader | None = None) -> None:
        self._ram_limit = str(limits.get("ram_limit", "auto"))
        self._vram_limit = str(limits.get("vram_limit", "auto"))
        self._gpus = gpus
        self._driver = Asking(self._ask_driver)
        self._tree = Asking(memory.process_tree_bytes)
        self._due: dict[str, float] = {}

    def sample(self, status: Status) -> None:
        """Fill memory, GPU and power of the status, each as often as it is worth."""
        if self._is_due("ram", _SECOND):
            self._sample_ram(status)
            self._sample_gpu(status)
        if self._is_due("power", _POWER_SECONDS):
            facts = power()
            status.power.plugged, status.power.percent = facts.plugged, facts.percent
        self._sample_tree(status)

    def _sample_tree(self, status: Status) -> None:
        pid = status.trainer.pid
        young = clock.wall() - (status.trainer.started_at or 0.0) < _YOUNG_SECONDS
        if pid is not None and self._is_due("tree", _YOUNG_TREE_SECONDS if young else _TREE_SECONDS):
            self._tree.want(pid)
        status.memory.ram.trainer_bytes = None if pid is None else self._tree.answer(pid)

    def _sample_ram(self, status: Status) -> None:
        facts, ram = memory.ram(status.trainer.pid), status.memory.ram
        ram.used_bytes, ram.total_bytes = facts.used_bytes, facts.total_bytes
        ram.limit_bytes = resolve_limit(self._ram_limit, facts.total_bytes)

    def _sample_gpu(self, status: Status) -> None:
        device = status.plan.device or ""
        if status.trainer.pid is None or not device.startswith("cuda"):
            if self._driver.has_begun:
                self._driver.want(False)
            status.gpu.temperature_c = status.gpu.power_w = status.gpu.utilization_percent = None
            return
        self._driver.want(True)
        number = device.partition(":")[2]  # "cuda" is "cuda:0"
        index = int(number) if number.isdecimal() else 0
        found = self._driver.answer(True)
        if found is None and self._driver.is_open:
            return  # the first answer: not unknown for that
        found = found or []
        gpu, vram = status.gpu, status.memory.vram
        if index >= len(found):  # the driver or the device is gone: what it told before is not true any more
            gpu.temperature_c = gpu.power_w = gpu.utilization_percent = vram.used_bytes = None
            return
        facts = found[index]
        gpu.name, gpu.temperature_c = facts.name, facts.temperature_c
        gpu.power_w, gpu.utilization_percent = facts.power_w, facts.utilization_percent
        vram.used_bytes, vram.total_bytes = facts.used_bytes, facts.total_bytes
        if facts.total_bytes is not None:
            vram.limit_bytes = resolve_limit(self._vram_limit, facts.total_bytes)

    def _ask_driver(self, wanted: bool) -> list[GpuFacts]:
        """In the driver's thread: what it tells, or let go of it."""
        self._gpus = self._gpus or GpuReader()
        if wanted:
            return self._gpus.read()
        self._gpus.close()
        return []

    def _is_due(self, what: str, every_seconds: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + every_seconds
        return True
