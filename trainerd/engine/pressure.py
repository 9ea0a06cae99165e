"""What to do when the machine has less memory than a limit leaves: nothing yet, smaller micro-batches, or leave it to others.

Pure arithmetic over what was seen, once a second. Must not measure, clean, shrink or leave.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from trainerd.contract.sizes import compared

NOTHING, SHRINK, LEAVE = "", "shrink", "leave"
_PATIENCE_SECONDS = 10.0
"""So long it may last before we leave: a browser that opens a page gives most of it back."""
_SURE_SHARE = 0.1  # of that: what is over by then was no stray look
_GROWTH_SHARE = 0.05
_SETTLE_SECONDS = 60.0
_WORTH_SHARE = 0.02


@dataclass(frozen=True)
class Want:
    """What is wanted, and the words for it; `ceiling_bytes` is what the whole may use, `own_bytes` what of it is ours."""

    what: str = NOTHING
    because: str = ""
    resource: str = ""
    ceiling_bytes: int = 0
    own_bytes: int = 0


class Pressure:
    """One resource: "ram" or "vram". A limit that was passed before we began cannot be kept by us: then only growth counts.

    see() may be called by another thread than judge().
    """

    def __init__(self, resource: str, limit_bytes: int, total_bytes: int, used_bytes: int, own_bytes: int = 0, *, may_leave: bool) -> None:
        """`used_bytes` is what is in use now, `own_bytes` of it ours; `may_leave`: somebody starts us again."""
        self.resource = resource
        self.ceiling_bytes = limit_bytes
        self._total_bytes = total_bytes
        self._passed_before = used_bytes > limit_bytes
        self._began: float | None = None
        self._others_bytes = used_bytes - own_bytes + int(total_bytes * _GROWTH_SHARE)
        self.is_ours = False
        """Whether it is we who have passed the limit, and not others who have grown: leaving would bring us to the same place again."""
        self._least_bytes = int(total_bytes * _WORTH_SHARE)
        self._may_leave = may_leave
        self._since: float | None = None
        self._shrunk_at = float("-inf")
        self._lock = threading.Lock()

    def see(self, now: float, used_bytes: int) -> bool:
        """What is in use now; whether that is too much. Since when it is without a break is what judge() goes by."""
        with self._lock:
            self._began = now if self._began is None else self._began
            if self._passed_before and now - self._began <= _SETTLE_SECONDS:  # until our own steps and copies are in it
                self.ceiling_bytes = max(self.ceiling_bytes, min(self._total_bytes, used_bytes + int(self._total_bytes * _GROWTH_SHARE)))
            if used_bytes <= self.ceiling_bytes:
                self._since = None
            elif self._since is None:
                self._since = now
            return self._since is not None

    def judge(self, now: float, used_bytes: int, own_bytes: int, saving_bytes: int | None) -> Want:
        """`used_bytes` after what could be cleaned was; `saving_bytes`: what half the micro-batch would give back, None: nothing.

        Smaller micro-batches change the last bits, so they are taken only where they are enough. Leaving changes none, but
        is worth it only for one who holds something.
        """
        self.see(now, used_bytes)
        with self._lock:
            return self._judged(now, used_bytes, own_bytes, saving_bytes)

    def _judged(self, now: float, used_bytes: int, own_bytes: int, saving_bytes: int | None) -> Want:
        over = used_bytes - self.ceiling_bytes
        if self._since is None or now == self._since or now - self._since < _PATIENCE_SECONDS * _SURE_SHARE:
            return Want()
        used, allowed = compared(used_bytes, self.ceiling_bytes)
        because = f"{_NAMES[self.resource]} is short: {used} in use, {allowed} allowed"
        if saving_bytes is not None and saving_bytes >= over and now - self._shrunk_at >= _PATIENCE_SECONDS:
            self._since = self._shrunk_at = now  # its effect is waited for
            return self._want(SHRINK, because, own_bytes)
        if now - self._since < _PATIENCE_SECONDS or not self._may_leave or own_bytes < self._least_bytes:
            return Want()
        self.is_ours = used_bytes - own_bytes <= self._others_bytes
        if not self.is_ours:
            return self._want(LEAVE, because, own_bytes)
        return Want()

    def _want(self, what: str, because: str, own_bytes: int) -> Want:
        return Want(what, because, self.resource, self.ceiling_bytes, own_bytes)


_NAMES = {"ram": "RAM", "vram": "GPU memory"}
