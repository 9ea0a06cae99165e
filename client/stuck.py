"""What a person can do about a supervisor that holds the home and does not answer. Must not end anything itself."""

from __future__ import annotations

import sys

from trainerd.contract.status import Reading


def remedy(reading: Reading, program: str) -> str:
    """The steps as one hint, a line each."""
    return "\n".join(steps(reading, program))


def steps(reading: Reading, program: str) -> list[str]:
    """Which process to end, how on this system, and what happens then."""
    supervisor = reading.status.supervisor if reading.status else None
    pid = reading.holder or (supervisor.pid if supervisor else None)
    if pid is None:
        return [f"Restart the machine, then go on from the last checkpoint with: {program} resume"]
    kill = f"taskkill /F /PID {pid}" if sys.platform == "win32" else f"kill -9 {pid}"
    trainer = "its trainer ends with it" if sys.platform == "win32" else "its trainer saves and leaves"
    return [f"If it stays so, end the supervisor ({trainer}): {kill}", f"Then go on from the last checkpoint: {program} resume"]
