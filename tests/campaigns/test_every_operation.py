"""A kill at every single file operation of a trainer's life, from its start to the last file of the export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns import size

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def die_at(folder: Path, every: int) -> tuple[int, int]:
    """(points died at, points in all) of a fresh run and of one whose newest two checkpoints are damaged."""
    command = [sys.executable, "-m", "tests.campaigns.every_operation", str(folder), str(every)]
    single = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}  # or it could not fork
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **single}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    points, reached = (sum(numbers) for numbers in zip(found["fresh"], found["damaged"], strict=True))
    # metrics.jsonl is written a few times a second, so a quicker life has fewer of those writes.
    assert reached >= 0.95 * points, found
    return reached, points


def test_a_kill_at_some_operations(tmp_path: Path) -> None:
    """Every 300th point: the next life goes on from what was acknowledged, and ends with the same bits and the same files."""
    assert die_at(tmp_path / "home", 300)[0] > 6


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_kill_at_every_operation(tmp_path: Path) -> None:
    """Before and after each operation, and half way through each write."""
    reached, points = die_at(tmp_path / "home", size.of("OPERATIONS_EVERY", 1))
    size.tell(f"every file operation of a life: killed at {reached} of {points} points: nothing lost, all identical")
