"""Has the preparing process step aside when others need the RAM, and says when it may go on. Must not know what is prepared, nor train.

What it has done so far stays, as after any death of it. A preparation that itself needs more than the limit leaves is not broken off:
nobody else would gain, and it would come to the same place again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from trainerd.config.model import MemoryConfig
from trainerd.contract import wire
from trainerd.contract.sizes import compared
from trainerd.engine.lookout import Growing
from trainerd.engine.pressure import LEAVE, Pressure, Want
from trainerd.machine import memory
from trainerd.memory.limits import resolve_limit
from trainerd.memory.room_again import ROOM, RoomAgain

LOOK_SECONDS = 1.0
_HOLD_SECONDS = 15.0
Send = Callable[..., None]


@dataclass
class SteppedAside(Exception):
    """The preparing process was ended to make room: `wanted` is what it held, and what may be in use."""

    wanted: Want


class Beside:
    """Looks at the RAM while one process prepares: `look()` once a second."""

    def __init__(self, config: MemoryConfig, send: Send) -> None:
        facts = memory.ram()
        self._limit_bytes = resolve_limit(config.ram_limit, facts.total_bytes)
        self._pressure = Pressure("ram", self._limit_bytes, facts.total_bytes, facts.used_bytes, may_leave=True)
        self._growing = Growing(send)
        self._send = send
        self._told = False

    def look(self, pid: int) -> Want | None:
        """What is wanted of the process: to step aside for others; None: to go on."""
        now, facts = time.monotonic(), memory.ram()
        over = self._pressure.see(now, facts.used_bytes)
        self._growing.seen(now, facts, over=over, ceiling_bytes=self._pressure.ceiling_bytes)
        if not over:
            return None
        own_bytes = memory.process_tree_bytes(pid) or 0
        wanted = self._pressure.judge(now, facts.used_bytes, own_bytes, None)
        if wanted.what == LEAVE:
            return wanted
        if self._pressure.is_ours and not self._told:
            self._told = True
            much, limit = compared(own_bytes, self._limit_bytes)
            said = f"Preparing the data takes {much} of RAM, and memory.ram_limit is {limit}: it is passed."
            text = f"{said} Close other programs, or raise it."
            self._send(wire.WARNING, text=text)
        return None


class Waiting:
    """Waits until there is room again, by the rule trainers come back by. A LEAVE ends the process by itself meanwhile."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._rule = RoomAgain(_HOLD_SECONDS)

    def until_room(self, wanted: Want) -> None:
        """Return when what was held may come back."""
        self._send(wire.NOTE, kind="stepped_aside", own_bytes=wanted.own_bytes, ceiling_bytes=wanted.ceiling_bytes, text=wanted.because)
        self._rule.left(time.monotonic(), wanted.own_bytes, wanted.ceiling_bytes)
        while True:
            facts = memory.ram()
            if self._rule.seen(time.monotonic(), facts.used_bytes, facts.total_bytes) == ROOM:
                return
            self._send(wire.WAITING, reason=f"Preparing the data waits for memory: {wanted.because}.")
            time.sleep(min(LOOK_SECONDS, _HOLD_SECONDS))
