"""Waits after a trainer's end until the driver has taken back the GPU memory it held: the next one would find the device full.

Bounded: what is still in use then is somebody else's, or never comes back, and the trainer finds out. Must not start or end one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainerd.contract.status import Status
from trainerd.machine import gpu
from trainerd.machine.asking import Asking

_LONGEST_SECONDS = 20.0
LOOK_SECONDS = 0.2
_NEARLY = 0.9  # of what our allocator had: tensors of others come and go meanwhile


@dataclass(frozen=True)
class Seen:
    """One GPU: what is in use of it, and which processes hold some; a container's own processes have other numbers outside of it."""

    used_bytes: int | None
    pids: frozenset[int]


class Reclaim:
    """`look(device)` gives what is on a GPU, None where nobody tells; `note(kind, ...)` is the journal's."""

    def __init__(self, note: Callable[..., None], look: Callable[[int], Seen | None] | None = None) -> None:
        self._note = note
        self._asking = Asking(look or _look)
        self._pid: int | None = None
        self._device = 0
        self._least_bytes: int | None = None
        self._until: float | None = None

    @property
    def is_waiting(self) -> bool:
        return self._pid is not None

    def left(self, pid: int, status: Status) -> None:
        """A trainer is gone; `status` is as it was while it lived."""
        device = status.plan.device or ""
        if not device.startswith("cuda"):
            return
        number = device.partition(":")[2]
        self._device = int(number) if number.isdecimal() else 0
        used, ours = status.memory.vram.used_bytes, status.memory.vram.reserved_bytes
        self._least_bytes = None if used is None or ours is None else int(used - ours * _NEARLY)
        self._pid, self._until = pid, None

    def waits(self, now: float) -> str | None:
        """Why the next trainer is not to be started yet, in words for a person; None: start it."""
        if self._pid is None:
            return None
        self._until = now + _LONGEST_SECONDS if self._until is None else self._until
        seen = self._asking.answer(self._device)
        if not self._asking.is_open:
            if self._asking.has_begun and (seen is None or self._is_free(seen)):
                self._over()
                return None
            self._asking.want(self._device)
        if now >= self._until:
            self._note("vram not given back", seconds=_LONGEST_SECONDS, used_bytes=seen.used_bytes if seen else None, trainer=self._pid)
            self._over()
            return None
        return "Waiting until the driver has taken back the GPU memory of the trainer that ended."

    def _over(self) -> None:
        self._pid = self._until = self._least_bytes = None

    def _is_free(self, seen: Seen) -> bool:
        if self._pid in seen.pids:
            return False
        return self._least_bytes is None or seen.used_bytes is None or seen.used_bytes <= self._least_bytes


def _look(device: int) -> Seen | None:
    found = gpu.devices()
    if device >= len(found):
        return None
    return Seen(found[device].used_bytes, frozenset(one.pid for one in gpu.processes() if one.gpu == device))
