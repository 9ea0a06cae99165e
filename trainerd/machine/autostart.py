"""Registers a command for this user's log-in, without any privilege. Must not decide whether it should be.

One file per system behind the same names: look, enable, disable.
"""

from __future__ import annotations

import sys

from trainerd.machine.login import OFF, ON, OUTDATED, SWITCHED_OFF, Entry, Found

if sys.platform == "win32":
    from trainerd.machine._autostart_windows import disable, enable, look, remarks
else:
    from trainerd.machine._autostart_linux import disable, enable, look, remarks

__all__ = ["OFF", "ON", "OUTDATED", "SWITCHED_OFF", "Entry", "Found", "disable", "enable", "look", "remarks"]
