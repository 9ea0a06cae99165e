"""Waits until the machine has memory again for the next trainer: after one that left to make room, and after one whose GPU memory the
driver has not taken back yet (reclaim.py). Must not start or end one, nor wait for a driver.

The trainer said how much it held (where it leaks: what one would need that starts anew), and how much may be in use; when both are true
together long enough, trainerd/memory/room_again.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainerd.contract.sizes import compared
from trainerd.contract.status import Status
from trainerd.machine import gpu, memory
from trainerd.machine.asking import Asking
from trainerd.memory.room_again import HOLDING, SHORT, RoomAgain
from trainerd.supervisor import reclaim
from trainerd.supervisor.reclaim import Reclaim

_LOOKS = 3
_NAMES = {"ram": "RAM", "vram": "GPU memory"}


ASKED = (0, 0)
"""In place of (in use, total): the driver has been asked, and may still answer."""
Note = Callable[..., None]


class Room:
    """One supervisor's waiting for memory. `used(resource)` gives (in use, total), ASKED, or None where nobody tells."""

    def __init__(
        self,
        hold_seconds: float,
        used: Callable[[str], tuple[int, int] | None] | None = None,
        note: Note = lambda kind, **facts: None,
    ) -> None:
        self._look_seconds = hold_seconds / _LOOKS
        self._rule = RoomAgain(hold_seconds)
        self._used = used or _Used()
        self._reclaim = Reclaim(note)
        self._resource: str | None = None
        """What it waits for; None: it does not."""

    @property
    def look_seconds(self) -> float:
        """Until the next look."""
        if self._reclaim.is_waiting:
            return reclaim.LOOK_SECONDS
        return self._look_seconds

    def made(self, told: Mapping[str, Any], now: float) -> None:
        """A trainer has left to make room, and `told` what it held, or less that one would need which starts anew, and what may be in
        use."""
        own, ceiling = told.get("needs_bytes", told.get("own_bytes")), told.get("ceiling_bytes")
        if isinstance(own, int) and isinstance(ceiling, int):
            self._resource = str(told.get("resource"))
            self._rule.left(now, own, ceiling)

    def left(self, pid: int, status: Status) -> None:
        """A trainer is gone, however it ended; `status` is as it was while it lived."""
        self._reclaim.left(pid, status)

    def waits(self, now: float) -> str | None:
        """Why a trainer is not to be started now, in words for a person; None: there is room."""
        return self._reclaim.waits(now) or self._waits_for_others(now)

    def _waits_for_others(self, now: float) -> str | None:
        resource, rule = self._resource, self._rule
        if resource is None:
            return None
        found = self._used(resource)
        if found is None:
            self._resource = None  # nobody tells any more: the trainer finds out by itself
            return None
        if found is ASKED:
            return "Waiting for memory: the GPU's driver is asked how much is in use."
        used, total = found
        how = rule.seen(now, used, total)
        if how == SHORT:
            others, own, _, most = compared(used, rule.own_bytes, used + rule.own_bytes, rule.ceiling_bytes)
            held = f"{others} of {_NAMES.get(resource, resource)} are in use by others"
            needs = f"the training needs {own} and {most} may be used in all"
            return f"Waiting for memory: {held}, {needs}."
        if how == HOLDING:
            return f"Waiting for memory: there is enough again; the training goes on if it stays so for {rule.hold_seconds:.0f} s."
        self._resource = None
        return None


class _Used:
    """What this machine tells: of its RAM at once, of its first GPU when the driver has answered."""

    def __init__(self) -> None:
        self._driver = Asking(gpu.devices)

    def __call__(self, resource: str) -> tuple[int, int] | None:
        if resource == "ram":
            facts = memory.ram()
            return facts.used_bytes, facts.total_bytes
        found = self._driver.answer()
        is_open = self._driver.is_open
        self._driver.want()
        if found is None:
            return ASKED if is_open or self._driver.is_open else None
        if not found or found[0].used_bytes is None or found[0].total_bytes is None:
            return None
        return found[0].used_bytes, found[0].total_bytes
