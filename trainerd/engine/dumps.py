"""The stack of every thread, into the log, when the trainer has hung. Must not decide that it has, nor end anything.

An interpreter whose lock is held by code that never gives it back runs no line of Python: so on Linux a signal is answered in
C, and on Windows, which has none, a timer in C is wound up with every sign of life and goes off when they stop.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from trainerd.contract import phases

_LONGEST_SECONDS = 1e6
_abandoned = threading.Event()


def arrange() -> None:
    """Once, at the start of a process: crashes leave a stack, and so does the supervisor's signal."""
    faulthandler.enable()
    if sys.platform != "win32":
        faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)


def write() -> None:
    """Now; from a thread that still runs."""
    if sys.platform == "win32":
        faulthandler.dump_traceback(all_threads=True)
    # elsewhere the supervisor has sent the signal, and one stack is enough


def abandoned(phase: str) -> None:
    """The supervisor is gone, and nobody is left to end a process that hangs: from now on the timer does, with its stacks."""
    _abandoned.set()
    wind_up(phase, {})


def wind_up(phase: str, faults: Mapping[str, Any]) -> None:
    """A sign of life was given: only after the shortest limit of this phase from now on is it too silent."""
    chosen = phases.chosen_seconds(faults, phase)
    seconds = phases.silence(phase).floor_seconds if chosen is None else chosen
    if _abandoned.is_set():
        faulthandler.dump_traceback_later(min(seconds, phases.silence(phase).first_seconds), exit=True)
    elif sys.platform != "win32":
        return
    elif seconds < _LONGEST_SECONDS:
        faulthandler.dump_traceback_later(seconds, exit=False)
    else:
        faulthandler.cancel_dump_traceback_later()
