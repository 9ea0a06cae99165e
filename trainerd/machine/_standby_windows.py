"""Sleep and shutdown on Windows: messages to a window nobody sees. Must not raise; where there is no window there is nothing to hear.

Console programs get no word of either from their console, so the supervisor has a hidden window with a thread of its own. While
a message is not answered Windows waits: about 2 s before sleep; 5 s at shutdown, then it shows our reason and lets the person decide.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from ctypes import wintypes

assert sys.platform == "win32"

_WM_CLOSE, _WM_DESTROY, _WM_QUERYENDSESSION, _WM_ENDSESSION, _WM_POWERBROADCAST = 0x10, 0x02, 0x11, 0x16, 0x218
_SUSPEND, _RESUMED = 0x4, 0x12
_SLEEP_SECONDS, _SHUTDOWN_SECONDS = 1.8, 15.0
_FIRST_TO_BE_TOLD = 0x3FF
_REASON = "The training saves its progress."
_RESULT = ctypes.c_ssize_t

_user32 = ctypes.WinDLL("user32", use_last_error=True)
_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_Procedure = ctypes.WINFUNCTYPE(_RESULT, wintypes.HWND, wintypes.UINT, wintypes.WPARAM, wintypes.LPARAM)


class _WindowClass(ctypes.Structure):
    _fields_ = (
        ("style", wintypes.UINT),
        ("lpfnWndProc", _Procedure),
        ("cbClsExtra", ctypes.c_int),
        ("cbWndExtra", ctypes.c_int),
        ("hInstance", wintypes.HINSTANCE),
        ("hIcon", wintypes.HANDLE),
        ("hCursor", wintypes.HANDLE),
        ("hbrBackground", wintypes.HANDLE),
        ("lpszMenuName", wintypes.LPCWSTR),
        ("lpszClassName", wintypes.LPCWSTR),
    )


_user32.DefWindowProcW.restype = _RESULT
_user32.DefWindowProcW.argtypes = [wintypes.HWND, wintypes.UINT, wintypes.WPARAM, wintypes.LPARAM]
_user32.CreateWindowExW.restype = wintypes.HWND
_user32.CreateWindowExW.argtypes = [
    *(wintypes.DWORD, wintypes.LPCWSTR, wintypes.LPCWSTR, wintypes.DWORD),
    *[ctypes.c_int] * 4,
    *(wintypes.HWND, wintypes.HMENU, wintypes.HINSTANCE, wintypes.LPVOID),
]  # fmt: skip
_user32.RegisterClassW.argtypes = [ctypes.POINTER(_WindowClass)]
_user32.GetMessageW.argtypes = [ctypes.POINTER(wintypes.MSG), wintypes.HWND, wintypes.UINT, wintypes.UINT]
_user32.DispatchMessageW.argtypes = [ctypes.POINTER(wintypes.MSG)]
_user32.PostMessageW.argtypes = [wintypes.HWND, wintypes.UINT, wintypes.WPARAM, wintypes.LPARAM]
_user32.DestroyWindow.argtypes = [wintypes.HWND]
_user32.ShutdownBlockReasonCreate.argtypes = [wintypes.HWND, wintypes.LPCWSTR]
_user32.ShutdownBlockReasonDestroy.argtypes = [wintypes.HWND]
_kernel32.GetModuleHandleW.restype = wintypes.HMODULE
_kernel32.GetModuleHandleW.argtypes = [wintypes.LPCWSTR]


class Watch:
    """Calls `tell(event, seconds)` for each event, `seconds` being how long the machine waits for ready()."""

    def __init__(self, tell: Callable[[str, float], None]) -> None:
        self._tell = tell
        self._ready = threading.Event()
        self._told_of_end = False
        self._window: int | None = None
        self._procedure = _Procedure(self._answer)  # kept here: Windows holds no reference
        self._thread = threading.Thread(target=self._run, name="standby", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ready(self) -> None:
        """What had to be done is done: let the machine go on."""
        self._ready.set()

    def close(self) -> None:
        """Hear no more, and hold nothing up."""
        self._ready.set()
        if self._window is not None:
            _user32.PostMessageW(self._window, _WM_CLOSE, 0, 0)
            self._thread.join(1.0)

    def _run(self) -> None:
        name, instance = f"trainerd.{os.getpid()}.{id(self)}", _kernel32.GetModuleHandleW(None)
        described = _WindowClass(lpfnWndProc=self._procedure, hInstance=instance, lpszClassName=name)
        # Before the trainer, which is ended without a question while it saves.
        _kernel32.SetProcessShutdownParameters(_FIRST_TO_BE_TOLD, 0)
        if not _user32.RegisterClassW(ctypes.byref(described)):
            return
        # Not a message-only window: those are left out of broadcasts.
        self._window = _user32.CreateWindowExW(0, name, "trainerd", 0, 0, 0, 0, 0, None, None, instance, None)
        if not self._window:
            return
        message = wintypes.MSG()
        while _user32.GetMessageW(ctypes.byref(message), None, 0, 0) > 0:
            _user32.DispatchMessageW(ctypes.byref(message))

    def _answer(self, window: int, message: int, first: int, second: int) -> int:
        if message == _WM_QUERYENDSESSION:
            self._end_comes(window)
            return 1
        if message == _WM_ENDSESSION:
            self._end_session(window, bool(first))
            return 0
        if message == _WM_POWERBROADCAST and first == _SUSPEND:
            self._ready.clear()
            self._tell("sleep", _SLEEP_SECONDS)
            self._ready.wait(_SLEEP_SECONDS)
            return 1
        if message == _WM_POWERBROADCAST and first == _RESUMED:
            self._tell("woke", 0.0)
            return 1
        if message == _WM_CLOSE:
            _user32.DestroyWindow(window)
            return 0
        if message == _WM_DESTROY:
            _user32.PostQuitMessage(0)
            return 0
        return int(_user32.DefWindowProcW(window, message, first, second))

    def _end_comes(self, window: int) -> None:
        """Asked whether the session may end: it may, and saving begins now."""
        if not self._told_of_end:
            self._told_of_end = True
            self._ready.clear()
            _user32.ShutdownBlockReasonCreate(window, _REASON)
            self._tell("shutdown", _SHUTDOWN_SECONDS)

    def _end_session(self, window: int, ends: bool) -> None:
        if ends:
            self._end_comes(window)
            self._ready.wait(_SHUTDOWN_SECONDS)  # once this is answered, all of us may be ended
        self._told_of_end = False
        _user32.ShutdownBlockReasonDestroy(window)


@contextlib.contextmanager
def stay_up() -> Iterator[bool]:
    """Windows has one way to stay awake, and wakepy uses it."""
    yield False
