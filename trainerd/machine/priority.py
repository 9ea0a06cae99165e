"""How a process steps back behind everything else, and steps forward again for a quick stop. Must not decide when.

One file per system behind the same names; evidence for each step is in docs/architecture.md.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from trainerd.machine._windows import lower_self, raise_process, wrap
else:
    from trainerd.machine._linux import lower_self, raise_process, wrap

IDLE, NORMAL = "idle", "normal"

__all__ = ["IDLE", "NORMAL", "lower_self", "raise_process", "wrap"]
