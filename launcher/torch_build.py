"""Which build of PyTorch fits this computer, and where it comes from. Must not install anything.

PyTorch's own index has one folder per build. For 2.13 they are cpu, cu126 (GPUs and drivers from before 2018 and 2025), cu130
and cu132. Plain PyPI is only the way out: its Windows torch cannot use a GPU, its Linux torch brings 3 GB of CUDA.
"""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from trainerd.contract.errors import UsageError

TORCH = "torch==2.13.0"
INDEX = "https://download.pytorch.org/whl"
BUILDS = ("cpu", "cu126", "cu130", "cu132", "pypi")

_GIB = 1 << 30
_DRIVER_FOR_CUDA_13, _DRIVER_FOR_CUDA_12 = 580, 525
_OLDEST_FOR_CUDA_13, _OLDEST_FOR_BLACKWELL = 7.5, 10.0  # compute capability
_ANSWER_SECONDS = 30.0  # a sleeping laptop GPU takes seconds to wake
_INDEX_SECONDS = 10.0


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver answered."""

    version: str
    gpus: tuple[str, ...]
    capabilities: tuple[float, ...]


@dataclass(frozen=True)
class Build:
    """A build of torch: its name in PyTorch's index ("pypi": PyPI's own), why it was chosen, the disk it takes."""

    name: str
    why: str
    needs_bytes: int


def nvidia_driver() -> Driver | None:
    """Ask the driver through nvidia-smi; None when there is none or it does not answer."""
    tool = _nvidia_smi()
    if tool is None:
        return None
    for query in ("driver_version,name,compute_cap", "driver_version,name"):  # drivers before 2022 do not know compute_cap
        try:
            answer = subprocess.run(
                [tool, f"--query-gpu={query}", "--format=csv,noheader"],
                capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=_ANSWER_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if "," in line]
        if answer.returncode == 0 and rows:
            capabilities = [float(row[2]) for row in rows if len(row) > 2 and re.fullmatch(r"\d+\.\d+", row[2])]
            return Driver(rows[0][0], tuple(row[1] for row in rows), tuple(capabilities))
    return None


def _nvidia_smi() -> str | None:
    found = shutil.which("nvidia-smi")
    if found:
        return found
    old_place = os.environ.get("PROGRAMFILES", r"C:\Program Files") + r"\NVIDIA Corporation\NVSMI\nvidia-smi.exe"
    place = Path(old_place if sys.platform == "win32" else "/usr/lib/wsl/lib/nvidia-smi")
    return str(place) if place.exists() else None


def choose(driver: Driver | None, wish: str = "") -> Build:
    """The build for this driver; `wish` (TRAINERD_TORCH) overrules. Raises UsageError for a wish that does not exist."""
    if wish:
        if wish not in BUILDS:
            remedy = f"Set it to one of {', '.join(BUILDS)}, or unset it to let the installer choose."
            raise UsageError(f"TRAINERD_TORCH is {wish!r}.", remedy)
        return Build(wish, "TRAINERD_TORCH asks for it", _needs(wish))
    if driver is None:
        return Build("cpu", "no NVIDIA driver answers", _needs("cpu"))
    name = _cuda_build(driver)
    return Build(name, f"{driver.gpus[0]}, driver {driver.version}", _needs(name))


def _cuda_build(driver: Driver) -> str:
    major = int(re.match(r"\d*", driver.version).group() or 0)  # type: ignore[union-attr]  # \d* always matches
    if max(driver.capabilities, default=0.0) >= _OLDEST_FOR_BLACKWELL:
        return "cu130"
    if min(driver.capabilities, default=_OLDEST_FOR_CUDA_13) < _OLDEST_FOR_CUDA_13 or major < _DRIVER_FOR_CUDA_13:
        return "cu126"
    return "cu130"


def driver_warning(driver: Driver, build: Build) -> str | None:
    """What a person must know when the driver is too old for the chosen build."""
    needed = {"cu126": _DRIVER_FOR_CUDA_12, "cu130": _DRIVER_FOR_CUDA_13, "cu132": _DRIVER_FOR_CUDA_13}.get(build.name, 0)
    major = int(re.match(r"\d*", driver.version).group() or 0)  # type: ignore[union-attr]
    if major >= needed:
        return None
    return f"The NVIDIA driver {driver.version} is too old to be used: training runs on the CPU until you update it to {needed} or newer."


def _needs(name: str) -> int:
    """Disk for the environment and the downloads on their way. Measured on Linux: 1.3 + 0.3 GB (cpu), 5.0 + 3.0 GB (CUDA)."""
    return 2 * _GIB if name == "cpu" or (name == "pypi" and sys.platform == "win32") else 9 * _GIB


def index_url(build: Build) -> str | None:
    """The address of the build's own index; None for PyPI."""
    base = os.environ.get("TRAINERD_TORCH_INDEX", INDEX).rstrip("/")
    return None if build.name == "pypi" else f"{base}/{build.name}"


def from_pypi(build: Build) -> tuple[Build, str]:
    """PyPI's build in the place of one whose index cannot be reached, and what a person must know about it."""
    if sys.platform != "win32":
        loss = "It brings CUDA's libraries, about 3 GB to download." if build.name == "cpu" else ""
    else:
        loss = "" if build.name == "cpu" else "On Windows it cannot use the GPU; get the right one later with: start_training reinstall"
    return Build("pypi", "the way out", _needs("pypi")), loss


def unreachable(url: str) -> str | None:
    """Why the index at `url` cannot be used, or None when it answers."""
    bundle = os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE")
    try:
        context = ssl.create_default_context(cafile=bundle) if bundle else None
        with urllib.request.urlopen(f"{url}/torch/", timeout=_INDEX_SECONDS, context=context):
            return None
    except urllib.error.HTTPError as error:
        return f"it answers {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
