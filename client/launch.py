"""Starts the supervisor so that it outlives this terminal. Must not decide what is trained, and must not wait for it.

Linux: a session of its own, every descriptor closed or on a file. Windows: a hidden console (no window, and none for its
children), out of the shell's job where the job allows it, or it would end with the terminal that started it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainerd.contract import files, interpreter
from trainerd.contract.paths import Home

_ACCESS_DENIED = 5
_ERROR_BYTES = 4000
_EARLY_LOGS = "supervisor_*.log"
_KEEP_EARLY_LOGS = 20


@dataclass
class Launched:
    """A supervisor process; `early_log` holds what it says before it has a status, `tied` why it may end with the terminal."""

    process: subprocess.Popen[bytes]
    early_log: Path
    tied: str = ""

    def last_words(self) -> str:
        """What it printed, for a person; the whole is in the file."""
        try:
            content = self.early_log.read_bytes()[-_ERROR_BYTES:]
        except OSError:
            return ""
        text = [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
        return text[-1] if text else ""


def detached(home: Home, instance: str, request: str) -> Launched:
    """Start the supervisor of `home` on its own. Raises OSError."""
    early_log = _early_log(home, instance)
    words = interpreter.command("trainerd.supervisor", "--home", str(home.root), "--instance", instance, "--request", request)
    with open(early_log, "xb") as log:
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": log,
            "cwd": home.root,
            "env": interpreter.environment(),
        }
        if sys.platform != "win32":
            return Launched(subprocess.Popen(words, start_new_session=True, **options), early_log)
        flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
        try:
            process = subprocess.Popen(words, creationflags=flags | subprocess.CREATE_BREAKAWAY_FROM_JOB, **options)
            return Launched(process, early_log)
        except OSError as error:
            if error.winerror != _ACCESS_DENIED:
                raise
            process = subprocess.Popen(words, creationflags=flags, **options)
            return Launched(process, early_log, "This terminal does not let programs outlive it: closing it may end the training.")


def attached(home: Home, instance: str, request: str) -> subprocess.Popen[bytes]:
    """Start the supervisor in this terminal: it shows the trainer's log here, and Ctrl-C reaches it. Raises OSError."""
    place = ["--home", str(home.root), "--instance", instance, "--request", request, "--foreground"]
    return subprocess.Popen(interpreter.command("trainerd.supervisor", *place), cwd=home.root, env=interpreter.environment())


def _early_log(home: Home, instance: str) -> Path:
    """A file of its own for each start; those of earlier starts that stayed empty go."""
    files.make_folder(home.logs, 0o700)
    for path in home.logs.glob(_EARLY_LOGS):
        _remove_if_old_and_empty(path)
    for path in sorted(home.logs.glob(_EARLY_LOGS))[:-_KEEP_EARLY_LOGS]:
        _remove(path)
    return home.logs / f"supervisor_{time.strftime('%Y%m%d_%H%M%S')}_{instance[:8]}.log"


def _remove_if_old_and_empty(path: Path) -> None:
    try:
        seen = path.lstat()
    except OSError:
        return
    # A minute: a start going on beside this one has just made its own.
    if seen.st_size == 0 and time.time() - seen.st_mtime > 60:
        _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass  # gone already, or held open on Windows by the supervisor that is running
