"""How one of our own processes is started: which Python, with which environment. Must not start it.

In a virtual environment on Windows python.exe is only a launcher: the interpreter is its child, in a job of its own, so the
process one starts is not the process one means. The base interpreter is started instead and told whose environment it is in,
as multiprocessing does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_LAUNCHER = "__PYVENV_LAUNCHER__"
PATH = "PYTHONPATH"


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module`; the current folder does not get onto its import path (Python 3.11 and later)."""
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    return [_executable(), *safe, "-m", module, *arguments]


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment our processes need: they find this very package, and speak UTF-8 on Windows too."""
    found = dict(os.environ if base is None else base)
    paths = [] if _PACKAGE_PARENT.name in ("site-packages", "dist-packages") else [str(_PACKAGE_PARENT)]
    paths += whole_path(found.get(PATH, "")).split(os.pathsep)
    if any(paths):
        found[PATH] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    if sys.platform == "win32":
        found["PYTHONUTF8"] = "1"
        if _executable() != sys.executable:
            found[_LAUNCHER] = sys.executable
    return found


def whole_path(folders: str) -> str:
    """PYTHONPATH with every folder by its whole name: our processes run in other folders than the one it was typed in."""
    return os.pathsep.join(os.path.abspath(folder) for folder in folders.split(os.pathsep) if folder)


def package_parent() -> Path:
    """The folder that holds this package: a checkout, or site-packages."""
    return _PACKAGE_PARENT


def _executable() -> str:
    if sys.platform == "win32":
        base = Path(getattr(sys, "_base_executable", sys.executable))
        # pythonw.exe (the log-in) has no console: what its children start would open windows of their own.
        told = base.with_name("python.exe") if base.name.lower() == "pythonw.exe" else base
        return str(told if told.exists() else base)
    return sys.executable
