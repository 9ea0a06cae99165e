"""A home that was copied elsewhere resumes; on another machine it says that it is not exact any more. Nothing is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.toy import LEAVE, Script
from trainerd.contract.paths import Home
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.selftest import oracle, small_run
from trainerd.engine.selftest.small_task import Small
from trainerd.engine.trainer import Trainer


def train(home: Path, script: Script) -> str:
    return Trainer(Small(), small_run.config(9, epochs=4), home=home, run="small", link=script).train().outcome


def as_if_written_elsewhere(home: Path, **facts: str) -> None:
    """The newest state becomes one of a machine with these facts: everything else, hashes too, is as that machine writes it."""
    folder = Home(home).run("small").checkpoints
    found = CheckpointStore(folder).load()
    assert found is not None
    state, manifest = found
    state["about"] |= facts
    for path in folder.glob(f"checkpoint_*_step_{manifest.step}.*"):
        path.unlink()
    metrics = Home(home).run("small").metrics
    CheckpointStore(folder).commit(
        state,
        epoch=manifest.epoch,
        step=manifest.step,
        best=manifest.best,
        metrics=metrics,
        metrics_bytes=manifest.metrics_bytes,
        about=state["about"],
    )


@pytest.mark.parametrize("facts", [{}, {"processor": "AVX1024"}, {"torch": "9.9.9"}, {"device": "NVIDIA GeForce RTX 3050"}], ids=str)
def test_a_copied_home_goes_on(tmp_path: Path, facts: dict[str, Any]) -> None:
    """Another path changes nothing; another processor, torch or device is named as the end of exactness, and training goes on."""
    train(tmp_path / "whole", Script())
    assert train(tmp_path / "here", Script({30: LEAVE})) == "left"
    there = tmp_path / "ein anderer Ort" / "home"
    shutil.copytree(tmp_path / "here", there)
    shutil.rmtree(tmp_path / "here")
    if facts:
        as_if_written_elsewhere(there, **facts)
    script = Script()
    assert train(there, script) == "finished"
    exact = script.of("exact")[-1]
    found, expected = (oracle.outcome(Home(home).run("small")) for home in (there, tmp_path / "whole"))
    assert [line["step"] for line in found.lines] == [line["step"] for line in expected.lines]
    if not facts:
        assert exact["now"]
        found.files = expected.files  # leaving has saved at a step of its own
        found.compare(expected)
        return
    ((name, other),) = facts.items()
    assert not exact["now"] and exact["because"].startswith("resumed with ") and f"{name} {other} -> " in exact["because"]
    assert exact["since_step"] > 1
