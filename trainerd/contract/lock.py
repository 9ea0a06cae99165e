"""A lock that dies with its holder. Alive means: the lock is held. Must not trust PIDs, and never deletes its file.

POSIX: flock on a close-on-exec descriptor (lockf would be lost when the owner closes any descriptor of the file).
Windows: LockFileEx on one byte far beyond the content, so that the file itself stays readable: it holds the holder's PID,
for people who have to end it by hand. What is no plain file is never locked: a link would lock a stranger's file.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

from trainerd.contract.errors import Unreadable

_RETRY_SECONDS = 0.02
_NOTE_BYTES = 32
# A pipe must not hold its opener, and a link must not lead elsewhere.
_CAREFULLY = getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)


class FileLock:
    """An exclusive lock on `path`, held from a successful acquire() until release() or the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self, timeout_seconds: float = 0.5) -> bool:
        """Try until the time is up (readers' probes take it for an instant). False: somebody else holds it.

        Raises OSError, and Unreadable when what lies there is no file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + timeout_seconds
        while True:
            descriptor = _open(self.path, os.O_RDWR | os.O_CREAT)
            # A file that was replaced between the two calls would be locked by us alone.
            if _try_lock(descriptor, shared=False) and _lies_at(descriptor, self.path):
                self._descriptor = descriptor
                _sign(descriptor)
                return True
            os.close(descriptor)
            if time.monotonic() >= deadline:
                return False
            time.sleep(_RETRY_SECONDS)

    def displaced(self) -> bool:
        """Whether the file this lock is on is no longer the one at `path`: deleted or replaced by hand, others see no holder."""
        return self._descriptor is not None and not _lies_at(self._descriptor, self.path)

    def retake(self) -> bool:
        """After being displaced: hold the file that lies at `path` now. False: somebody else does. Raises like acquire()."""
        anew = FileLock(self.path)
        if not anew.acquire():
            return False
        self.release()
        self._descriptor = anew._descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            _unlock(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def is_held(path: Path) -> bool:
    """Whether some process holds the lock at `path` now. A shared, non-blocking probe, released at once.

    Raises Unreadable when what lies there is no file, or may not be opened.
    """
    try:
        descriptor = _open_to_look(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        hint = "The home may be somebody else's: name another with --home."
        raise Unreadable(f"The lock {path} cannot be opened: {error.strerror or error}.", hint) from None
    try:
        if not _try_lock(descriptor, shared=True):
            return True
        _unlock(descriptor)
        return False
    finally:
        os.close(descriptor)


def holder(path: Path) -> int | None:
    """The PID that whoever holds the lock at `path` wrote into it, to show to a person; None when it is not known."""
    found = signed(path)
    return None if found is None else found[0]


def signed(path: Path) -> tuple[int, float] | None:
    """That PID, and when it was written (UTC)."""
    try:
        descriptor = _open(path, os.O_RDONLY)
    except (OSError, Unreadable):
        return None
    try:
        note, at = os.read(descriptor, _NOTE_BYTES).strip(), os.fstat(descriptor).st_mtime
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return (int(note), at) if note.isdigit() and 0 < int(note) < 2**32 else None


def _open_to_look(path: Path) -> int:
    try:
        return _open(path, os.O_RDWR)
    except FileNotFoundError:
        raise
    except OSError:  # a home that became read-only can still be asked; flock needs no right to write
        return _open(path, os.O_RDONLY)


def _open(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | _CAREFULLY, 0o600)
    except OSError:
        _refuse_what_is_no_file(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        _refuse_what_is_no_file(path)
    return descriptor


def _refuse_what_is_no_file(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a link" if stat.S_ISLNK(mode) else "no plain file"
        raise Unreadable(f"The lock {path} is {what}: nobody can hold it.", "Move it away; trainerd makes a new one.")


def _lies_at(descriptor: int, path: Path) -> bool:
    """Whether `path` still leads to this open file. On Windows it does: a file we hold open cannot be deleted or renamed there."""
    if sys.platform == "win32":
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _sign(descriptor: int) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, b"%d\n" % os.getpid())
    except OSError:
        pass  # a full disk: only words for a person


if sys.platform == "win32":
    import ctypes
    import msvcrt
    from ctypes import wintypes

    _EXCLUSIVE, _FAIL_IMMEDIATELY = 0x2, 0x1
    _OFFSET = 1 << 30  # one byte far beyond any content: mandatory locks would make the content unreadable

    class _Overlapped(ctypes.Structure):
        _fields_ = [
            ("Internal", ctypes.c_void_p),
            ("InternalHigh", ctypes.c_void_p),
            ("Offset", wintypes.DWORD),
            ("OffsetHigh", wintypes.DWORD),
            ("hEvent", wintypes.HANDLE),
        ]

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _kernel32.LockFileEx.argtypes = [wintypes.HANDLE, wintypes.DWORD, wintypes.DWORD, wintypes.DWORD, wintypes.DWORD, ctypes.c_void_p]
    _kernel32.UnlockFileEx.argtypes = [wintypes.HANDLE, wintypes.DWORD, wintypes.DWORD, wintypes.DWORD, ctypes.c_void_p]

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        flags = _FAIL_IMMEDIATELY | (0 if shared else _EXCLUSIVE)
        where = _Overlapped(Offset=_OFFSET)
        return bool(_kernel32.LockFileEx(msvcrt.get_osfhandle(descriptor), flags, 0, 1, 0, ctypes.byref(where)))

    def _unlock(descriptor: int) -> None:
        where = _Overlapped(Offset=_OFFSET)
        _kernel32.UnlockFileEx(msvcrt.get_osfhandle(descriptor), 0, 1, 0, ctypes.byref(where))

else:
    import fcntl

    def _try_lock(descriptor: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
