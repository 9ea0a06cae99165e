"""A lock that dies with its holder. Alive means: the lock is held. Must not trust PIDs, and never deletes its file.

POSIX: flock on a close-on-exec descriptor (lockf would be lost when the owner closes any descriptor of the file).
Windows: LockFileEx on one byte far beyond the content, so that the file itself stays readable.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_RETRY_SECONDS = 0.02


class FileLock:
    """An exclusive lock on `path`, held from a successful acquire() until release() or the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self, timeout_seconds: float = 0.5) -> bool:
        """Try until the time is up (readers' probes take it for an instant). False: somebody else holds it. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open(self.path)
        deadline = time.monotonic() + timeout_seconds
        while not _try_lock(descriptor, shared=False):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return False
            time.sleep(_RETRY_SECONDS)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            _unlock(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def is_held(path: Path) -> bool:
    """Whether some process holds the lock at `path` now. A shared, non-blocking probe, released at once."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        return False
    except OSError:  # a home that became read-only can still be asked; flock needs no right to write
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        if not _try_lock(descriptor, shared=True):
            return True
        _unlock(descriptor)
        return False
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)


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
