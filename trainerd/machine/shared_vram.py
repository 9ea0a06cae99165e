"""How much of a process's GPU memory the driver keeps in the computer's RAM. Only Windows tells; must not judge it."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from trainerd.machine._shared_vram_windows import shared_bytes as shared_bytes
else:

    def shared_bytes(pid: int) -> int | None:
        """None: nobody tells here, and drivers do not do it."""
        return None
