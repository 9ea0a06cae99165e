"""Brings back the supervisor of a training that is still wanted: it was killed, or the machine went down under it.

Must not bring back what a person stopped or paused, nor what failed. It goes through the same door as `resume`, with the same
checks; of several that find the same dead supervisor at once, the lock lets one through, and the others have nothing to do.
"""

from __future__ import annotations

import time

from trainerd.contract import clock, runs, status
from trainerd.contract.errors import AlreadyRunning, TrainerdError, Unreadable
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord
from trainerd.contract.status import Reading

from . import registration
from .home import holds_own_status
from .words import moment


def revive(home: Home) -> str:
    """Start the supervisor again where it is missing; returns one sentence for the person, "" when nothing was to be done. Never raises."""
    reading = status.read(home)
    record = _missed(home, reading)
    if record is None:
        return ""
    from . import choose, follow  # they read configurations, which costs a tenth of a second: most openings do without

    since = f" since {moment(reading.status.updated_at, time.time())}" if reading.status else ""
    try:
        choice = choose.unfinished(home, record.id)
        choice.only_if_wanted = True
        follow.prepare_home(home)
        _, tied = follow.start(home, choice)
    except AlreadyRunning:
        return ""  # somebody else found it dead in the same moment, and was quicker
    except TrainerdError as error:
        if _wanted(home, record.id) is None:
            return ""  # stopped or finished in the meantime: the new supervisor left it alone
        return f"The supervisor was gone{since}, and could not be started again: {error.message}"
    return f"The supervisor was gone{since}; started it again. {tied}".rstrip()


def _missed(home: Home, reading: Reading) -> RunRecord | None:
    """The run whose supervisor is missed: gone without a word, or ended by the system before the machine went down."""
    if reading.alive or not holds_own_status(home.root):
        return None  # another user's training is not ours to start
    found = reading.status
    went_down = reading.state == status.STOPPED and found is not None and found.boot_id != clock.boot_id()
    if found is None or found.run is None or not (reading.state == status.CRASHED or went_down):
        return None
    if found.boot_id != clock.boot_id() and found.run in registration.read(home).without:
        return None  # --no-autostart: not by itself after a reboot
    return _wanted(home, found.run)


def _wanted(home: Home, run: str) -> RunRecord | None:
    """The record of a run that is unfinished and shall go on."""
    try:
        record = runs.read(home, run)
    except (OSError, Unreadable):
        return None
    return record if record.wanted == runs.WANTED_RUNNING and record.outcome is None else None
