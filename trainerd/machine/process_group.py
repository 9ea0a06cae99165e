"""A process together with everything it will ever start, as one thing that can be waited for and killed whole.

One file per system behind the same name. Must not know what runs in it, nor restart it.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from trainerd.machine._process_group_windows import ProcessGroup
else:
    from trainerd.machine._process_group_linux import ProcessGroup

__all__ = ["ProcessGroup"]
