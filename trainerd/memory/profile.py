"""What was measured once about this computer for the estimate: context, speeds, the bare trainer. Must not measure.

The engine measures (trainerd/engine/measuring.py) in a process of its own and writes it; without it the values below are assumed,
as intervals. One file per (device, driver, torch): another driver is another machine.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainerd.contract import files
from trainerd.contract.errors import Unreadable

_MIB = 1 << 20


@dataclass(frozen=True)
class Profile:
    """Bytes and speeds. `measured` is False for the assumptions below."""

    device: str = "unknown"
    driver: str = ""
    torch: str = ""
    measured: bool = False
    process_bytes: int = 370 * _MIB
    """RAM of a trainer before its model: Python, torch, accelerate, the engine."""
    context_bytes: int = 300 * _MIB
    """What a CUDA context takes of the device."""
    context_most_bytes: int = 650 * _MIB
    workspace_bytes: int = 8_519_680
    """cuBLAS's, per stream: this on most cards, 32 MiB on Hopper. It lies inside what is allocated."""
    gigaflops: dict[str, float] = field(default_factory=dict)
    """Matrix products per second by precision, in 1e9 operations."""
    ram_bytes_per_second: float | None = None
    """How fast the CPU goes through its own memory."""
    to_device_bytes_per_second: float | None = None
    """From pinned RAM."""
    from_device_bytes_per_second: float | None = None
    device_bytes_per_second: float | None = None
    """How fast a GPU goes through its own memory; of a CPU that is `ram_bytes_per_second`."""


def file_of(folder: Path, device: str, driver: str | None, torch: str | None) -> Path:
    """Where the profile of this device with this driver and torch lies."""
    words = "-".join(str(part) for part in (device, driver or "none", torch or "none"))
    return folder / "profiles" / (re.sub(r"[^A-Za-z0-9._-]+", "_", words)[:150] + ".json")


def read(path: Path) -> Profile:
    """The measured profile, or the assumptions when there is none that can be read."""
    try:
        document = files.read_json(path, "The machine's profile")
    except (OSError, Unreadable):
        return Profile()
    known = {f.name for f in fields(Profile)}
    try:
        return Profile(**{name: value for name, value in document.items() if name in known})
    except TypeError:
        return Profile()


def write(path: Path, profile: Profile) -> None:
    """Keep a measured profile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"schema": files.SCHEMA, **asdict(profile)})


def hopper(name: str) -> bool:
    """Whether cuBLAS takes the large workspace on this card."""
    return bool(re.search(r"\b(H100|H200|H800|H20|GH200|B100|B200|GB200)\b", name))


def described(profile: Profile) -> dict[str, Any]:
    """For --json."""
    return asdict(profile)
