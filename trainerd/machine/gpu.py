"""What the NVIDIA driver tells about its GPUs (NVML). Must never create a CUDA context: the memory would be the person's.

Asking wakes a sleeping laptop GPU: callers ask only while something uses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, TypeVar

from trainerd.contract import clock

T = TypeVar("T")
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")


@dataclass(frozen=True)
class GpuFacts:
    """One GPU; `index` is the one torch uses with CUDA_DEVICE_ORDER=PCI_BUS_ID. Unknown is None."""

    index: int
    uuid: str
    name: str
    total_bytes: int | None
    used_bytes: int | None
    temperature_c: float | None
    power_w: float | None
    utilization_percent: float | None


def may_be_used(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment might train on a GPU of NVIDIA's. Nothing is asked, and nothing woken: Linux has the
    driver's device file (WSL's too), no variable hides it, and torch is no build for CPUs."""
    if environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not any(map(os.path.exists, _DRIVERS)):
        return False
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


class GpuReader:
    """Asks the driver again and again, without starting it up each time. `nvml` stands in for pynvml in tests."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml if nvml is not None else _load()
        self._open = False

    def read(self) -> list[GpuFacts]:
        """The GPUs this process may use, in torch's order; [] without a driver that answers."""
        nvml = self._nvml
        if nvml is None:
            return []
        try:
            if not self._open:
                nvml.nvmlInit()
                self._open = True
            return [_facts(nvml, handle, index, uuid) for index, (handle, uuid) in enumerate(_visible_handles(nvml))]
        except nvml.NVMLError:
            self.close()  # no driver, or it went away in between: updated, or the device fell off the bus
            return []

    def close(self) -> None:
        """Let go of the driver, so that an idle GPU may sleep."""
        if self._open:
            self._open = False
            _quietly(self._nvml, self._nvml.nvmlShutdown)


def devices(nvml: Any = None) -> list[GpuFacts]:
    """One look at the GPUs this process may use, in torch's order; [] without a driver."""
    reader = GpuReader(nvml)
    try:
        return reader.read()
    finally:
        reader.close()


@dataclass(frozen=True)
class GpuLoad:
    """Whether the GPU is held back by heat or a fault of its supply, and how much of it other processes use. Unknown is None."""

    throttled: bool | None = None
    others_percent: float | None = None


# Clocks held back by heat or the power supply: NVML's SwThermalSlowdown, HwSlowdown, HwThermalSlowdown, HwPowerBrakeSlowdown. The power
# cap is not among them: laptops run at it all day.
_HELD_BACK = 0x20 | 0x08 | 0x40 | 0x80
_LOAD_MICROSECONDS = 2_000_000


def load(index: int, pid: int, nvml: Any = None) -> GpuLoad:
    """The load of the GPU with torch's number, beside that of the process `pid`."""

    def answer(nvml: Any) -> GpuLoad:
        chosen = _visible_handles(nvml)
        if index >= len(chosen):
            return GpuLoad()
        handle, _ = chosen[index]
        reasons = _quietly(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        since = int(clock.wall() * 1e6) - _LOAD_MICROSECONDS
        seen = _quietly(nvml, lambda: nvml.nvmlDeviceGetProcessUtilization(handle, since))
        others = None if seen is None else float(sum(one.smUtil for one in seen if one.pid != pid))
        return GpuLoad(None if reasons is None else bool(reasons & _HELD_BACK), others)

    return _asked(nvml, answer, GpuLoad())


def driver_version(nvml: Any = None) -> str | None:
    """The version of the NVIDIA driver, None when there is none that answers."""
    return _asked(nvml, lambda nvml: _text(nvml.nvmlSystemGetDriverVersion()), None)


def driver_cuda(nvml: Any = None) -> int | None:
    """The newest major version of CUDA the driver can run: 12 of 12.8. None when there is no driver that answers."""
    return _asked(nvml, lambda nvml: int(nvml.nvmlSystemGetCudaDriverVersion()) // 1000, None)


def compute_capability(index: int, nvml: Any = None) -> tuple[int, int] | None:
    """Of the GPU with torch's number: (8, 6) of an RTX 3050; None: not known."""

    def answer(nvml: Any) -> tuple[int, int] | None:
        chosen = _visible_handles(nvml)
        if index >= len(chosen):
            return None
        found = _quietly(nvml, lambda: nvml.nvmlDeviceGetCudaComputeCapability(chosen[index][0]))
        return None if found is None else (int(found[0]), int(found[1]))

    return _asked(nvml, answer, None)


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU; Windows does not tell how much."""

    pid: int
    gpu: int
    used_bytes: int | None


def processes(nvml: Any = None) -> list[GpuProcess]:
    """Who holds memory of the GPUs this process may use, computing or drawing; [] without a driver that answers."""

    def answer(nvml: Any) -> list[GpuProcess]:
        found: dict[tuple[int, int], int | None] = {}
        for index, (handle, _) in enumerate(_visible_handles(nvml)):
            for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
                for one in _quietly(nvml, partial(ask, handle)) or ():
                    used, before = one.usedGpuMemory, found.get((int(one.pid), index))
                    found[int(one.pid), index] = before if used is None else max(int(used), before or 0)
        return [GpuProcess(pid, index, used) for (pid, index), used in found.items()]

    return _asked(nvml, answer, [])


def held_by(pid: int, index: int, nvml: Any = None) -> int | None:
    """What this process holds of the GPU with torch's number, its context included; None where the driver does not tell."""
    return next((one.used_bytes for one in processes(nvml) if (one.pid, one.gpu) == (pid, index)), None)


def _asked(nvml: Any, answer: Callable[[Any], T], nobody: T) -> T:
    """What the driver says in a session of its own; `nobody` when there is none that answers."""
    nvml = nvml if nvml is not None else _load()
    if nvml is None:
        return nobody
    try:
        nvml.nvmlInit()
        return answer(nvml)
    except nvml.NVMLError:
        return nobody
    finally:
        _quietly(nvml, nvml.nvmlShutdown)


def _visible_handles(nvml: Any) -> list[tuple[Any, str]]:
    """Handle and UUID of each device that torch sees, in torch's order."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    return [(handles[place], uuids[place]) for place in visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))]


def visible(uuids: list[str], variable: str | None) -> list[int]:
    """Which of the driver's GPUs CUDA_VISIBLE_DEVICES leaves, in its order; CUDA stops at the first name it does not know."""
    if variable is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for name in (part.strip() for part in variable.split(",")):
        if name.isdecimal():
            place = int(name) if int(name) < len(uuids) else None
        else:
            place = next((i for i, uuid in enumerate(uuids) if name and uuid.startswith(name)), None)
        if place is None:
            break
        chosen.append(place)
    return chosen


def _load() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _facts(nvml: Any, handle: Any, index: int, uuid: str) -> GpuFacts:
    memory = _quietly(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    return GpuFacts(
        index=index,
        uuid=uuid,
        name=_text(_quietly(nvml, lambda: nvml.nvmlDeviceGetName(handle)) or "NVIDIA GPU"),
        total_bytes=int(memory.total) if memory else None,
        used_bytes=int(memory.used) if memory else None,
        temperature_c=_number(_quietly(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))),
        power_w=_number(_quietly(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)),
        utilization_percent=_number(_quietly(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
    )


def _quietly(nvml: Any, ask: Callable[[], Any]) -> Any:
    """The answer, or None: laptops do not tell power, virtual GPUs do not tell temperature."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
