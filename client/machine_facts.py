"""What this machine is: processor, memory, drive, GPU, torch, and which trainings fit. Must not measure, change or start anything."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trainerd.config import catalogue
from trainerd.config.load import resolve
from trainerd.contract.paths import Home
from trainerd.machine import adapters, cpu, drive, filesystem, gpu
from trainerd.machine.memory import ram, swap
from trainerd.memory.planner import Answer
from trainerd.memory.profile import Profile

from . import diagnosis, gpu_driver, outlook, packages


@dataclass(frozen=True)
class Fit:
    """The plan's verdict about one preset of one built-in task, on the device it would train on."""

    task: str
    preset: str
    where: str
    answer: Answer
    stated: catalogue.Stated


@dataclass(frozen=True)
class Facts:
    """Everything `profile` shows."""

    processor: dict[str, Any]
    ram: dict[str, Any]
    swap: dict[str, Any]
    disk: dict[str, Any]
    gpus: list[gpu.GpuFacts]
    driver: str | None
    torch: packages.TorchFacts | None
    torch_finding: diagnosis.Finding
    driver_findings: list[diagnosis.Finding]
    measured: Profile
    fits: list[Fit]

    @property
    def torch_can_use_the_gpu(self) -> bool | None:
        """By its build and by the driver; None: there is no GPU to be used."""
        if not self.gpus:
            return None
        return self.torch is not None and self.torch.cuda is not None and self.torch_finding.level == "ok"

    def document(self) -> dict[str, Any]:
        """For --json: bytes are integers, unknown is null."""
        return {
            "schema": 1,
            "cpu": self.processor,
            "ram": self.ram,
            "swap": self.swap,
            "disk": self.disk,
            "gpus": [asdict(one) for one in self.gpus],
            "driver": self.driver,
            "torch": {**(asdict(self.torch) if self.torch else {"version": None, "cuda": None}), "uses_gpu": self.torch_can_use_the_gpu},
            "measured": asdict(self.measured) if self.measured.measured else None,
            "fits": [_document(fit) for fit in self.fits],
        }


def look(home: Home) -> Facts:
    """A look at this machine, with a plan for every preset of every built-in task."""
    gpus, torch, nvidia = gpu_driver.devices(), packages.torch_facts(), adapters.nvidia_present()
    version = gpu_driver.version()
    memory, swapped = ram(), swap()
    mounted = filesystem.mount(home.root)
    fits, known = _fits(home)
    return Facts(
        processor={
            "name": cpu.model_name(),
            "physical_cores": cpu.physical_cores(),
            "logical_cores": cpu.logical_cores(),
            "numa_nodes": cpu.numa_nodes(),
            "features": sorted(cpu.features()),
        },
        ram={**asdict(memory), "limited": memory.limited},
        swap={"total_bytes": swapped.total_bytes, "used_bytes": swapped.used_bytes},
        disk={
            "home": str(home.root),
            "kind": drive.kind(home.root),
            "filesystem": mounted[0] if mounted else None,
            "free_bytes": filesystem.free_bytes(home.root),
            "total_bytes": filesystem.total_bytes(home.root),
        },
        gpus=gpus,
        driver=version,
        torch=torch,
        torch_finding=diagnosis.torch(torch, gpus, nvidia, gpu_driver.cuda()),
        driver_findings=diagnosis.driver(gpus, version, nvidia),
        measured=known,
        fits=fits,
    )


def _fits(home: Home) -> tuple[list[Fit], Profile]:
    """The verdicts, and what was measured about the device they are for."""
    found, known = [], Profile()
    for task in catalogue.BUILTIN:
        for preset, stated in catalogue.STATED.items():
            seen = outlook.look(home, resolve(task, preset))
            if isinstance(seen, outlook.Outlook):
                known = seen.place.profile
                found.append(Fit(task, preset, seen.where, seen.answer, stated))
    return found, known


def _document(fit: Fit) -> dict[str, Any]:
    needed = fit.answer.estimate.needed
    return {
        "task": fit.task,
        "preset": fit.preset,
        "where": fit.where,
        "verdict": fit.answer.verdict,
        "micro_batch": fit.answer.setup.micro_batch,
        "needed": {"point": round(needed.point), "upper": round(needed.upper)},
        "budget_bytes": fit.answer.budget_bytes,
        "stated": asdict(fit.stated),
    }
