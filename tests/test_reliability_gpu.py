"""What only a GPU can tell of reliability: whether it is bit-exact, and a device that goes and comes back. Skipped without one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.person import Person
from tests.trainers import RunningTrainer, new_run, outcome, steps_of
from trainerd.contract import runs, wire
from trainerd.contract.errors import DeviceLost

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
    pytest.mark.timeout(600),
]


def test_the_selftest_says_whether_this_gpu_is_bit_exact(tmp_path: Path) -> None:
    """Killed on the GPU too: nothing is lost, and the verdict names the GPU and says yes, or no with the operation that is to blame."""
    person = Person(tmp_path / "home")
    done = person.types("selftest", "--kills", "4", "--seed", "1", "--json", timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    gpu = json.loads(done.stdout)["gpu"]
    assert gpu["tested"] and gpu["problem"] is None and gpu["kills"] == 4 and gpu["name"] in torch.cuda.get_device_name(0)
    print(f"\n{gpu['name']}: bit-exact {gpu['bit_exact']}, {gpu['why'] or 'every kill came to the same bits'}")
    assert gpu["bit_exact"] or gpu["why"]


def test_a_gpu_that_goes_and_comes_back(tmp_path: Path) -> None:
    """Planned on the GPU, then none answers: DeviceLost, not a step; with the GPU again it goes on to what it would have been."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    whole = new_run(tmp_path / "whole")
    assert RunningTrainer(whole, CUDA_VISIBLE_DEVICES=shown).exit_code() == wire.EXIT_FINISHED
    paths = new_run(tmp_path / "lost")
    trainer = RunningTrainer(paths, CUDA_VISIBLE_DEVICES=shown, TINY_PAUSE="0.02")
    trainer.wait_for_step(12)
    plan = trainer.of(wire.PLAN)[0]
    assert plan["device"].startswith("cuda"), plan
    assert trainer.leave() == wire.EXIT_LEFT
    record = runs.read(paths.home, paths.name)
    record.plan = plan["record"]  # as the supervisor would have
    runs.write(paths.home, record)
    before = steps_of(paths)
    gone = RunningTrainer(paths, CUDA_VISIBLE_DEVICES="")
    assert gone.exit_code() == 1
    assert gone.of(wire.EXCEPTION)[0]["type"] == DeviceLost.__name__ and gone.of(wire.PROGRESS) == []
    assert steps_of(paths) == before
    back = RunningTrainer(paths, CUDA_VISIBLE_DEVICES=shown)
    assert back.exit_code() == wire.EXIT_FINISHED
    if back.of(wire.EXACT)[-1]["now"]:
        assert outcome(paths) == outcome(whole)
