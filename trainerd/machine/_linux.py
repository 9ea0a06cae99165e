"""Priority on Linux. Must not know what the process does.

nice 19 and SCHED_IDLE are worthless for a process in a session of its own while autogroup is on: every session gets an
equal share, and nice acts only inside it (measured: a foreground job kept 31 % of its speed). So the session itself steps
back (`/proc/self/autogroup`), or a cgroup does (`systemd-run`). nice stays at 10: without privilege it cannot be undone.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from trainerd.machine import _cgroups_linux

assert sys.platform != "win32"

_NICE = 10
_AUTOGROUP_NICE = 19
_OOM_SCORE = 500
_AUTOGROUP_RETRY_SECONDS = 1.0
_SCOPE_PREFIX = "trainerd-"
_PROBE_SECONDS = 3.0


def lower_self(level: str) -> list[str]:
    """Step back behind everything else, first thing in the process, so that all threads and children inherit it.

    Returns what was achieved, in words; "normal" does nothing. Never raises.
    """
    if level != "idle":
        return []
    achieved = []
    for words, step in _STEPS:
        try:
            if step():
                achieved.append(words)
        except (OSError, psutil.Error):
            continue  # a container or a kernel without it: the other steps still help
    return achieved


def raise_process(pid: int) -> None:
    """Give a process group its ordinary weight back, for a quick stop. Never raises; what privilege forbids stays."""
    for step in (_raise_scope, _raise_autogroup, _raise_nice, _raise_io):
        try:
            step(pid)
        except (OSError, subprocess.SubprocessError):
            continue


def wrap(command: list[str], level: str, name: str) -> list[str]:
    """`command` so that it runs in a cgroup of idle weight, where this user's systemd can make one; else unchanged.

    A scope, not a service: it is the same process with the same pipes. systemd-run replaces itself by the command. Not out of a
    group whose memory somebody has limited: in a scope of its own the limit would not hold.
    """
    if level != "idle" or _cgroups_linux.is_limited() or not _user_systemd_answers():
        return command
    return [*_scope(f"{_SCOPE_PREFIX}{name}.scope"), *command]


def _scope(unit: str) -> list[str]:
    return ["systemd-run", "--user", "--scope", "--quiet", "--collect", f"--unit={unit}", "-p", "CPUWeight=idle", "-p", "IOWeight=10", "--"]


def _user_systemd_answers() -> bool:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime or not Path(runtime, "systemd").is_dir() or shutil.which("systemd-run") is None:
        return False
    probe = [*_scope(f"{_SCOPE_PREFIX}probe-{os.getpid()}-{time.monotonic_ns()}.scope"), "true"]
    quiet = subprocess.DEVNULL
    try:
        return subprocess.run(probe, stdin=quiet, stdout=quiet, stderr=quiet, timeout=_PROBE_SECONDS, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _lower_autogroup() -> bool:
    if os.getsid(0) != os.getpid():
        return False  # the session is somebody's terminal: it must not step back with us
    _write_patiently(Path("/proc/self/autogroup"), str(_AUTOGROUP_NICE))
    return True


def _lower_nice() -> bool:
    if os.getpriority(os.PRIO_PROCESS, 0) < _NICE:
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    return True


def _lower_io() -> bool:
    psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)
    return True


def _raise_oom_score() -> bool:
    Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")
    return True


_STEPS: tuple[tuple[str, Callable[[], bool]], ...] = (
    (f"autogroup {_AUTOGROUP_NICE}", _lower_autogroup),
    (f"nice {_NICE}", _lower_nice),
    ("idle disk access", _lower_io),
    (f"oom_score_adj {_OOM_SCORE}", _raise_oom_score),
)


def _raise_scope(pid: int) -> None:
    group = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2]
    folder = Path("/sys/fs/cgroup") / group.lstrip("/")
    if folder.name.startswith(_SCOPE_PREFIX) and (folder / "cpu.idle").exists():
        (folder / "cpu.idle").write_text("0", encoding="ascii")
        (folder / "cpu.weight").write_text("100", encoding="ascii")


def _raise_autogroup(pid: int) -> None:
    if os.getsid(pid) == pid:
        _write_patiently(Path(f"/proc/{pid}/autogroup"), "0")


def _raise_nice(pid: int) -> None:
    if os.getpgid(pid) == pid:
        os.setpriority(os.PRIO_PGRP, pid, 0)


def _raise_io(pid: int) -> None:
    # The whole group at once: the checkpoint is written by a thread, and a thread has its own I/O class.
    if os.getpgid(pid) == pid and shutil.which("ionice"):
        subprocess.run(["ionice", "-c", "2", "-n", "4", "-P", str(pid)], capture_output=True, timeout=1.0, check=False)


def _write_patiently(path: Path, text: str) -> None:
    """The kernel takes one change of an autogroup per tenth of a second, from everybody together, and says EAGAIN else."""
    deadline = time.monotonic() + _AUTOGROUP_RETRY_SECONDS
    while True:
        try:
            path.write_text(text, encoding="ascii")
            return
        except OSError as error:
            if error.errno != errno.EAGAIN or time.monotonic() >= deadline:
                raise
        time.sleep(0.02)
