"""A disk that is full: whether an error means that, and waiting, aloud, until there is room. Must not write or delete anything.

Waiting is no death: the trainer stays, the person is told how much is missing, and may stop it meanwhile.
"""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainerd.contract import wire
from trainerd.machine.filesystem import free_bytes

Send = Callable[..., None]
_CODES = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_CODES_ON_WINDOWS = (39, 112)
# safetensors (Rust) keeps the system's code only in its text.
_SAYS_FULL = re.compile(r"No space left on device|[Qq]uota exceeded|os error (28|122|112|39)\b|not enough space on the disk")
# numpy and torch's zip writer say only that a write failed: it counts as full when there is hardly room for anything.
_SAYS_FAILED = re.compile(r"requested and \d+ written|file write failed|unexpected pos|failed writing file")
_SAYS_SYSTEM = re.compile(r"\(os error \d+\)")
_HARDLY_ANY_BYTES = 1 << 20
_LOOK_SECONDS = 0.25
_TELL_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 60.0


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether `error`, met while writing in `folder`, means that the disk or the quota is full."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and (cause.errno in _CODES or getattr(cause, "winerror", None) in _CODES_ON_WINDOWS):
            return True
        text = str(cause)
        if _SAYS_FULL.search(text) or (_SAYS_FAILED.search(text) and has_hardly_any(folder)):
            return True
    return False


def is_of_the_disk(error: BaseException) -> bool:
    """Whether the system or a library says that reading or writing failed, rather than the program that asked for it."""
    for cause in _causes(error):
        text = str(cause)
        if (isinstance(cause, OSError) and cause.errno is not None) or _SAYS_SYSTEM.search(text) or _SAYS_FAILED.search(text):
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def has_hardly_any(folder: Path) -> bool:
    """Whether next to nothing is free where `folder` is."""
    free = free_bytes(folder)
    return free is not None and free < _HARDLY_ANY_BYTES


class Wait:
    """Waits for room for one thing, again and again if need be, each time a little longer."""

    def __init__(self, folder: Path, what: str, send: Send) -> None:
        """`what` is told: "Writing the finished model"."""
        self._folder, self._what, self._send = folder, what, send
        self._pause_seconds = 1.0
        self.attempts = 0

    def until_room(self, need_bytes: int | None, to_leave: Callable[[], bool] = lambda: False) -> bool:
        """Wait until another attempt may succeed; False when asked to leave first.

        `need_bytes` is what it takes, None when nobody knows: then it takes more than what is free now. Whatever the disk
        says about itself, no attempt follows the one before at once: a quota shows in no free space.
        """
        self.attempts += 1
        began, tell_at = time.monotonic(), -math.inf
        if need_bytes is None:
            need_bytes = (free_bytes(self._folder) or 0) + _HARDLY_ANY_BYTES
        while not to_leave():
            now, free = time.monotonic(), free_bytes(self._folder)
            room = free is None or free >= need_bytes
            if now - began >= self._pause_seconds and (room or now - began >= _LONGEST_PAUSE_SECONDS):
                self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
                return True
            if now >= tell_at:
                tell_at = now + _TELL_SECONDS
                self._send(wire.WAITING, reason=self._reason(need_bytes, free))
            time.sleep(_LOOK_SECONDS)
        return False

    def _reason(self, need_bytes: int, free: int | None) -> str:
        missing = max(1, need_bytes - (free or 0))
        if free is not None and free >= need_bytes:
            return f"The disk has room, but your quota is used up where {self._folder} is. {self._what} goes on when there is room for you."
        return f"The disk is full: {missing:,} bytes are missing where {self._folder} is. {self._what} goes on when they are free."
