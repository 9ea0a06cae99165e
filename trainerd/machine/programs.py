"""Which programs hold RAM, by name. Must not end, slow or look into any of them: it only tells."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePath

import psutil

_INTERPRETER = re.compile(r"(python|pypy|node|java|ruby|perl)[\d.w]*(\.exe)?", re.IGNORECASE)
# What draws the desktop, sounds, or keeps the session: closing it is no advice.
_OF_THE_SYSTEM = re.compile(
    r"(systemd|init|dbus|gnome-shell|kwin|plasmashell|xfce|xorg|xwayland|mutter|pipewire|wireplumber|pulseaudio|gdm|sddm|lightdm|"
    r"explorer\.exe|dwm\.exe|csrss|winlogon|lsass|services\.exe|svchost|system|registry|memcompression|memory compression|msmpeng|"
    r"sihost|shellexperiencehost|startmenuexperiencehost|searchhost|ctfmon|fontdrvhost|wine|login|sshd|tmux|screen|bash|zsh|fish|sh\b|"
    r"windowserver|launchd|kernel_task)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Program:
    """Processes of one name. `own_bytes`: RAM that is theirs alone, as far as that is cheap to know. `yours`: all run as this user,
    and none belongs to the desktop or the shell: the person may close it."""

    name: str
    pids: tuple[int, ...]
    own_bytes: int
    yours: bool


def heaviest(number: int, leaving_out: Collection[int] = ()) -> list[Program]:
    """The programs with the most RAM of their own, the largest first; `leaving_out` are PIDs not to be counted."""
    found: dict[str, list[tuple[int, int, bool]]] = {}
    for process in psutil.process_iter():
        if process.pid in leaving_out:
            continue
        try:
            with process.oneshot():
                name = shown_name(process)
                found.setdefault(name, []).append((process.pid, _own_bytes(process), _is_ours(process)))
        except (psutil.Error, OSError):
            continue  # it ended, or may not be asked
    programs = [
        Program(
            name,
            tuple(pid for pid, _, _ in parts),
            sum(size for _, size, _ in parts),
            all(ours for _, _, ours in parts) and not _OF_THE_SYSTEM.match(name),
        )
        for name, parts in found.items()
    ]
    return sorted(programs, key=lambda program: -program.own_bytes)[:number]


def tree(pids: Iterable[int]) -> set[int]:
    """These processes and all they have started."""
    found: set[int] = set()
    for pid in pids:
        try:
            found |= {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
        except psutil.Error:
            continue
    return found


def name_of(pid: int) -> str | None:
    """What a process is called; None when it is gone or does not tell."""
    try:
        return shown_name(psutil.Process(pid))
    except (psutil.Error, OSError):
        return None


def words_of(pid: int) -> list[str]:
    """What a process was started with; nothing when it is gone or does not tell."""
    try:
        return [str(word) for word in psutil.Process(pid).cmdline()]
    except (psutil.Error, OSError):
        return []


def shown_name(process: psutil.Process) -> str:
    """The program's name; of an interpreter's, with the script or module it runs."""
    name = str(process.name())
    if not _INTERPRETER.fullmatch(name):
        return name
    try:
        words = process.cmdline()[1:]
    except psutil.Error:
        return name
    if "-m" in words[:-1]:
        return f"{name} -m {words[words.index('-m') + 1]}"
    script = next((word for word in words if not word.startswith("-")), "")
    return f"{name} {PurePath(script).name}".strip() if "-c" not in words else name


def _own_bytes(process: psutil.Process) -> int:
    """Without what is shared with others: libraries, and on Linux shared memory."""
    memory = process.memory_info()
    if sys.platform == "win32":
        return int(memory.private)
    return max(0, int(memory.rss) - int(getattr(memory, "shared", 0)))


def _is_ours(process: psutil.Process) -> bool:
    try:
        if sys.platform == "win32":
            return bool(process.username() == psutil.Process().username())
        return bool(process.uids().real == os.getuid())
    except psutil.Error:
        return False
