"""What kind of drive a folder lies on: a fast SSD, an SSD, or a hard disk that seeks. Must not read or write a byte there to find out."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from trainerd.machine import filesystem

NVME, SSD, HARD_DISK = "NVMe SSD", "SSD", "hard disk"
_BLOCKS = Path("/sys/dev/block")
_QUERY_PROPERTY, _SEEK_PENALTY, _ADAPTER = 0x2D1400, 7, 1
_BUS_NVME = 17


def kind(path: Path, blocks: Path = _BLOCKS) -> str | None:
    """NVME, SSD or HARD_DISK; None where the system does not tell (a container, a network, a disk image)."""
    if sys.platform == "win32":
        return _kind_on_windows(path)
    here = next((place for place in (path, *path.absolute().parents) if place.exists()), None)
    mounted = filesystem.mount(here) if here is not None else None
    if here is None or mounted is None:
        return None
    try:
        # A file system that makes its own device numbers (btrfs) names the real device as what is mounted.
        number = os.stat(mounted[1]).st_rdev if mounted[1].startswith("/dev/") else here.stat().st_dev
    except OSError:
        return None
    return _of_block(blocks / f"{os.major(number)}:{os.minor(number)}")


def _of_block(block: Path) -> str | None:
    """What the kernel tells of a block device; of a partition, its disk does."""
    try:
        real = block.resolve(strict=True)
        disk = real if (real / "queue").is_dir() else real.parent
        turns = (disk / "queue" / "rotational").read_text("ascii").strip()
    except (OSError, RuntimeError):
        return None
    if turns == "1":
        # Virtual disks say that they turn unless they were told otherwise.
        return None if re.match(r"(vd|xvd|loop|dm-|md|zd)", disk.name) else HARD_DISK
    return NVME if disk.name.startswith("nvme") else SSD


def _kind_on_windows(path: Path) -> str | None:
    """Whether the drive has a seek penalty, and the bus it is on; asked without any right to read it."""
    if sys.platform != "win32":
        return None
    import ctypes

    drive = path.absolute().drive
    if len(drive) != 2:
        return None
    kernel = ctypes.windll.kernel32
    kernel.CreateFileW.restype = ctypes.c_void_p
    handle = kernel.CreateFileW(f"\\\\.\\{drive}", 0, 3, None, 3, 0, None)
    if handle in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        seeks = _property(kernel, handle, _SEEK_PENALTY, 12)
        adapter = _property(kernel, handle, _ADAPTER, 32)
    finally:
        kernel.CloseHandle(ctypes.c_void_p(handle))
    if seeks is None:
        return None
    if seeks[8]:
        return HARD_DISK
    return NVME if adapter is not None and adapter[24] == _BUS_NVME else SSD


def _property(kernel: object, handle: int, number: int, size: int) -> bytes | None:
    """A storage property by its number, None when the driver does not know it."""
    import ctypes

    asked = (ctypes.c_uint32 * 3)(number, 0, 0)
    answer, length = (ctypes.c_ubyte * size)(), ctypes.c_uint32()
    done = kernel.DeviceIoControl(  # type: ignore[attr-defined]
        ctypes.c_void_p(handle), _QUERY_PROPERTY, asked, 12, answer, size, ctypes.byref(length), None
    )
    return bytes(answer) if done else None
