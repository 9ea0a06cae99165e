"""The real engine hangs, loses its device or its numbers, under a real supervisor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.hangs import HANGS, events, hang_once, supervisor_of
from tests.trainers import TASK, RunningTrainer, new_run
from trainerd.contract import phases, runs, status, wire
from trainerd.supervisor import death

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals; tests/windows has its own")
_IN_STACK = {"lock": "in loss", "sleep": "in loss", "stopped": "in loss", "save": "tiny_task.py", "worker": "in window"}


@pytest.fixture(autouse=True)
def own_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINERD_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# Quick are those that neither hold a processor for as long as they hang, nor wait for one more process to import torch.
QUICK = ("save", "sleep", "stopped")


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=pytest.mark.slow) for way in HANGS])
def test_a_training_that_hangs_is_found_named_and_finished(tmp_path: Path, way: str) -> None:
    """In a step, holding the interpreter's lock, stopped, in the saving thread, in a loader worker: found, its stack kept, finished."""
    found = hang_once(tmp_path, way)
    assert found.result == status.COMPLETED
    # A process that stands still as a whole may have been saving beside its step.
    either = {phases.TRAINING, phases.CHECKPOINTING}
    may_be = {"save": {phases.CHECKPOINTING}, "stopped": either, "lock": either}.get(way, {phases.TRAINING})
    assert found.phase in may_be
    assert found.limit_seconds <= found.silent_seconds <= found.limit_seconds + 10.0
    assert _IN_STACK[way] in found.stack


def test_a_run_planned_for_a_gpu_that_is_gone_waits_and_never_goes_on_on_the_cpu(tmp_path: Path) -> None:
    """The recorded plan says cuda and none answers: DeviceLost, no step, no other plan."""
    paths = new_run(tmp_path)
    record = runs.read(paths.home, paths.name)
    plan = {"device": "cuda:0", "precision": "fp32", "threads": 1, "num_workers": 0, "deterministic": "auto", "optimizer": "adamw"}
    record.plan = {**plan, "effective_batch": 8, "micro_batch": 4, "grad_accum": 2}
    runs.write(paths.home, record)
    trainer = RunningTrainer(paths)
    assert trainer.exit_code() == 1
    (told,) = trainer.of(wire.EXCEPTION)
    assert (told["type"], told["permanent"]) == ("DeviceLost", False) and "cuda:0" in told["text"]
    assert trainer.of(wire.PROGRESS) == []
    assert death.explain(1, told, "").device_lost


_DIVERGES = TASK.replace('return {"loss": (nn.', 'return {"loss": ((float("nan") if ctx.step >= 12 else 1.0) * nn.')


def test_numbers_that_go_bad_at_the_same_step_twice_end_the_run_with_the_batch_named(tmp_path: Path) -> None:
    """The newest good checkpoint once; then `failed`, with step and samples; what is saved is good."""
    paths = new_run(tmp_path, source=_DIVERGES)
    supervisor = supervisor_of(paths)
    assert supervisor.run() == status.FAILED
    reason = supervisor.report.status.reason
    assert "the second time at the same step: The loss is not a finite number any more at step 13 (epoch 2, samples " in reason
    told = events(paths)
    assert [event["kind"] for event in told].count("trainer started") == 2
    bad = [event for event in told if event["kind"] == "not finite"]
    assert len(bad) == 2 and bad[0]["samples"] == bad[1]["samples"] and len(bad[0]["samples"]) == 8
    assert max(int(path.stem.rpartition("_")[2]) for path in paths.checkpoints.glob("checkpoint_*.json")) <= 12
