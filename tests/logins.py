"""Logging in and out for real, for tests: a systemd user manager of its own, or what a desktop does with its autostart folder.

systemd --user wants a machine booted with systemd; in a mount namespace with an empty /run it is given one. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_SYSTEMD = next((place for place in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if Path(place).exists()), "")
_SCRIPT = """
mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && exec "$0" --user --log-target=console
"""


def missing() -> str:
    """Why there can be no user manager here; empty when there can."""
    if sys.platform != "linux" or not _SYSTEMD or not shutil.which("systemctl") or not shutil.which("unshare"):
        return "no systemd"
    if os.getuid() != 0:
        return "a user manager of its own needs root, for a mount namespace"
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else "no mount namespaces"


class Account:
    """A user's own folders, as the environment names them; log_in() and log_out() are the system's part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "HOME": str(folder / "user"),
            "XDG_CONFIG_HOME": str(folder / "user" / ".config"),
            "XDG_RUNTIME_DIR": str(folder / "runtime"),
            "TRAINERD_AUTOSTART": "",
        }
        (folder / "user").mkdir(parents=True)
        (folder / "runtime").mkdir(mode=0o700)
        self.manager: subprocess.Popen[bytes] | None = None

    @property
    def units(self) -> Path:
        return self.folder / "user" / ".config" / "systemd" / "user"

    @property
    def desktop_entries(self) -> list[Path]:
        return sorted((self.folder / "user" / ".config" / "autostart").glob("*.desktop"))

    def logs_in(self) -> None:
        """Start the user manager and wait until it has reached its default target."""
        shutil.rmtree(self.folder / "runtime")
        (self.folder / "runtime").mkdir(mode=0o700)
        environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **self.environment}
        with open(self.folder / "manager.log", "ab") as log:
            self.manager = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", _SCRIPT, _SYSTEMD], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while self.asks("is-active", "default.target").returncode != 0:
            assert time.monotonic() < deadline and self.manager.poll() is None, (self.folder / "manager.log").read_text("utf-8", "replace")
            time.sleep(0.05)

    def asks(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["systemctl", "--user", *words], env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )

    def logs_out(self) -> None:
        """What logind does after the last session: the manager stops every unit and leaves."""
        if self.manager is not None:
            self.manager.send_signal(signal.SIGTERM)
            self.manager.wait(100)
            self.manager = None

    def loses_power(self) -> None:
        """The manager is gone without a word; what it started is the test's to kill."""
        if self.manager is not None:
            self.manager.kill()
            self.manager.wait(60)
            self.manager = None
