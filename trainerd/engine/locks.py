"""The locks a trainer holds: one per home, and one per device for this user. Must not import torch, and trusts no PID.

A left-over trainer is waited for, never doubled; a second home on the same device waits and says for whom. A lock whose file
somebody removes (a cleaner of ~/.local/state, a person) is locked anew, and that is said.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from trainerd.contract import files
from trainerd.contract.errors import Refused, Unreadable
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home

_LOOK_AGAIN_SECONDS = 0.25
_KEEP_SECONDS = 1.0
_GO_FIRST_SECONDS = 2.5
REMOVED = "trainer.lock was removed while the training runs"
_NOTE_BYTES = 4096
_DRIVER_SECONDS = 5.0


def state_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this user's device locks lie; TRAINERD_STATE names another folder."""
    named = environment.get("TRAINERD_STATE")
    return Path(named) if named else platformdirs.user_state_path("trainerd", appauthor=False)


def device_name(plan: Mapping[str, Any] | None, nvml: Any = None) -> str:
    """The device a trainer uses: the UUID of the GPU its plan names, of the first one when there is no plan yet, or "cpu".

    A GPU that does not answer keeps the plan's name for it: whoever waits for it must not stand in the CPU's queue. Neither must who
    has no plan yet, where a driver is stuck: then it is the first GPU by torch's name. `nvml` stands in for pynvml in tests.
    """
    # Asked here and not of torch, because the lock comes before torch, which may take the device's memory.
    from trainerd.machine import gpu
    from trainerd.machine.asking import within

    planned = str((plan or {}).get("device") or "")
    if planned == "cpu":
        return planned
    number = planned.partition(":")[2]
    found, index = within(_DRIVER_SECONDS, lambda: gpu.devices(nvml)), int(number) if number.isdecimal() else 0
    if found is None:
        return planned or "cuda:0"
    return found[index].uuid if index < len(found) else planned or "cpu"


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
        self._let_the_holder_go_first()
        hold(self._lock, self._whose, tell)
        self._sign()

    def acquire_at_once(self) -> str | None:
        """Take the device if nobody has it; otherwise the sentence that says who does. Raises OSError."""
        self._let_the_holder_go_first()
        if not self._lock.acquire():
            return self._whose()
        self._sign()
        return None

    def keep(self, say: Callable[[str], None]) -> None:
        """Hold on to it to the end of the process; `say` hears when its file was removed, and when somebody was quicker."""
        removed = f"{self._lock.path} was removed while the training runs"

        def taken() -> None:
            say(f"{removed}, and another training has taken {self._device_in_words()}: both are slower now.")

        def made_again() -> None:
            self._sign()
            say(f"{removed}; it was made again. Leave it where it is.")

        keep(self._lock, taken, made_again)

    def release(self) -> None:
        self._lock.release()

    def _let_the_holder_go_first(self) -> None:
        if self._lock.path.parent.is_dir():  # else no training has ever run here
            let_the_holder_go_first(self._lock)

    def _sign(self) -> None:
        try:
            files.tidy(self._note.parent, self._note.name)
            files.write_atomic(self._note, str(self._home).encode("utf-8", "replace"))
        except OSError:
            pass  # only words

    def _whose(self) -> str:
        try:
            with open(self._note, "rb") as file:
                home = file.read(_NOTE_BYTES).decode("utf-8", "replace")
        except OSError:
            home = ""
        holder = f"the training in {home}" if home.isprintable() and home else "another training"
        return f"Waiting for {self._device_in_words()}: {holder} is using it."

    def _device_in_words(self) -> str:
        return "the CPU" if self.device == "cpu" else f"the GPU {self.device}"


def hold(lock: FileLock, why: Callable[[], str], tell: Callable[[str], None]) -> None:
    """Acquire `lock`, however long it takes; `tell(why())` at first, and whenever the reason changes. Raises OSError."""
    told = None
    while not lock.acquire(_LOOK_AGAIN_SECONDS):
        reason = why()
        if reason != told:
            tell(reason)
            told = reason


def let_the_holder_go_first(lock: FileLock) -> None:
    """Where a lock's file is missing that cannot but have been there, somebody removed it; whoever holds it locks the new one
    within a second. Until then nobody else may: two would train where one may. Raises OSError."""
    if sys.platform == "win32" or lock.path.exists():
        return  # a file that is open cannot be removed there
    if lock.acquire(0.0):
        lock.release()
    time.sleep(_GO_FIRST_SECONDS)


def keep(lock: FileLock, taken: Callable[[], object], made_again: Callable[[], object]) -> Callable[[], None]:
    """Hold on to `lock`, from a thread: removed by hand, its file is locked anew. `taken()` when somebody else was quicker.

    Returns what ends it, and releases the lock; without that it lasts as long as the process.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(lock, taken, made_again, ended), name=f"keep {lock.path.name}", daemon=True)
    thread.start()

    def release() -> None:
        ended.set()
        thread.join()
        lock.release()

    return release


def _keep(lock: FileLock, taken: Callable[[], object], made_again: Callable[[], object], ended: threading.Event) -> None:
    was_taken = False
    while not ended.wait(_KEEP_SECONDS):
        try:
            if not lock.displaced():
                continue
            if lock.retake():
                was_taken = False
                made_again()
            elif not was_taken:
                was_taken = True
                taken()
        except (OSError, Unreadable):
            continue  # something else lies there now: nobody can take it either


class HomeLock:
    """A home's trainer.lock for as long as a library user trains in it."""

    def __init__(self, home: Home, say: Callable[[str], None], taken: Callable[[], None]) -> None:
        """`say` hears what a person should know about the lock; `taken`, from a thread, that another training has the home now."""
        self._home, self._say, self._taken = home, say, taken
        self._release: Callable[[], None] | None = None

    def __enter__(self) -> HomeLock:
        lock = FileLock(self._home.trainer_lock)
        if self._home.checkpoints.is_dir():  # somebody has trained here, and such a file is never deleted
            let_the_holder_go_first(lock)
        if not lock.acquire():
            raise Refused(f"Another training holds {self._home.root}.", "Wait for it, stop it, or give this one a home of its own.")
        self._release = keep(lock, self._lost, lambda: self._say(f"{REMOVED}; it was made again. Leave it where it is."))
        return self

    def _lost(self) -> None:
        self._taken()
        self._say(f"{REMOVED}, and another training has taken {self._home.root}: this one ends without saving.")

    def __exit__(self, *exc: object) -> None:
        if self._release is not None:
            self._release()
