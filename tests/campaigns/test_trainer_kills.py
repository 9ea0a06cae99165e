"""Thousands of random SIGKILLs of the real trainer on real files, through the selftest's own fork server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns import size


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_thousands_of_kills_lose_nothing(tmp_path: Path) -> None:
    """5,000 kills over three seeds, at least a quarter of them inside a commit: nothing lost, every result identical."""
    kills = size.of("KILLS", 5000)
    words = ["--home", str(tmp_path), "--kills", str(kills), "--seed", str(size.of("SEED", 11))]
    command = [sys.executable, "-m", "trainerd.engine.selftest", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = [json.loads(line) for line in process.stdout][-1]
    inside = found["inside_commit"] / max(1, found["kills"])
    size.tell(
        f"fork server: {found['kills']} kills ({inside:.0%} inside a commit, "
        f"{found['at_start']} before the training began, {found['at_end']} in the export) "
        f"in {found['runs']} runs over 3 seeds, {found['acknowledged']} checkpoints acknowledged, {found['damaged']} damaged and "
        f"{found['noticed']} noticed, {found['seconds']:.0f} s: {found['problem'] or 'nothing lost, all identical'}"
    )
    assert process.returncode == 0 and found["passed"] and found["kills"] >= kills, found
    assert inside >= 0.25 and found["damaged"] == found["noticed"] and found["runs"] >= min(3, kills // 50)
