"""A command at log-in on Linux: a systemd user unit, or XDG autostart where no systemd user manager runs.

Must not start or stop anything: the unit is enabled for the next log-in only, and a training that runs is left alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainerd.contract import files
from trainerd.machine.login import OFF, ON, OUTDATED, SWITCHED_OFF, Entry, Found, unprintable

assert sys.platform != "win32"

SYSTEMD, DESKTOP = "a systemd user unit", "an XDG autostart entry"
_ANSWER_SECONDS = 5.0
_LINGER = Path("/var/lib/systemd/linger")

# simple, not oneshot: the log-in must not wait for it. RemainAfterExit: the supervisor it leaves behind belongs to the
# unit, so that at log-out every process gets SIGTERM and the time to save; without it systemd kills them unasked.
_UNIT = """\
# Written by trainerd; `trainerd autostart disable` removes it.
[Unit]
Description={title}
ConditionPathExists={needs}

[Service]
Type=simple
RemainAfterExit=yes
{command}
KillMode=control-group
TimeoutStopSec=90

[Install]
WantedBy=default.target
"""
_DESKTOP = """\
# Written by trainerd; `trainerd autostart disable` removes it.
[Desktop Entry]
Type=Application
Name=trainerd
Comment={title}
{command}
TryExec={program}
Terminal=false
NoDisplay=true
X-GNOME-Autostart-enabled=true
"""
_TURNED_OFF = ("hidden=true", "x-gnome-autostart-enabled=false")


def look(entry: Entry) -> Found:
    """How the entry stands. Raises OSError when its file cannot be read."""
    unit, desktop = _unit(entry), _desktop(entry)
    if unit.is_symlink():  # masked: systemd's word for "never"
        return Found(SWITCHED_OFF, SYSTEMD, unit)
    if unit.exists():
        if not _link(entry).is_symlink():
            return Found(SWITCHED_OFF, SYSTEMD, unit)
        return Found(ON if _unit_command(entry) in _lines(unit) else OUTDATED, SYSTEMD, unit)
    if desktop.exists():
        lines = _lines(desktop)
        if any(line.lower().replace(" ", "") in _TURNED_OFF for line in lines):
            return Found(SWITCHED_OFF, DESKTOP, desktop)
        return Found(ON if _desktop_command(entry) in lines else OUTDATED, DESKTOP, desktop)
    return Found(OFF)


def enable(entry: Entry) -> Found:
    """Register it, once, in the best way there is here. Raises OSError."""
    wrong = unprintable(entry)
    if wrong is not None:
        raise OSError(f"{wrong!r} cannot be written into a file of the system's")
    if not (_manager_runs() and _enable_unit(entry)):
        _enable_desktop(entry)
    return look(entry)


def disable(entry: Entry) -> bool:
    """Remove whatever registers it; whether there was something. Raises OSError."""
    paths = [path for path in (_link(entry), _unit(entry), _desktop(entry)) if path.is_symlink() or path.exists()]
    for path in paths:
        path.unlink()
    if _link(entry) in paths and _manager_runs():
        _systemctl("daemon-reload")
    return bool(paths)


def remarks(found: Found) -> list[str]:
    """What a person should know about this way: log-out and boot under systemd."""
    if found.way != SYSTEMD:
        return []
    try:
        lingers = (_LINGER / _user_name()).exists()
    except (OSError, KeyError):
        return []
    if lingers:
        return ["Lingering is enabled for you: it goes on right after boot, and logging out does not end it."]
    return [
        "When you log out, systemd ends what was resumed at log-in: it saves, and goes on at the next log-in.",
        "To go on right after boot and through log-outs: loginctl enable-linger",
    ]


def _enable_unit(entry: Entry) -> bool:
    """Write and link the unit. False: this user's manager does not see it (its configuration is elsewhere)."""
    unit, link = _unit(entry), _link(entry)
    text = _UNIT.format(title=_percent(entry.title), needs=_percent(str(entry.needs)), command=_unit_command(entry))
    if unit.is_symlink():
        unit.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(unit, text.encode("utf-8"))
    if not link.is_symlink():
        link.symlink_to(Path("..") / unit.name)
    if _systemctl("daemon-reload") and _systemctl("is-enabled", "--quiet", unit.name):
        _desktop(entry).unlink(missing_ok=True)
        return True
    link.unlink()
    unit.unlink()
    return False


def _enable_desktop(entry: Entry) -> None:
    path = _desktop(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _DESKTOP.format(title=_string(entry.title), program=_string(entry.command[0]), command=_desktop_command(entry))
    files.write_atomic(path, text.encode("utf-8"))


def _unit_command(entry: Entry) -> str:
    """ExecStart, through a shell: in the program's own place neither systemd nor XDG take every path, as an argument they do."""
    return "ExecStart=/bin/sh -c " + " ".join(map(_unit_word, _through_shell(entry.command)))


def _unit_word(word: str) -> str:
    """One word by systemd's rules: C-like quoting, %% for specifiers, $$ for variables."""
    quoted = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{_percent(quoted)}"'


def _desktop_command(entry: Entry) -> str:
    return "Exec=/bin/sh -c " + " ".join(map(_desktop_word, _through_shell(entry.command)))


def _desktop_word(word: str) -> str:
    """One word by the desktop entry rules: quoted like an argument of Exec, then escaped like every string of the file."""
    quoted = "".join(f"\\{letter}" if letter in '"`$\\' else letter for letter in word)
    return _string(f'"{_percent(quoted)}"')


def _through_shell(command: Sequence[str]) -> list[str]:
    return ['exec "$@"', "trainerd", *command]


def _string(text: str) -> str:
    return text.replace("\\", "\\\\")


def _percent(text: str) -> str:
    return text.replace("%", "%%")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _configuration() -> Path:
    given = os.environ.get("XDG_CONFIG_HOME", "")
    if Path(given).is_absolute():
        return Path(given)
    try:
        return Path.home() / ".config"
    except RuntimeError as error:  # a user without a home, as some containers have
        raise OSError(str(error)) from None


def _unit(entry: Entry) -> Path:
    return _configuration() / "systemd" / "user" / f"{entry.name}.service"


def _link(entry: Entry) -> Path:
    return _unit(entry).parent / "default.target.wants" / f"{entry.name}.service"


def _desktop(entry: Entry) -> Path:
    return _configuration() / "autostart" / f"{entry.name}.desktop"


def _runtime() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")


def _manager_runs() -> bool:
    return (_runtime() / "systemd").is_dir() and shutil.which("systemctl") is not None


def _systemctl(*words: str) -> bool:
    quiet = subprocess.DEVNULL
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(_runtime())}
    command = ["systemctl", "--user", *words]
    try:
        done = subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment, timeout=_ANSWER_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def _user_name() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name
