"""A home that was copied elsewhere resumes; on another machine it says that it is not exact any more. Nothing is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.person import Person, own_task
from tests.toy import LEAVE, Script
from trainerd.contract import status
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


ELSEWHERE = [{"processor": "AVX1024"}, {"processor_name": "Another 9000"}, {"torch": "9.9.9"}, {"device": "NVIDIA GeForce RTX 3050"}]


@pytest.mark.parametrize("facts", [{}, *ELSEWHERE], ids=str)
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


def test_a_copied_home_goes_on_through_the_command(tmp_path: Path) -> None:
    """Stopped here, copied to a machine whose processor can less, and taken up there with `resume`: the status says what is different,
    and since which step the last bits are not promised; the original is untouched."""
    here = Person(tmp_path / "here")
    there = Person(tmp_path / "ein anderer Ort" / "home")
    there.environment["ATEN_CPU_CAPABILITY"] = "default"  # as a processor without AVX
    try:
        here.starts(*own_task(tmp_path))
        here.waits_for_step(12)
        assert here.types("stop").returncode == 0
        before = here.waits_for_state(status.STOPPED).status
        assert before is not None and before.checkpoint is not None and before.exact.now is True
        shutil.copytree(here.home.root, there.home.root, dirs_exist_ok=True)
        kept = here.home.run(here.run()).record.read_bytes()
        done = there.types("resume")
        assert done.returncode == 0, done.stderr
        after = there.waits_for_step(before.checkpoint.step + 3).status
        assert after is not None and after.state == status.RUNNING, there.log()
        assert after.home == str(there.home.root) and after.run == before.run
        assert after.exact.now is False and after.exact.since_step == before.checkpoint.step + 1
        assert "processor " in str(after.exact.because) and "-> DEFAULT" in str(after.exact.because)
        shown = there.types("status").stdout
        assert "not to the last bit since step" in shown and "DEFAULT" in shown, shown
        assert here.home.run(here.run()).record.read_bytes() == kept
    finally:
        here.leaves()
        there.leaves()
