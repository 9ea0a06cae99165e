"""What the supervisor does about the machine's power: saves before sleep and shutdown, keeps it awake while it trains on mains.

Must not start or end a trainer. The system tells in threads of its own; everything is done here, in the supervisor's tick.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainerd.contract import status, wire
from trainerd.machine import standby
from trainerd.machine.awake import KeepAwake

if TYPE_CHECKING:
    from trainerd.supervisor.loop import Supervisor

AUTO, ON, OFF = "auto", "on", "off"
_AT_WORK = (status.STARTING, status.RUNNING, status.RECOVERING)  # through a restart, too: letting go for seconds helps nobody
_NOTHING_YET = ("starting", "preparing")


def stays_awake(level: str, state: str, plugged: bool | None) -> bool:
    """Whether the machine is to be kept awake; `plugged` None is a machine without a battery."""
    if level == OFF or state not in _AT_WORK:
        return False
    # Windows takes it so seriously that a closed laptop goes on in its bag until the battery is empty.
    return plugged is not False or (level == ON and sys.platform != "win32")


@dataclass
class _Save:
    """The checkpoint asked for before an event; `ident` None: the trainer is leaving anyway, and saves as it goes."""

    event: str
    ident: str | None
    began: float
    deadline: float


class Power:
    """`level` is polite.keep_awake; `wake` wakes the supervisor from any thread."""

    def __init__(self, level: str, wake: Callable[[], None]) -> None:
        self._level, self._wake = level, wake
        self._heard: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._watch = standby.Watch(self._tell)
        self._awake = KeepAwake(lambda words, held: self._told.put((words, held)))
        self._save: _Save | None = None
        self._events = 0

    def start(self) -> None:
        """Begin to listen to the system."""
        self._watch.start()

    def close(self) -> None:
        self._awake.release()
        self._watch.close()

    def look(self, supervisor: Supervisor) -> None:
        """Once a tick, and at once when the system has said something."""
        while not self._heard.empty():
            event, seconds = self._heard.get()
            self._act(supervisor, event, seconds)
        save = self._save
        if save is not None and (supervisor.trainer is None or time.monotonic() >= save.deadline):
            self._done(supervisor, saved=supervisor.trainer is None and save.ident is None)
        shown = supervisor.report.status
        if stays_awake(self._level, shown.state, shown.power.plugged):
            self._awake.hold()
        else:
            self._awake.release()
        while not self._told.empty():
            words, held = self._told.get()
            supervisor.journal.note("kept awake" if held else "cannot be kept awake", **{"by" if held else "why": words})

    def answered(self, supervisor: Supervisor, message: Mapping[str, Any]) -> None:
        """The trainer has saved, or could not."""
        if self._save is not None and self._save.ident is not None and message.get("request") == self._save.ident:
            self._done(supervisor, saved=message.get("event") == wire.CHECKPOINT)

    def _tell(self, event: str, seconds: float) -> None:
        self._heard.put((event, seconds))
        self._wake()

    def _act(self, supervisor: Supervisor, event: str, seconds: float) -> None:
        if event == standby.WOKE:
            self._save = None
            supervisor.journal.note("woke")
            return
        phase = supervisor.report.status.phase
        if supervisor.trainer is None or phase is None or phase.name in _NOTHING_YET:
            self._watch.ready()
            supervisor.journal.note(f"before {event}", saved=False, why="there is nothing to save")
            return
        self._events += 1
        now = time.monotonic()
        ident = None if supervisor.leaving is not None else f"before-{event}-{self._events}"
        self._save = _Save(event, ident, now, now + seconds)
        if ident is not None:
            supervisor.trainer.send(wire.SAVE, id=ident)

    def _done(self, supervisor: Supervisor, *, saved: bool) -> None:
        save, self._save = self._save, None
        self._watch.ready()
        if save is not None:
            supervisor.journal.note(f"before {save.event}", saved=saved, seconds=round(time.monotonic() - save.began, 3))
