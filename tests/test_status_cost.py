"""`status` in a tenth of a second: the CPU time of fresh processes, beside a live supervisor. Wall time would only measure the machine."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.supervised import Daemon
from trainerd.contract.paths import Home

DOOR = Path(__file__).resolve().parents[1] / "run_optimized_training.py"


@pytest.mark.skipif(sys.platform == "win32", reason="needs getrusage")
@pytest.mark.slow  # a time, so not for a machine on which other tests run
def test_status_takes_at_most_70_ms_of_cpu(home: Home) -> None:
    """Median of 20 fresh processes while a training goes on."""
    import resource

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, str(DOOR), "--home", str(home.root), "status"], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stdout + done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    with Daemon(home, {"steps": 1000, "pause": 0.05}) as daemon:
        daemon.until(lambda r: r.status and r.status.progress.step)
        taken = statistics.median(seconds() for _ in range(20))
    assert taken <= 0.070, f"{taken * 1000:.0f} ms of CPU"


def test_status_loads_nothing_it_does_not_need(home: Home) -> None:
    """What its tenth of a second would go to is never imported: command line, configuration, colours, hashes, temporary files."""
    command = [sys.executable, "-X", "importtime", str(DOOR), "--home", str(home.root), "status"]
    told = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False).stderr
    loaded = {line.rpartition("|")[2].strip() for line in told.splitlines() if line.startswith("import time:")}
    assert "trainerd.contract.status" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "click", "rich", "psutil", "watchdog", "platformdirs", "hashlib", "tempfile"}
