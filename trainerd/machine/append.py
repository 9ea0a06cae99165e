"""Opens a file so that every write goes to its end, whoever holds the handle and however short the file has become.

Must not know what is written. So a log can be cut while the process that writes it goes on, and asks nobody.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import ctypes
    import msvcrt
    from ctypes import wintypes

    _APPEND_DATA, _SYNCHRONIZE, _SHARE_ALL, _CREATE_NEW, _NORMAL = 0x4, 0x100000, 0x7, 1, 0x80
    _INVALID = ctypes.c_void_p(-1).value
    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _kernel32.CreateFileW.restype = wintypes.HANDLE
    _kernel32.CreateFileW.argtypes = [
        wintypes.LPCWSTR, wintypes.DWORD, wintypes.DWORD, ctypes.c_void_p, wintypes.DWORD, wintypes.DWORD, wintypes.HANDLE,
    ]  # fmt: skip

    def create(path: Path) -> IO[bytes]:
        """A new file for appending. Raises FileExistsError when anything lies there, or another OSError."""
        # C's own append mode is a seek before each write, done by whoever opened the file: a child that got the handle would
        # write where it last was, and leave a hole. A handle with the right to append and no other appends in the kernel.
        handle = _kernel32.CreateFileW(str(path), _APPEND_DATA | _SYNCHRONIZE, _SHARE_ALL, None, _CREATE_NEW, _NORMAL, None)
        if handle == _INVALID:
            raise ctypes.WinError(ctypes.get_last_error())
        return os.fdopen(msvcrt.open_osfhandle(handle, os.O_APPEND | os.O_WRONLY), "ab", buffering=0)

else:

    def create(path: Path) -> IO[bytes]:
        """A new file for appending. Raises FileExistsError when anything lies there, a link too, or another OSError."""
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab", buffering=0)
