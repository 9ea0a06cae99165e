"""A kill at every single file operation of a trainer's life, from its start to the last file of the export, and of a supervisor's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns import size

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def die_at(program: str, folder: Path, every: int, share: float = 0.95) -> tuple[int, int]:
    """(points died at, points in all) of all the kinds of life that a program here goes through."""
    command = [sys.executable, "-m", f"tests.campaigns.{program}", str(folder), str(every)]
    single = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}  # or it could not fork
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **single}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    points, reached = (sum(numbers) for numbers in zip(*found.values(), strict=True))
    # metrics.jsonl and the status are written a few times a second, so a quicker life has fewer of those writes.
    assert reached >= share * points, found
    return reached, points


def test_a_kill_at_some_operations(tmp_path: Path) -> None:
    """Every 300th point of lives that finish, begin with damage, or are asked to leave: the next life goes on from what was
    acknowledged, and ends with the same bits and the same files."""
    assert die_at("every_operation", tmp_path / "home", 300)[0] > 8


def test_a_kill_at_some_operations_of_a_supervisor(tmp_path: Path) -> None:
    """Every 60th point: what was answered stands on the disk, everything there can be read, and the next start goes on to the end."""
    assert die_at("supervisor_operations", tmp_path / "home", 60, share=0.5)[0] > 3


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_kill_at_every_operation(tmp_path: Path) -> None:
    """Before and after each operation, and half way through each write."""
    reached, points = die_at("every_operation", tmp_path / "home", size.of("OPERATIONS_EVERY", 1))
    size.tell(f"every file operation of a life: killed at {reached} of {points} points: nothing lost, all identical")


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_kill_at_every_operation_of_a_supervisor(tmp_path: Path) -> None:
    """The same for run.json, config.yml, the copy of the task, the status, events, locks, logs, requests and the ballast."""
    reached, points = die_at("supervisor_operations", tmp_path / "home", size.of("OPERATIONS_EVERY", 1), share=0.8)
    size.tell(f"every file operation of a supervisor: killed at {reached} of {points} points: nothing lost, every run goes on to its end")
