"""Writes and reads Windows shortcuts (.lnk) through the system's own object for them. Must not know what they start.

ctypes speaks to its two COM interfaces by the number of each method; a library for this alone would be 10 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import uuid
from collections.abc import Iterator
from ctypes import wintypes
from pathlib import Path

assert sys.platform == "win32"

_SHELL_LINK = "00021401-0000-0000-C000-000000000046"
_ISHELL_LINK = "000214F9-0000-0000-C000-000000000046"
_IPERSIST_FILE = "0000010B-0000-0000-C000-000000000046"
_IN_PROCESS = 1
_QUERY_INTERFACE, _RELEASE = 0, 2
_GET_PATH, _SET_DESCRIPTION, _GET_ARGUMENTS, _SET_ARGUMENTS, _SET_SHOW, _SET_PATH = 3, 7, 10, 11, 15, 20
_LOAD, _SAVE = 5, 6
_MINIMIZED = 7
_LONGEST = 2048
_CHANGED_MODE = -2147417850  # RPC_E_CHANGED_MODE: this thread has COM already, in another way, which serves as well

_ole32 = ctypes.OleDLL("ole32")


def write(path: Path, program: str, arguments: str, description: str) -> None:
    """Make `path` a shortcut that starts `program`, minimized. Raises OSError."""
    with _link() as link:
        _call(link, _SET_PATH, wintypes.LPCWSTR(program))
        _call(link, _SET_ARGUMENTS, wintypes.LPCWSTR(arguments))
        _call(link, _SET_DESCRIPTION, wintypes.LPCWSTR(description))
        _call(link, _SET_SHOW, ctypes.c_int(_MINIMIZED))
        with _interface(link, _IPERSIST_FILE) as file:
            _call(file, _SAVE, wintypes.LPCWSTR(str(path)), wintypes.BOOL(True))


def read(path: Path) -> tuple[str, str]:
    """The program and the arguments of the shortcut at `path`. Raises OSError."""
    with _link() as link:
        with _interface(link, _IPERSIST_FILE) as file:
            _call(file, _LOAD, wintypes.LPCWSTR(str(path)), wintypes.DWORD(0))
        program, arguments = (ctypes.create_unicode_buffer(_LONGEST) for _ in range(2))
        _call(link, _GET_PATH, program, ctypes.c_int(_LONGEST), None, wintypes.DWORD(0))
        _call(link, _GET_ARGUMENTS, arguments, ctypes.c_int(_LONGEST))
        return program.value, arguments.value


@contextlib.contextmanager
def _link() -> Iterator[ctypes.c_void_p]:
    """A new shell link object, with COM for this thread as long as it lives."""
    began = True
    try:
        _ole32.CoInitialize(None)
    except OSError as error:
        if error.winerror != _CHANGED_MODE:
            raise
        began = False
    try:
        found = ctypes.c_void_p()
        _ole32.CoCreateInstance(_guid(_SHELL_LINK), None, _IN_PROCESS, _guid(_ISHELL_LINK), ctypes.byref(found))
        try:
            yield found
        finally:
            _release(found)
    finally:
        if began:
            ctypes.windll.ole32.CoUninitialize()


@contextlib.contextmanager
def _interface(thing: ctypes.c_void_p, name: str) -> Iterator[ctypes.c_void_p]:
    found = ctypes.c_void_p()
    _call(thing, _QUERY_INTERFACE, _guid(name), ctypes.pointer(found))
    try:
        yield found
    finally:
        _release(found)


def _call(thing: ctypes.c_void_p, number: int, *arguments: object) -> None:
    """Call a method by its place in the object's table. Raises OSError for a result that is an error."""
    kinds = [ctypes.c_void_p if argument is None else type(argument) for argument in arguments]
    method = ctypes.WINFUNCTYPE(ctypes.HRESULT, ctypes.c_void_p, *kinds)(_table(thing)[number])
    method(thing, *arguments)


def _release(thing: ctypes.c_void_p) -> None:
    ctypes.WINFUNCTYPE(wintypes.ULONG, ctypes.c_void_p)(_table(thing)[_RELEASE])(thing)


def _table(thing: ctypes.c_void_p) -> ctypes.Array[ctypes.c_void_p]:
    table = ctypes.cast(thing, ctypes.POINTER(ctypes.c_void_p))[0]
    return (ctypes.c_void_p * (_SET_PATH + 1)).from_address(table or 0)


def _guid(text: str) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(uuid.UUID(text).bytes_le, 16)
