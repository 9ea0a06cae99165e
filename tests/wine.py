"""A person at a Windows computer, for tests on Linux: Wine's cmd.exe, a console window, Task Manager. See tests/winpy.py.

Standard error of every Wine process stays open as long as any process it started, so it goes to a file, never to a pipe.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pyte

ROOT = Path(__file__).resolve().parents[1]
DOORS = ("run_optimized_training.py", "optimized_train.py", "memory_optimizer.py", "start_training.bat")
PARTS = ("client", "launcher", "trainerd", "pyproject.toml", *DOORS)
COLUMNS, LINES = 100, 40


class WindowsComputer:
    """A checkout in an awkwardly named folder, with a complete environment, as the launcher would have made it."""

    def __init__(self, prefix: Path, folder: Path) -> None:
        self.prefix, self.folder = prefix, folder
        self.windows: list[Console] = []
        self.checkout = folder / "my trainer (1) ü"
        self.checkout.mkdir()
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, self.checkout / part)  # what is compiled already, too
            else:
                shutil.copy(source, self.checkout)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("TRAINERD_", "PYTEST_"))},
            "WINPY_ROOT": str(prefix), "TRAINERD_STATE": windows_path(folder / "state"), "OMP_NUM_THREADS": "1",
            "TRAINERD_AUTOSTART": "off",
        }  # fmt: skip
        self._imitate_environment()

    def _imitate_environment(self) -> None:
        """Wine's Python has no pip and no launcher for environments: the parts are put together by hand, the stamp is the real one."""
        scripts = self.checkout / ".venv" / "Scripts"
        scripts.mkdir(parents=True)
        base = self.prefix / "prefix" / "drive_c" / "Python"
        for file in (base / "python.exe", *base.glob("*.dll")):
            shutil.copy(file, scripts)
        (scripts.parent / "pyvenv.cfg").write_text("home = C:\\Python\ninclude-system-site-packages = true\n", "ascii")
        stamping = "from launcher import stamp; stamp.write('.venv', [], 'torch')"
        done = self.wine("C:\\Python\\python.exe", "-c", stamping)
        assert done.returncode == 0, done.stderr

    def wine(self, *words: str, timeout: float = 120, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a Windows program without a console; stderr is read when it has ended."""
        told = self.folder / "stderr"
        with open(told, "wb") as errors:
            done = subprocess.run(
                [self.prefix / "winrun", "wine", *words],
                cwd=self.checkout, env={**self.environment, **extra}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                timeout=timeout, check=False,
            )  # fmt: skip
        said = done.stdout.decode("utf-8", "replace").replace("\r\n", "\n")
        return subprocess.CompletedProcess(done.args, done.returncode, said, told.read_text("utf-8", "replace"))

    def types(self, *words: str, timeout: float = 120, **extra: str) -> subprocess.CompletedProcess[str]:
        """start_training.bat with words behind it, in cmd.exe."""
        return self.wine("cmd", "/c", "start_training.bat", *words, timeout=timeout, **extra)

    def opens_window(self, *words: str, **extra: str) -> Console:
        """start_training.bat in a console window, as a double-click opens it."""
        command = [str(self.prefix / "winrun"), "wine", "cmd", "/c", "start_training.bat", *words]
        self.windows.append(Console(command, self.checkout, {**self.environment, **extra}))
        return self.windows[-1]

    def kills(self, pid: int) -> None:
        """What Task Manager's "End task" does."""
        done = self.wine("taskkill", "/F", "/PID", str(pid))
        assert done.returncode == 0, done.stdout + done.stderr

    def sees(self) -> dict[str, Any]:
        """The status file as it is now; empty when there is none yet."""
        try:
            document: dict[str, Any] = json.loads((self.checkout / "training_status.json").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return document

    def waits_for(self, condition: Callable[[dict[str, Any]], Any], what: str, seconds: float = 120) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not condition(seen := self.sees()):
            assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s: {seen}\n{self.log()}"
            time.sleep(0.05)
        return seen

    def waits_for_step(self, step: int) -> dict[str, Any]:
        return self.waits_for(lambda seen: ((seen.get("progress") or {}).get("step") or 0) >= step or _ended(seen), f"step {step}")

    def waits_for_state(self, state: str, seconds: float = 120) -> dict[str, Any]:
        seen = self.waits_for(lambda seen: seen.get("state") == state or _ended(seen), f"state {state}", seconds)
        assert seen["state"] == state, f"{seen['state']}: {seen['reason']}\n{self.log()}"
        return seen

    def log(self) -> str:
        logs = sorted((self.checkout / "training_logs").glob("*.log"))
        return "\n".join(path.read_text("utf-8", "replace")[-2000:] for path in logs)

    def is_left_by_all(self, seconds: float = 20) -> None:
        """Wait until no Python of ours runs any more."""
        deadline = time.monotonic() + seconds
        while not self.nobody_is_left():
            assert time.monotonic() < deadline, self.wine("tasklist").stdout
            time.sleep(0.1)

    def nobody_is_left(self) -> bool:
        return "python" not in self.wine("tasklist").stdout.lower()


def _ended(seen: dict[str, Any]) -> bool:
    return seen.get("state") in ("completed", "failed", "stopped")


class Console:
    """A console window: keys go in, the screen is looked at."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._stream = pyte.ByteStream(self._screen)
        self._child = pexpect.spawn(command[0], command[1:], cwd=str(folder), env=environment, dimensions=(LINES, COLUMNS), timeout=None)

    def types(self, text: str) -> None:
        self._child.send(text + "\r")

    def shows(self, *texts: str, seconds: float = 60) -> str:
        """Wait until all of these are on the screen; the screen's text."""
        deadline = time.monotonic() + seconds
        while True:
            shown = "\n".join(line.rstrip() for line in self._screen.display).strip()
            if all(text in shown for text in texts):
                return shown
            assert time.monotonic() < deadline, f"{texts} not on the screen within {seconds:g} s:\n{shown}"
            try:
                self._stream.feed(self._child.read_nonblocking(65536, timeout=0.1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                shown = "\n".join(line.rstrip() for line in self._screen.display)
                assert all(text in shown for text in texts), f"the window closed without {texts}:\n{shown}"
                return shown

    def exit_code(self, seconds: float = 30) -> int | None:
        """How the program in the window ended, waited for."""
        deadline = time.monotonic() + seconds
        while self._child.isalive():
            assert time.monotonic() < deadline, "the window stays open:\n" + "\n".join(self._screen.display)
            try:
                self._child.read_nonblocking(65536, timeout=0.1)
            except (pexpect.TIMEOUT, pexpect.EOF):
                time.sleep(0.02)
        return self._child.exitstatus

    def closes(self) -> None:
        """The cross in the window's corner."""
        self._child.close(force=True)


def windows_path(path: Path) -> str:
    return "Z:" + str(path).replace("/", "\\")
