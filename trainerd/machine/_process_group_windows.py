"""A process group on Windows: a job object that dies with its last handle. Must not know what runs in it.

The process is started suspended, put into the job, then resumed: nothing it starts can escape, and when the supervisor is
killed the system closes the handle and ends them all.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from ctypes import wintypes
from pathlib import Path
from typing import IO

import psutil

assert sys.platform == "win32"

_CREATE_SUSPENDED = 0x4
_KILL_ON_JOB_CLOSE = 0x2000
_EXTENDED_LIMIT_INFORMATION = 9
_KILLED = 1

_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_kernel32.CreateJobObjectW.restype = wintypes.HANDLE
_kernel32.CreateJobObjectW.argtypes = [ctypes.c_void_p, wintypes.LPCWSTR]
_kernel32.SetInformationJobObject.argtypes = [wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD]
_kernel32.AssignProcessToJobObject.argtypes = [wintypes.HANDLE, wintypes.HANDLE]
_kernel32.TerminateJobObject.argtypes = [wintypes.HANDLE, wintypes.UINT]
_kernel32.CloseHandle.argtypes = [wintypes.HANDLE]


class _BasicLimits(ctypes.Structure):
    _fields_ = (
        ("PerProcessUserTimeLimit", wintypes.LARGE_INTEGER),
        ("PerJobUserTimeLimit", wintypes.LARGE_INTEGER),
        ("LimitFlags", wintypes.DWORD),
        ("MinimumWorkingSetSize", ctypes.c_size_t),
        ("MaximumWorkingSetSize", ctypes.c_size_t),
        ("ActiveProcessLimit", wintypes.DWORD),
        ("Affinity", ctypes.c_size_t),
        ("PriorityClass", wintypes.DWORD),
        ("SchedulingClass", wintypes.DWORD),
    )


class _ExtendedLimits(ctypes.Structure):
    _fields_ = (
        ("BasicLimitInformation", _BasicLimits),
        ("IoInfo", ctypes.c_ulonglong * 6),
        ("ProcessMemoryLimit", ctypes.c_size_t),
        ("JobMemoryLimit", ctypes.c_size_t),
        ("PeakProcessMemoryUsed", ctypes.c_size_t),
        ("PeakJobMemoryUsed", ctypes.c_size_t),
    )


class ProcessGroup:
    """Starts `command` with pipes for stdin and stdout and `log` for stderr. Raises OSError when it cannot start."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: IO[bytes]) -> None:
        self._job: int | None = _new_job()
        # CREATE_NO_WINDOW: a hidden console of its own, so that its children open no windows and Ctrl-C passes it by.
        flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP | _CREATE_SUSPENDED
        pipe = subprocess.PIPE
        try:
            # Only the three std handles are inherited (close_fds is the default and makes subprocess list them).
            self._popen = subprocess.Popen(
                list(command), stdin=pipe, stdout=pipe, stderr=log, bufsize=0, env=dict(environment), cwd=folder, creationflags=flags
            )
        except OSError:
            self._close_job()
            raise
        self.pid = self._popen.pid
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self.stdin: IO[bytes] = self._popen.stdin
        self.stdout: IO[bytes] = self._popen.stdout
        if not _kernel32.AssignProcessToJobObject(self._job, int(self._popen._handle)):  # type: ignore[attr-defined]
            error = ctypes.WinError(ctypes.get_last_error())
            self._popen.kill()
            self._close_job()
            raise error
        psutil.Process(self.pid).resume()

    def wait(self) -> int:
        """Block until the process is dead, kill what it left, and return its exit code."""
        code = self._popen.wait()
        self.kill()
        self._close_job()
        return code

    def dump(self) -> bool:
        """There is no signal for it here: False."""
        return False

    def kill(self) -> None:
        """Kill every process of the job."""
        job = self._job
        if job is not None:
            _kernel32.TerminateJobObject(job, _KILLED)

    def with_pid(self, action: Callable[[int], None]) -> None:
        """Call `action` with the process's PID: our handle keeps the number from being given to anybody else."""
        action(self.pid)

    def close(self) -> None:
        """Give the pipes back; to be called after wait()."""
        for pipe in (self.stdin, self.stdout):
            try:
                pipe.close()
            except OSError:
                continue

    def _close_job(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            _kernel32.CloseHandle(job)


def _new_job() -> int:
    job = _kernel32.CreateJobObjectW(None, None)
    limits = _ExtendedLimits()
    limits.BasicLimitInformation.LimitFlags = _KILL_ON_JOB_CLOSE
    size = ctypes.sizeof(limits)
    if not job or not _kernel32.SetInformationJobObject(job, _EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), size):
        raise ctypes.WinError(ctypes.get_last_error())
    return int(job)
