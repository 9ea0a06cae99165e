"""Waits until the machine has memory again for the next trainer: after one that left to make room, and after one whose GPU memory the
driver has not taken back yet (reclaim.py). Must not start or end one, nor wait for a driver.

The trainer said how much it held and how much may be in use; it comes back when both have been true together for a while, with
something to spare: what a program gives back for a moment is no reason to come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainerd.contract.status import Status
from trainerd.machine import gpu, memory
from trainerd.supervisor import reclaim
from trainerd.supervisor.asking import Asking
from trainerd.supervisor.reclaim import Reclaim

_LOOKS = 3
_SPARE_SHARE = 0.02
_QUICK_SECONDS = 600.0
"""Short of memory again this soon after coming back: the next wait is twice as long."""
_LONGEST_SECONDS = 900.0
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
        self._first_seconds = self._hold_seconds = hold_seconds
        self._used = used or _Used()
        self._reclaim = Reclaim(note)
        self._wanted: tuple[str, int, int] | None = None
        self._since: float | None = None
        self._returned_at: float | None = None

    @property
    def look_seconds(self) -> float:
        """Until the next look."""
        if self._reclaim.is_waiting:
            return reclaim.LOOK_SECONDS
        return self._first_seconds / _LOOKS

    def made(self, told: Mapping[str, Any], now: float) -> None:
        """A trainer has left to make room, and `told` what it held, and what may be in use."""
        quickly = self._returned_at is not None and now - self._returned_at < _QUICK_SECONDS
        self._hold_seconds = min(_LONGEST_SECONDS, self._hold_seconds * 2) if quickly else self._first_seconds
        self._since = None
        own, ceiling = told.get("own_bytes"), told.get("ceiling_bytes")
        if isinstance(own, int) and isinstance(ceiling, int):
            self._wanted = (str(told.get("resource")), own, ceiling)

    def left(self, pid: int, status: Status) -> None:
        """A trainer is gone, however it ended; `status` is as it was while it lived."""
        self._reclaim.left(pid, status)

    def waits(self, now: float) -> str | None:
        """Why a trainer is not to be started now, in words for a person; None: there is room."""
        return self._reclaim.waits(now) or self._waits_for_others(now)

    def _waits_for_others(self, now: float) -> str | None:
        if self._wanted is None:
            return None
        resource, own, ceiling = self._wanted
        found = self._used(resource)
        if found is None:
            self._wanted = None  # nobody tells any more: the trainer finds out by itself
            return None
        if found is ASKED:
            return "Waiting for memory: the GPU's driver is asked how much is in use."
        used, total = found
        missing = used + own + int(total * _SPARE_SHARE) - ceiling
        if missing > 0:
            self._since = None
            held = f"{used / 1e9:.1f} GB of {_NAMES.get(resource, resource)} are in use by others"
            return f"Waiting for memory: {held}, the training needs {own / 1e9:.1f} GB and {ceiling / 1e9:.1f} GB may be used in all."
        self._since = now if self._since is None else self._since
        if now - self._since < self._hold_seconds:
            return f"Waiting for memory: there is enough again; the training goes on if it stays so for {self._hold_seconds:.0f} s."
        self._wanted, self._returned_at = None, now
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
