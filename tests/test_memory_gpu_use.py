"""What the driver saw of a training, for its receipt: measured, by a driver that stands in, and null where nobody can tell."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_machine import GB, FakeNvml
from tests.test_memory_guard import Machine, watch
from tests.toy import Script, config, run
from trainerd.engine import gpu_use, receipt
from trainerd.engine import plan as plans
from trainerd.engine.gpu_use import DriverPeak
from trainerd.engine.guard import DeviceUse
from trainerd.machine import gpu

MB = 1 << 20


class Driver(FakeNvml):
    """Two GPUs. Of the second `used` is held by all, and of this process `own` (None: it is not told), under the number `pid`."""

    def __init__(self, used: int, own: int | None) -> None:
        super().__init__("GPU-a", "GPU-b")
        self.used, self.own, self.pid = used, own, os.getpid()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=4 * GB, used=self.used if handle == 1 else 7 * MB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        if handle == 0:
            return [SimpleNamespace(pid=self.pid, usedGpuMemory=3 * GB)]
        return [SimpleNamespace(pid=1, usedGpuMemory=2 * GB), SimpleNamespace(pid=self.pid, usedGpuMemory=self.own)]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:
        return []


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_most_that_was_seen_of_this_process_is_kept() -> None:
    """Its own bytes on its own GPU, whatever others hold. Asked when the allocator holds more than ever, not at every look; and at
    the end, for a context grows by itself."""
    driver = Driver(used=GB, own=500 * MB)
    peak = DriverPeak(1, {1: 200 * MB}, lambda: 100 * MB, driver)
    peak.look(300 * MB)
    driver.own, driver.used = 900 * MB, 3 * GB
    asked = driver.inits
    for reserved in (300 * MB, 100 * MB, 0):
        peak.look(reserved)
    assert driver.inits == asked
    peak.look(700 * MB)
    driver.own = 400 * MB
    assert peak.most() == 900 * MB
    driver.own = 950 * MB
    assert peak.most() == 950 * MB


def test_where_a_process_is_not_told_it_is_what_all_hold_but_the_others() -> None:
    """As under Windows: the same counter, less what it said before we were there; and with a process of somebody else's under our
    number, which holds less than our allocator does."""
    for own, pid in ((None, os.getpid()), (50 * MB, os.getpid()), (500 * MB, 4_000_000)):
        driver = Driver(used=GB, own=own)
        driver.pid = pid
        assert DriverPeak(1, {0: 1, 1: 300 * MB}, lambda: 600 * MB, driver).most() == GB - 300 * MB, (own, pid)


def test_where_nobody_can_tell_it_is_null() -> None:
    """Not known who was there before; others gave back more than we took; no driver; no GPU."""
    driver = Driver(used=GB, own=None)
    for others, reserved in (({}, 1), ({0: 5}, 1), ({1: 900 * MB}, 600 * MB)):
        assert DriverPeak(1, others, lambda reserved=reserved: reserved, driver).most() is None  # type: ignore[misc]
    driver.refuse = ("init",)
    assert DriverPeak(1, {1: 0}, lambda: 1, driver).most() is None
    assert gpu_use.of(torch.device("cpu"), {}).most() is None and gpu.held_by(os.getpid(), 1, driver) is None


def test_others_are_told_from_us_only_before_we_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a context of our own, or without a GPU that torch can use, nothing is known of others; and the driver is not asked."""
    driver = Driver(used=GB, own=None)
    for is_available, has_context, expected in ((True, False, {0: 7 * MB, 1: GB}), (True, True, {}), (False, False, {})):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_available: found)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda found=has_context: found)
        driver.inits = 0
        assert gpu_use.before_context(driver) == expected and bool(driver.inits) is bool(expected)


def test_a_receipt_holds_what_was_seen_and_not_what_was_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard's looks feed it, also when the cache has been given back by the end; no assumed context is in it."""
    driver, machine = Driver(used=2 * GB, own=1430 * MB), Machine()
    machine.vram = DeviceUse(2 * GB, 4 * GB, 1200 * MB, 1000 * MB)
    found = watch(machine, Script(), monkeypatch)
    found.driver = DriverPeak(1, {}, lambda: 100 * MB, driver)
    found.look(0.0, 1)
    driver.own = 400 * MB
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1200 * MB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 * MB)
    real = receipt._on_device(torch.device("cuda", 1), found)
    assert real == {"allocated_bytes": 1000 * MB, "reserved_bytes": 1200 * MB, "driver_bytes": 1430 * MB}


def test_a_trainer_looks_at_the_others_before_it_is_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its plan is made, which may create the context; not for a run that is on the CPU, whose GPU may sleep."""
    calls: list[object] = []
    resolve = plans.resolve
    monkeypatch.setattr(gpu_use, "before_context", lambda: calls.append("others") or {0: 5})
    monkeypatch.setattr(plans, "resolve", lambda *given: calls.append("plan") or resolve(*given))
    monkeypatch.setattr(gpu_use, "of", lambda device, others: calls.append((device.type, others)) or gpu_use.NOBODY)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run(tmp_path, config({"max_steps": 3}), Script({2: {"do": "leave", "why": "pause", "save": True}}))
    assert calls == ["others", "plan", (device, {0: 5})]
    if device == "cpu":
        run(tmp_path, config({"max_steps": 3}))
        assert calls[3:] == [("cpu", {})]
