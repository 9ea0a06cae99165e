"""When what has left to make room may come back: the one rule for trainers and for preparations. Must not look at the machine.

What it held must have room, with something to spare, for a while without a break: what a program gives back for a moment is no reason to
come and go. Who is short of memory again soon after coming back waits twice as long.
"""

from __future__ import annotations

SHORT, HOLDING, ROOM = "short", "holding", "room"
_SPARE_SHARE = 0.02
_QUICK_SECONDS = 600.0
"""Short of memory again this soon after coming back: the next wait is twice as long."""
_LONGEST_SECONDS = 900.0


class RoomAgain:
    """For one who comes and goes. `hold_seconds`: how long there must be room, at first."""

    def __init__(self, hold_seconds: float) -> None:
        self._first_seconds = self.hold_seconds = hold_seconds
        self.own_bytes = self.ceiling_bytes = 0
        self._since: float | None = None
        self._returned_at: float | None = None

    def left(self, now: float, own_bytes: int, ceiling_bytes: int) -> None:
        """It has left: what it held, and what may be in use in all."""
        quickly = self._returned_at is not None and now - self._returned_at < _QUICK_SECONDS
        self.hold_seconds = min(_LONGEST_SECONDS, self.hold_seconds * 2) if quickly else self._first_seconds
        self.own_bytes, self.ceiling_bytes = own_bytes, ceiling_bytes
        self._since = None

    def seen(self, now: float, used_bytes: int, total_bytes: int) -> str:
        """What is in use now: too much, enough but not for long, or room to come back."""
        if used_bytes + self.own_bytes + int(total_bytes * _SPARE_SHARE) > self.ceiling_bytes:
            self._since = None
            return SHORT
        self._since = now if self._since is None else self._since
        if now - self._since < self.hold_seconds:
            return HOLDING
        self._returned_at = now
        return ROOM
