"""Hears that the machine is about to sleep or to shut down, and holds it up for a moment. Must not know what is done with it.

One file per system behind the same names: Watch, which tells from a thread of its own, and stay_up, a last means against idle sleep.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from trainerd.machine._standby_windows import Watch, stay_up
else:
    from trainerd.machine._standby_linux import Watch, stay_up

SLEEP, SHUTDOWN, WOKE = "sleep", "shutdown", "woke"

__all__ = ["SHUTDOWN", "SLEEP", "WOKE", "Watch", "stay_up"]
