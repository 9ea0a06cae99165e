"""Which graphics hardware sits in this machine, driver or not. Must not ask a driver: doctor wants to know when there is none."""

from __future__ import annotations

import sys
from pathlib import Path

_PCI = Path("/sys/bus/pci/devices")
_NVIDIA = "0x10de"
_DISPLAY = "0x03"
_WINDOWS_PCI = r"SYSTEM\CurrentControlSet\Enum\PCI"
_DISPLAY_CLASS = "{4d36e968-e325-11ce-bfc1-08002be10318}"


def nvidia_present(devices: Path = _PCI) -> bool:
    """Whether there is an NVIDIA graphics adapter on the bus. False also where the bus cannot be read."""
    if sys.platform == "win32":
        return _in_registry()
    try:
        return any(_is_nvidia_display(device) for device in devices.iterdir())
    except OSError:
        return False


def _is_nvidia_display(device: Path) -> bool:
    try:
        vendor = (device / "vendor").read_text("ascii").strip()
        return vendor == _NVIDIA and (device / "class").read_text("ascii").startswith(_DISPLAY)
    except OSError:
        return False


def _in_registry() -> bool:
    if sys.platform != "win32":
        return False
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, _WINDOWS_PCI) as bus:
            names = [winreg.EnumKey(bus, i) for i in range(winreg.QueryInfoKey(bus)[0])]
            for name in names:
                if "VEN_10DE" in name.upper() and _is_display_key(f"{_WINDOWS_PCI}\\{name}"):
                    return True
    except OSError:
        return False
    return False


def _is_display_key(path: str) -> bool:
    if sys.platform != "win32":
        return False
    import winreg

    with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path) as device:
        for i in range(winreg.QueryInfoKey(device)[0]):
            try:
                with winreg.OpenKey(device, winreg.EnumKey(device, i)) as place:
                    if str(winreg.QueryValueEx(place, "ClassGUID")[0]).lower() == _DISPLAY_CLASS:
                        return True
            except OSError:
                continue
    return False
