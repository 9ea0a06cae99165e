"""What to do when the machine has less memory than a limit leaves: nothing yet, smaller micro-batches, or leave it to others.

Pure arithmetic over what was seen, once a second. Must not measure, clean, shrink or leave.
"""

from __future__ import annotations

from dataclasses import dataclass

NOTHING, SHRINK, LEAVE = "", "shrink", "leave"
_PATIENCE_SECONDS = 10.0
"""So long it may last before we leave: a browser that opens a page gives most of it back."""
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
    """One resource: "ram" or "vram". A limit that was passed before we began cannot be kept by us: then only growth counts."""

    def __init__(self, resource: str, limit_bytes: int, total_bytes: int, used_bytes: int, *, may_leave: bool) -> None:
        """`used_bytes` is what is in use now, ours included; `may_leave`: somebody starts us again."""
        self.resource = resource
        self.ceiling_bytes = limit_bytes
        self._total_bytes = total_bytes
        self._passed_before = used_bytes > limit_bytes
        self._began: float | None = None
        self._least_bytes = int(total_bytes * _WORTH_SHARE)
        self._may_leave = may_leave
        self._since: float | None = None
        self._shrunk_at = float("-inf")

    def judge(self, now: float, used_bytes: int, own_bytes: int, saving_bytes: int | None) -> Want:
        """`used_bytes` after what could be cleaned was; `saving_bytes`: what half the micro-batch would give back, None: nothing.

        Smaller micro-batches change the last bits, so they are taken only where they are enough. Leaving changes none, but
        is worth it only for one who holds something.
        """
        self._began = now if self._began is None else self._began
        if self._passed_before and now - self._began <= _SETTLE_SECONDS:  # until our own steps and copies are in it
            self.ceiling_bytes = max(self.ceiling_bytes, min(self._total_bytes, used_bytes + int(self._total_bytes * _GROWTH_SHARE)))
        over = used_bytes - self.ceiling_bytes
        if over <= 0:
            self._since = None
            return Want()
        if self._since is None:
            self._since = now
            return Want()
        because = f"{_NAMES[self.resource]} is short: {used_bytes / 1e9:.1f} GB in use, {self.ceiling_bytes / 1e9:.1f} GB allowed"
        if saving_bytes is not None and saving_bytes >= over and now - self._shrunk_at >= _PATIENCE_SECONDS:
            self._since = self._shrunk_at = now  # its effect is waited for
            return self._want(SHRINK, because, own_bytes)
        if now - self._since >= _PATIENCE_SECONDS and self._may_leave and own_bytes >= self._least_bytes:
            return self._want(LEAVE, because, own_bytes)
        return Want()

    def _want(self, what: str, because: str, own_bytes: int) -> Want:
        return Want(what, because, self.resource, self.ceiling_bytes, own_bytes)


_NAMES = {"ram": "RAM", "vram": "GPU memory"}
