"""The locks a trainer holds: one per home, and one per device for this user. Must not import torch, and trusts no PID.

A left-over trainer is waited for, never doubled; a second home on the same device waits and says for whom.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import platformdirs

from trainerd.contract import files
from trainerd.contract.errors import Unreadable
from trainerd.contract.lock import FileLock

_LOOK_AGAIN_SECONDS = 0.25
_KEEP_SECONDS = 1.0
_NOTE_BYTES = 4096


def state_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this user's device locks lie; TRAINERD_STATE names another folder."""
    named = environment.get("TRAINERD_STATE")
    return Path(named) if named else platformdirs.user_state_path("trainerd", appauthor=False)


def device_name() -> str:
    """The device a trainer of this machine uses: the UUID of the first GPU the driver shows, or "cpu"."""
    # Asked here and not of torch, because the lock comes before torch, which may take the device's memory.
    from trainerd.machine import gpu

    found = gpu.devices()
    return found[0].uuid if found else "cpu"


class DeviceLock:
    """The lock of one device, with a note beside it that tells people whose it is (told, never relied on)."""

    def __init__(self, device: str, home: Path, state: Path | None = None) -> None:
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in device)
        folder = (state or state_folder()) / "devices"
        self.device = device
        self._lock = FileLock(folder / f"{name}.lock")
        self._note = folder / f"{name}.txt"
        self._home = home

    def acquire(self, tell: Callable[[str], None]) -> None:
        """Wait for the device; `tell` gets a sentence for as long as somebody else has it. Raises OSError."""
        hold(self._lock, self._whose, tell)
        self._sign()

    def acquire_at_once(self) -> str | None:
        """Take the device if nobody has it; otherwise the sentence that says who does. Raises OSError."""
        if not self._lock.acquire():
            return self._whose()
        self._sign()
        return None

    def release(self) -> None:
        self._lock.release()

    def _sign(self) -> None:
        try:
            files.tidy(self._note.parent, self._note.name)
            files.write_atomic(self._note, str(self._home).encode("utf-8", "replace"))
        except OSError:
            pass  # only words

    def _whose(self) -> str:
        what = "the CPU" if self.device == "cpu" else f"the GPU {self.device}"
        try:
            with open(self._note, "rb") as file:
                home = file.read(_NOTE_BYTES).decode("utf-8", "replace")
        except OSError:
            home = ""
        holder = f"the training in {home}" if home.isprintable() and home else "another training"
        return f"Waiting for {what}: {holder} is using it."


def hold(lock: FileLock, why: Callable[[], str], tell: Callable[[str], None]) -> None:
    """Acquire `lock`, however long it takes; `tell(why())` at first, and whenever the reason changes. Raises OSError."""
    told = None
    while not lock.acquire(_LOOK_AGAIN_SECONDS):
        reason = why()
        if reason != told:
            tell(reason)
            told = reason


def keep(lock: FileLock, taken: Callable[[], None]) -> None:
    """Hold on to `lock` to the end of the process, from a thread: removed by hand, its file is locked anew; `taken()` when
    somebody else was quicker."""
    threading.Thread(target=_keep, args=(lock, taken), name=f"keep {lock.path.name}", daemon=True).start()


def _keep(lock: FileLock, taken: Callable[[], None]) -> None:
    while lock.held:
        time.sleep(_KEEP_SECONDS)
        try:
            if lock.displaced() and not lock.retake():
                taken()
                return
        except (OSError, Unreadable):
            continue  # something else lies there now: nobody can take it either
