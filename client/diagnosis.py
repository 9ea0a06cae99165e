"""What doctor looks at: each check says what it found, and what to do when that is not good. Must not change anything.

A check never raises: a question that cannot be answered is not a problem of the person's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainerd.contract import runs, status
from trainerd.contract.errors import TrainerdError
from trainerd.contract.paths import Home
from trainerd.machine import adapters, autostart, filesystem, gpu
from trainerd.machine.memory import RamFacts, ram
from trainerd.machine.power import power
from trainerd.memory.limits import ADVICE

from . import console, gpu_driver, packages, registration
from .limits import passed
from .words import size

_SUPPORTED = ((3, 10), (3, 14))
_LEAST_FREE_BYTES, _GOOD_FREE_BYTES = 1_000_000_000, 5_000_000_000
_GOOD_RAM_BYTES = 7_500_000_000
_CUDA_TORCH = "start_training reinstall (installed with pip: pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130)"
_DRIVER_PAGE = "https://www.nvidia.com/drivers"


@dataclass(frozen=True)
class Finding:
    """`level`: ok, note (nothing to do), warning (works, not well) or problem (does not work). `remedy` says what to do."""

    name: str
    level: Literal["ok", "note", "warning", "problem"]
    text: str
    remedy: str = ""


def examine(home: Home) -> list[Finding]:
    """Every finding, in the order a person would ask."""
    checks: list[Callable[[], list[Finding]]] = [
        lambda: [python(sys.version_info[:2])],
        lambda: [torch(packages.torch_facts(), gpu_driver.devices(), adapters.nvidia_present(), gpu_driver.cuda())],
        lambda: driver(gpu_driver.devices(), gpu_driver.version(), adapters.nvidia_present()),
        lambda: [bitsandbytes(packages.bitsandbytes_cuda(), packages.torch_facts())],
        lambda: [memory(ram().total_bytes)],
        lambda: limits(home, ram(), gpu_driver.devices()),
        lambda: [disk(filesystem.free_bytes(home.root))],
        lambda: place(home, filesystem.synced_folder(home.root), filesystem.network_filesystem(home.root)),
        lambda: [writable(home)],
        lambda: [battery(power().plugged)],
        lambda: [login(registration.found(home), registration.read(home).wanted)],
    ]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # an odd driver or sensor must not hide the other answers
            findings.append(Finding("check", "warning", f"a check could not be made: {type(error).__name__}: {error}"))
    return findings


def python(version: tuple[int, ...]) -> Finding:
    shown = ".".join(map(str, version))
    low, high = _SUPPORTED
    if version < low:
        return Finding("python", "problem", f"Python {shown} is too old.", f"Install Python {low[0]}.{low[1]} to {high[0]}.{high[1]}.")
    if version > high:
        remedy = f"If something does not install, use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}."
        return Finding("python", "warning", f"Python {shown} is newer than those trainerd was tried with.", remedy)
    if sys.maxsize < 2**32:
        return Finding("python", "problem", f"Python {shown} is a 32-bit build; torch has none.", "Install the 64-bit Python.")
    return Finding("python", "ok", f"Python {shown}")


def torch(found: packages.TorchFacts | None, gpus: list[gpu.GpuFacts], nvidia: bool, driver_cuda: int | None = None) -> Finding:
    if found is None:
        return Finding("torch", "problem", "torch is not installed.", "Run start_training.sh (Windows: start_training.bat).")
    if found.cuda is None and (gpus or nvidia):
        name = gpus[0].name if gpus else "an NVIDIA GPU"
        text = f"torch {found.version} is a build for the CPU only, and there is {name}: it would not be used."
        return Finding("torch", "problem", text, f"Install the build for CUDA: {_CUDA_TORCH}")
    if gpus and found.newer_than(driver_cuda):
        text = f"torch {found.version} is built for CUDA {found.cuda}; the driver runs CUDA up to {driver_cuda}: the GPU would not be used."
        return Finding("torch", "problem", text, f"Update the NVIDIA driver: {_DRIVER_PAGE}")
    built = f"built for CUDA {found.cuda}" if found.cuda else "built for the CPU"
    return Finding("torch", "ok", f"torch {found.version}, {built}")


def driver(gpus: list[gpu.GpuFacts], version: str | None, nvidia: bool) -> list[Finding]:
    if gpu_driver.is_stuck():
        return [Finding("GPU", "problem", gpu_driver.STUCK, "Restart the machine if it stays so.")]
    if gpus:
        named = ", ".join(f"{g.name} ({size(g.total_bytes)})" for g in gpus)
        return [Finding("GPU", "ok", f"{named}, driver {version or 'of unknown version'}")]
    if version is not None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "the driver shows none"
        return [Finding("GPU", "note", f"No GPU is used: {why}. Training runs on the CPU.")]
    if nvidia:
        text = "There is an NVIDIA GPU and no driver answers for it: it cannot be used."
        return [Finding("GPU", "problem", text, f"Install the NVIDIA driver ({_DRIVER_PAGE}), and restart the machine.")]
    return [Finding("GPU", "note", "There is no NVIDIA GPU. Training runs on the CPU.")]


def bitsandbytes(cuda: set[str] | None, found: packages.TorchFacts | None) -> Finding:
    name = "bitsandbytes"
    if cuda is None:
        return Finding(name, "warning", "bitsandbytes is not installed; 8-bit and 4-bit training need it.", "pip install bitsandbytes")
    if found is None or found.cuda is None:
        return Finding(name, "note", "bitsandbytes works on the CPU only here: torch has no CUDA.")
    wanted = found.cuda.replace(".", "")
    if wanted not in cuda:
        text = f"bitsandbytes has no library for CUDA {found.cuda}, which torch is built for."
        return Finding(name, "warning", text, "pip install --upgrade bitsandbytes")
    return Finding(name, "ok", f"bitsandbytes for CUDA {found.cuda}")


def memory(total_bytes: int) -> Finding:
    if total_bytes < _GOOD_RAM_BYTES:
        remedy = "Use smaller data (--dataset-size), and close other programs while training."
        return Finding("RAM", "warning", f"{size(total_bytes)} of RAM is little.", remedy)
    return Finding("RAM", "ok", f"{size(total_bytes)} of RAM")


def limits(home: Home, now: RamFacts, gpus: list[gpu.GpuFacts]) -> list[Finding]:
    """Memory limits that are passed already: those of the run this home shows, else the ones a start would take."""
    reading = status.read(home)
    if reading.alive:
        return []  # what is in use includes the training itself
    chosen = _chosen_limits(home, reading)
    found = passed(chosen.get("ram_limit", "auto"), chosen.get("vram_limit", "auto"), now, gpus)
    return [Finding("memory", "warning", text, ADVICE) for text in found]


def _chosen_limits(home: Home, reading: status.Reading) -> dict[str, str]:
    try:
        record = runs.read(home, reading.status.run or "") if reading.status else None
    except (OSError, TrainerdError):
        record = None
    chosen = (record.config.get("memory") if record is not None and not record.finished else None) or {}
    return {key: str(value) for key, value in chosen.items()}


def disk(free_bytes: int | None) -> Finding:
    if free_bytes is None:
        return Finding("disk", "note", "How much disk is free is not known here.")
    remedy = "Free some space, or use another folder with --home."
    if free_bytes < _LEAST_FREE_BYTES:
        return Finding("disk", "problem", f"Only {size(free_bytes)} are free for checkpoints and models.", remedy)
    if free_bytes < _GOOD_FREE_BYTES:
        return Finding("disk", "warning", f"{size(free_bytes)} are free; a long training with large checkpoints may need more.", remedy)
    return Finding("disk", "ok", f"{size(free_bytes)} free")


def place(home: Home, synced: str | None, network: str | None) -> list[Finding]:
    other = f"Use a local folder: {console.program()} --home FOLDER start"
    if synced is not None:
        text = f"The home {home.root} is inside {synced}, which uploads every checkpoint and locks files while it does."
        return [Finding("home", "problem", text, other)]
    if network is not None:
        return [Finding("home", "problem", f"The home {home.root} is on {network}: locks and saved files are not safe there.", other)]
    return [Finding("home", "ok", str(home.root))]


def writable(home: Home) -> Finding:
    """Whether the home, or the folder it would be made in, can be written."""
    nearest = next((p for p in (home.root, *home.root.parents) if p.exists()), home.root)
    if not os.access(nearest, os.W_OK):
        return Finding("home", "problem", f"{nearest} cannot be written by you.", "Name another folder with --home.")
    return Finding("home", "ok", "can be written")


def battery(plugged: bool | None) -> Finding:
    if plugged is None:
        return Finding("battery", "note", "No battery sensor: a laptop's training would not notice that it runs on battery.")
    return Finding("battery", "ok", "on mains" if plugged else "on battery")


def login(found: autostart.Found, wanted: str) -> Finding:
    enable = f"{console.program()} autostart enable"
    if found.state == autostart.ON:
        return Finding("autostart", "ok", f"after a reboot an unfinished training goes on when you log in ({found.way})")
    if found.state == autostart.OUTDATED:
        return Finding("autostart", "warning", f"{found.way} starts another place or Python than this: {found.path}", enable)
    if found.state == autostart.SWITCHED_OFF:
        return Finding("autostart", "note", f"Switched off in the system ({found.path}): after a reboot a training waits for `resume`.")
    if wanted == registration.UNWANTED:
        return Finding("autostart", "note", f"Disabled: after a reboot a training waits for `resume`. To turn it on: {enable}")
    return Finding("autostart", "note", "Not registered yet: `start` does it.")
