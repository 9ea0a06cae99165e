"""Which home a command is about. Must not create it: that is for `start`."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from trainerd.contract.errors import UsageError
from trainerd.contract.paths import STATUS_FILE, Home


def find(given: str | None, checkout: Path | None) -> Home:
    """--home, else TRAINERD_HOME, else the checkout whose script was started, else a current folder in use, else the user's own.

    Raises UsageError when the folder named is none, or cannot be looked at.
    """
    if given == "":
        raise UsageError("--home is empty: it names no folder.", "Write it like --home DIR, or leave it out.")
    named = given or os.environ.get("TRAINERD_HOME")
    if named:
        root = Path(os.path.abspath(os.path.expanduser(named)))
    elif checkout is not None:
        root = checkout
    elif holds_own_status(Path.cwd()):
        root = Path.cwd()
    else:
        from platformdirs import user_data_dir  # costs 10 ms; most calls do without

        root = Path(user_data_dir("trainerd", appauthor=False))
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except FileNotFoundError:
        return Home(root)
    except (OSError, ValueError) as error:  # its name is too long, or a folder above it is a file or may not be entered
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise UsageError(f"The home {root} cannot be used: {why}.", "Name another folder with --home.") from None
    if not is_folder:
        raise UsageError(f"The home {root} is not a folder.", "Name a folder with --home.")
    return Home(root)


def holds_own_status(folder: Path) -> bool:
    """Another user's status file must not make this folder ours: its content would be obeyed."""
    try:
        seen = (folder / STATUS_FILE).stat()
    except OSError:
        return False
    return sys.platform == "win32" or seen.st_uid == os.getuid()
