"""What was measured once about this computer for the estimate: context, speeds, the bare trainer. Must not measure.

The engine measures (trainerd/engine/measuring.py) in a process of its own and writes it; without it the values below are assumed,
as intervals. One file per (device, driver, torch with its build): another driver is another machine. A file that holds what no
machine can have counts as none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from trainerd.contract import files
from trainerd.contract.errors import Unreadable

_MIB, _GIB = 1 << 20, 1 << 30
_CUDA_PROCESS_BYTES = 608 * _MIB  # the bare trainer with torch's build for CUDA, on a machine without a GPU (docs/log.md)
_BOUNDS: Mapping[str, tuple[int, int]] = {
    "process_bytes": (16 * _MIB, 64 * _GIB),
    "context_bytes": (0, 64 * _GIB),
    "context_most_bytes": (0, 64 * _GIB),
    "workspace_bytes": (0, 16 * _GIB),
}
_WORDS = ("device", "driver", "torch")
_FASTEST = 1e15  # bytes, or 1e9 operations, per second: more than any machine
LATER_BYTES = 64 << 20
"""What a trainer loads and holds once it trains: threads, batches, kernels that are used for the first time."""


@dataclass(frozen=True)
class Profile:
    """Bytes and speeds. `measured` is False for the assumptions below."""

    device: str = "unknown"
    driver: str = ""
    torch: str = ""
    measured: bool = False
    process_bytes: int = 370 * _MIB
    """RAM of a trainer before its model: Python, torch, accelerate, the engine. So much with torch's build for the CPU (assumed())."""
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
    problem: str = ""
    """Why what was measured does not count, in words."""


def file_of(folder: Path, device: str, driver: str | None, torch: str | None) -> Path:
    """Where the profile of this device with this driver and torch lies."""
    words = "-".join(str(part) for part in (device, driver or "none", torch or "none"))
    return folder / "profiles" / (re.sub(r"[^A-Za-z0-9._-]+", "_", words)[:150] + ".json")


def assumed(torch: str = "", *, cuda: bool) -> Profile:
    """What counts while nothing was measured; `cuda`: torch's build is for CUDA, whose libraries take RAM also where there is no GPU."""
    return Profile(torch=torch, process_bytes=_CUDA_PROCESS_BYTES) if cuda else Profile(torch=torch)


def read(path: Path, otherwise: Profile | None = None) -> Profile:
    """The measured profile, or the assumptions when there is none that can be believed; their `problem` then says why."""
    otherwise = otherwise or Profile()
    try:
        document = files.read_json(path, "The machine's profile")
    except FileNotFoundError:
        return otherwise
    except OSError as error:
        return replace(otherwise, problem=f"{path} cannot be read ({error.strerror or error})")
    except Unreadable:
        return replace(otherwise, problem=f"{path} is damaged")
    known = {f.name for f in fields(Profile)} - {"problem"}
    found = {name: value for name, value in document.items() if name in known}
    wrong = next((name for name, value in found.items() if not _is_possible(name, value)), None)
    return Profile(**found) if wrong is None else replace(otherwise, problem=f"{path} is damaged ({wrong} is {found[wrong]!r:.60})")


def _is_possible(name: str, value: Any) -> bool:
    if name in _WORDS:
        return isinstance(value, str)
    if name == "measured":
        return isinstance(value, bool)
    if name in _BOUNDS:
        low, high = _BOUNDS[name]
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    if name == "gigaflops":
        return isinstance(value, dict) and all(_is_speed(one) for one in value.values())
    return value is None or _is_speed(value)


def _is_speed(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 < value < _FASTEST


def write(path: Path, profile: Profile) -> None:
    """Keep a measured profile. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = asdict(profile)
    del document["problem"]
    files.write_json(path, {"schema": files.SCHEMA, **document})


def hopper(name: str) -> bool:
    """Whether cuBLAS takes the large workspace on this card."""
    return bool(re.search(r"\b(H100|H200|H800|H20|GH200|B100|B200|GB200)\b", name))


def described(profile: Profile) -> dict[str, Any]:
    """For --json."""
    return asdict(profile)
