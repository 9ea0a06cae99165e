"""Waits until the machine has memory again for a trainer that left to make room. Must not start or end one.

The trainer said how much it held and how much may be in use; it comes back when both have been true together for a while, with
something to spare: what a program gives back for a moment is no reason to come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trainerd.machine import gpu, memory

_LOOKS = 3
_SPARE_SHARE = 0.02
_QUICK_SECONDS = 600.0
"""Short of memory again this soon after coming back: the next wait is twice as long."""
_LONGEST_SECONDS = 900.0
_NAMES = {"ram": "RAM", "vram": "GPU memory"}


class Room:
    """One supervisor's waiting for memory. `used(resource)` gives (in use, total), or None where nobody tells."""

    def __init__(self, hold_seconds: float, used: Callable[[str], tuple[int, int] | None] | None = None) -> None:
        self._first_seconds = self._hold_seconds = hold_seconds
        self._used = used or _used
        self._wanted: tuple[str, int, int] | None = None
        self._since: float | None = None
        self._returned_at: float | None = None

    @property
    def look_seconds(self) -> float:
        """Until the next look."""
        return self._first_seconds / _LOOKS

    def made(self, told: Mapping[str, Any], now: float) -> None:
        """A trainer has left to make room, and `told` what it held, and what may be in use."""
        quickly = self._returned_at is not None and now - self._returned_at < _QUICK_SECONDS
        self._hold_seconds = min(_LONGEST_SECONDS, self._hold_seconds * 2) if quickly else self._first_seconds
        self._since = None
        own, ceiling = told.get("own_bytes"), told.get("ceiling_bytes")
        if isinstance(own, int) and isinstance(ceiling, int):
            self._wanted = (str(told.get("resource")), own, ceiling)

    def waits(self, now: float) -> str | None:
        """Why a trainer is not to be started now, in words for a person; None: there is room."""
        if self._wanted is None:
            return None
        resource, own, ceiling = self._wanted
        found = self._used(resource)
        if found is None:
            self._wanted = None  # nobody tells any more: the trainer finds out by itself
            return None
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


def _used(resource: str) -> tuple[int, int] | None:
    if resource == "ram":
        facts = memory.ram()
        return facts.used_bytes, facts.total_bytes
    found = gpu.devices()
    if not found or found[0].used_bytes is None or found[0].total_bytes is None:
        return None
    return found[0].used_bytes, found[0].total_bytes
