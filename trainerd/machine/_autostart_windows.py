"""A command at log-in on Windows: a shortcut in the Startup folder. Must not start anything.

Not a scheduled task: by default one does not start on battery, ends after 72 hours and runs at low priority. The Startup
folder needs no privilege and can be seen, and switched off in the Task Manager or the settings, by the person.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import winreg
from ctypes import wintypes
from pathlib import Path

from trainerd.machine import _shell_link_windows
from trainerd.machine.login import OFF, ON, OUTDATED, SWITCHED_OFF, Entry, Found, unprintable

assert sys.platform == "win32"

WAY = "a shortcut in the Startup folder"
_CSIDL_STARTUP, _CREATE = 0x7, 0x8000
_APPROVED = r"Software\Microsoft\Windows\CurrentVersion\Explorer\StartupApproved\StartupFolder"
_SWITCHED_OFF_BIT = 1
_LONGEST_ARGUMENTS = 1023


def look(entry: Entry) -> Found:
    """How the entry stands. Raises OSError when its shortcut cannot be read."""
    path = _path(entry)
    if not path.exists():
        return Found(OFF)
    if _switched_off(path.name):
        return Found(SWITCHED_OFF, WAY, path)
    program, arguments = _shell_link_windows.read(path)
    same = program.lower() == _program(entry).lower() and arguments == _arguments(entry)
    return Found(ON if same else OUTDATED, WAY, path)


def enable(entry: Entry) -> Found:
    """Register it, once. Raises OSError."""
    wrong = unprintable(entry)
    if wrong is not None:
        raise OSError(f"{wrong!r} cannot be written into a shortcut")
    if len(_arguments(entry)) > _LONGEST_ARGUMENTS:
        raise OSError("the paths of the home and of trainerd are too long for a shortcut")
    path = _path(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    _shell_link_windows.write(path, _program(entry), _arguments(entry), entry.title[:250])
    try:
        with winreg.OpenKey(winreg.HKEY_CURRENT_USER, _APPROVED, 0, winreg.KEY_SET_VALUE) as key:
            winreg.DeleteValue(key, path.name)
    except OSError:
        pass  # never switched off
    return look(entry)


def disable(entry: Entry) -> bool:
    """Remove it; whether there was something. Raises OSError."""
    path = _path(entry)
    there = path.exists()
    if there:
        path.unlink()
    return there


def remarks(found: Found) -> list[str]:
    """What a person should know about this way."""
    return []


def _program(entry: Entry) -> str:
    """pythonw.exe beside python.exe: it opens no console window."""
    program = Path(entry.command[0])
    quiet = program.with_name("pythonw.exe")
    return str(quiet if program.name.lower() == "python.exe" and quiet.exists() else program)


def _arguments(entry: Entry) -> str:
    return subprocess.list2cmdline(entry.command[1:])


def _path(entry: Entry) -> Path:
    buffer = ctypes.create_unicode_buffer(wintypes.MAX_PATH)
    result = ctypes.windll.shell32.SHGetFolderPathW(None, _CSIDL_STARTUP | _CREATE, None, 0, buffer)
    if result != 0:
        raise ctypes.WinError(result & 0xFFFF)
    return Path(buffer.value) / f"{entry.name}.lnk"


def _switched_off(name: str) -> bool:
    """What the Task Manager and the settings remember about an entry."""
    try:
        with winreg.OpenKey(winreg.HKEY_CURRENT_USER, _APPROVED) as key:
            value, _ = winreg.QueryValueEx(key, name)
    except OSError:
        return False
    return isinstance(value, bytes) and bool(value) and bool(value[0] & _SWITCHED_OFF_BIT)
