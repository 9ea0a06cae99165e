"""Stacks of a process that holds the interpreter's lock and never gives it back."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOMB = "re.match(r'(a+)+$', 'a' * 64 + 'b')"


def runs(tmp_path: Path, program: str, seconds: float, until: str = "no such words") -> tuple[int | None, str]:
    """(exit code, None: it went on and had to be killed; what it wrote to its log). `until` it has written this, if that is sooner."""
    log = tmp_path / "log"
    with open(log, "wb") as file:
        words = [sys.executable, "-c", f"import re\nfrom trainerd.engine import dumps\n{program}"]
        started = subprocess.Popen(words, cwd=ROOT, stderr=file)
        code: int | None = None
        deadline, told = time.monotonic() + seconds, False
        while code is None and not told and time.monotonic() < deadline:
            told = until in log.read_text("utf-8", "replace")
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = started.wait(0.5)  # so long it goes on after it has told
        started.kill()
        started.wait()
    return code, log.read_text("utf-8", "replace")


def test_a_hung_trainer_nobody_watches_any_more_ends_itself(tmp_path: Path) -> None:
    """The supervisor is gone, and the training thread never comes back: after its limit it leaves its stacks, and is gone."""
    program = f"def training(): {BOMB}\ndumps.abandoned('training')\ndumps.wind_up('training', {{'hang': 1}})\ntraining()"
    code, log = runs(tmp_path, program, 20)
    assert code == 1 and "Timeout (0:00:01)!" in log and "in training" in log


@pytest.mark.skipif(sys.platform != "win32", reason="elsewhere a signal does it")
def test_on_windows_a_timer_leaves_the_stacks(tmp_path: Path) -> None:
    """Wound up with every sign of life; when they stop, the stacks are in the log, and the process goes on."""
    program = f"def training(): {BOMB}\ndumps.wind_up('training', {{'hang': 30}})\ndumps.wind_up('training', {{'hang': 1}})\ntraining()"
    code, log = runs(tmp_path, program, 20, until="in training")
    assert code is None and "in training" in log
