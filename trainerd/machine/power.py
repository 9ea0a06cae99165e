"""Whether the machine is on mains power and how full its battery is. Must not decide what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class PowerFacts:
    """Both None: there is no battery, or no sensor for it."""

    plugged: bool | None
    percent: float | None


def power() -> PowerFacts:
    """The state of the battery now; a machine without one is (None, None)."""
    try:
        battery = psutil.sensors_battery()
    except (OSError, RuntimeError, AttributeError, NotImplementedError):
        return PowerFacts(None, None)  # odd boards and virtual machines have broken sensors
    if battery is None:
        return PowerFacts(None, None)
    return PowerFacts(battery.power_plugged, None if battery.percent is None else float(battery.percent))
