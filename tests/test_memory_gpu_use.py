"""What the driver saw of a training, for its receipt: measured, by a driver that stands in, and null where nobody can tell."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.supervised import wait_for
from tests.test_machine import GB, FakeNvml
from tests.test_memory_guard import Machine, watch
from tests.toy import Script, config, run
from trainerd.engine import fitting, gpu_use, receipt, spill
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


def looked(peak: DriverPeak, reserved: int) -> None:
    """A look, and the driver's answer to it."""
    peak.look(reserved)
    peak.asking.settle(5.0)


def test_the_most_that_was_seen_of_this_process_is_kept() -> None:
    """Its own bytes on its own GPU, whatever others hold. Asked when the allocator holds more than ever, not at every look; and at
    the end, for a context grows by itself."""
    driver = Driver(used=GB, own=500 * MB)
    peak = DriverPeak(1, {1: 200 * MB}, lambda: 100 * MB, driver)
    looked(peak, 300 * MB)
    driver.own, driver.used = 900 * MB, 3 * GB
    asked = driver.inits
    for reserved in (300 * MB, 100 * MB, 0):
        looked(peak, reserved)
    assert driver.inits == asked
    looked(peak, 700 * MB)
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
    found.driver.asking.settle(5.0)
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


class Stuck(Driver):
    """It takes every question from `gate` on and answers none."""

    def __init__(self, used: int, own: int | None) -> None:
        super().__init__(used, own)
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0

    def nvmlInit(self) -> None:
        self.asked += 1
        assert self.gate.wait(60)
        super().nvmlInit()


def test_a_driver_that_is_stuck_holds_up_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard's look returns at once, however often it looks; nobody else is asked meanwhile; the receipt waits two seconds at most
    and has what was seen before, and a look at what slows a training waits one, once."""
    driver, machine = Stuck(used=2 * GB, own=1430 * MB), Machine()
    machine.vram = DeviceUse(2 * GB, 4 * GB, 1200 * MB, 1000 * MB)
    found = watch(machine, Script(), monkeypatch)
    found.driver = DriverPeak(1, {}, lambda: 100 * MB, driver)
    found.look(0.0, 1)
    found.driver.asking.settle(5.0)
    driver.gate.clear()
    asked, began = driver.asked, time.monotonic()
    for second in range(1, 30):
        machine.vram = DeviceUse(2 * GB, 4 * GB, (1200 + second) * MB, 1000 * MB)
        found.look(float(second), second)
    assert time.monotonic() - began < 20.0, "the training waited for the driver"
    wait_for(lambda: driver.asked > asked, 5, "the question")
    assert driver.asked == asked + 1
    assert found.driver.most() == 1430 * MB
    monkeypatch.setattr(gpu, "_load", lambda: driver)
    look, between = spill.Look(1), time.monotonic()
    assert between - began < 20.0
    assert look() == look() == look() == spill.Evidence()
    assert time.monotonic() - between < 20.0
    driver.refuse = ("init",)
    driver.gate.set()


def test_an_answer_that_is_owed_at_the_end_is_waited_for() -> None:
    """A driver that is slow, not stuck: the look of the last second counts."""
    driver = Stuck(used=GB, own=500 * MB)
    driver.gate.clear()
    peak = DriverPeak(1, {}, lambda: 100 * MB, driver)
    peak.look(300 * MB)
    threading.Timer(0.2, driver.gate.set).start()
    assert peak.most() == 500 * MB


def test_a_driver_that_is_stuck_from_the_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others held is then not known, and neither is the driver's version."""
    driver = Stuck(used=GB, own=None)
    driver.gate.clear()
    for name, found in (("is_available", True), ("is_initialized", False)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(gpu, "_load", lambda: driver)
    monkeypatch.setattr(gpu_use, "_FIRST_SECONDS", 0.1)
    monkeypatch.setattr(fitting, "_DRIVER_SECONDS", 0.1)
    began = time.monotonic()
    assert gpu_use.before_context() == {} and fitting.device_facts(torch.device("cuda")) == ("a GPU", None)
    assert time.monotonic() - began < 20.0
    driver.refuse = ("init",)
    driver.gate.set()
