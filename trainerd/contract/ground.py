"""Whether a home can be trusted with a training: its folders are folders, lie in it, and are this user's. Must not change anything.

What a run loads and executes lies there (records, task files, checkpoints): who may write there may run code as this user.
A home that existed keeps its mode; what trainerd makes in it is private.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from trainerd.contract import files
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home

_ELSEWHERE = "Move it away; to keep everything in another place, name that place with --home."


def check(home: Home, run: str | None = None) -> list[str]:
    """Warnings about a home (and the folders of one run in it). Raises Refused when it must not be used, with what to do."""
    folders = [home.control, home.logs, home.runs, home.checkpoints, home.models, home.cache]
    if run is not None:
        paths = home.run(run)
        folders += [paths.folder, paths.task, paths.checkpoints, paths.model]
        for path in (paths.record, paths.config, paths.metrics, paths.events):
            if files.is_link(path):
                raise Refused(f"{path} is a link: what a run writes must lie in its home.", "Move it away.")
    if home.status.is_dir():
        raise Refused(f"{home.status} is a folder, where trainerd keeps a file.", "Move it away.")
    _check_owner(home.root, follow=True)
    for folder in folders:
        if files.is_link(folder):
            raise Refused(f"{folder} is a link: a home's folders must lie in it.", _ELSEWHERE)
        if folder.exists() and not folder.is_dir():
            raise Refused(f"{folder} is a file, where trainerd keeps a folder.", "Move it away.")
        _check_owner(folder, follow=False)
    return _open_to_all(home.root)


def is_foreign(seen: os.stat_result) -> bool:
    """Whether a file is another user's: neither ours, nor the system's, nor that of whoever called sudo."""
    if sys.platform == "win32":
        return False  # st_uid is 0 there; the profile's folders are its user's by the system's own rules
    ours = {os.getuid(), 0}
    if os.getuid() == 0 and os.environ.get("SUDO_UID", "").isdigit():
        ours.add(int(os.environ["SUDO_UID"]))
    return seen.st_uid not in ours


def _check_owner(folder: Path, *, follow: bool) -> None:
    try:
        seen = os.stat(folder, follow_symlinks=follow)
    except OSError:
        return
    if is_foreign(seen):
        message = f"{folder} belongs to another user (number {seen.st_uid}), who could put code there that would run as you."
        raise Refused(message, "Name a folder of your own with --home, or make this one yours (chown).")


def _open_to_all(root: Path) -> list[str]:
    try:
        mode = os.stat(root).st_mode
    except OSError:
        return []
    if sys.platform == "win32" or not mode & stat.S_IWOTH:
        return []
    return [f"Everybody on this machine may write to {root}. Close it with: chmod o-w '{root}'"]
