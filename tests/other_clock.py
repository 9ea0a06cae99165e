"""`python tests/other_clock.py FILE MODULE WORDS…`: runs a module by a wall clock that jumps: ahead by the seconds in FILE. No tests here.

FILE is read anew at every look at the clock, so that it jumps in a process that runs. The monotonic clock is the system's own.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def jump(file: Path) -> None:
    """From here on the time of day in this process is the system's and what the file says."""
    real, real_ns = time.time, time.time_ns

    def ahead() -> float:
        try:
            return float(file.read_text("ascii"))
        except (OSError, ValueError):
            return 0.0  # it is being written

    time.time = lambda: real() + ahead()
    time.time_ns = lambda: real_ns() + int(ahead() * 1e9)


if __name__ == "__main__":
    jump(Path(sys.argv[1]))
    module, sys.argv = sys.argv[2], sys.argv[2:]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
