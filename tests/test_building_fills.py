"""A model that is too large for the machine while it is being built: the trainer ends in words before the RAM is full."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import Script, Toy, config
from tests.trainers import TASK, RunningTrainer, new_run
from trainerd.contract import phases, wire
from trainerd.contract.errors import Refused
from trainerd.engine import filling
from trainerd.engine.trainer import Trainer
from trainerd.machine.memory import RamFacts

GB = 1_000_000_000
# The trainer's machine has 16 GB; while its model is built, who takes them is in a file.
_BUILDING = (
    TASK
    + '''
from trainerd.engine import filling
from trainerd.machine import memory

_TAKEN = {"others": 4, "own": 1}
filling._PATIENCE_SECONDS = 1.0
memory.ram = lambda pid=None: memory.RamFacts(sum(_TAKEN.values()) * 1_000_000_000, 16_000_000_000)
filling.own_bytes = lambda: _TAKEN["own"] * 1_000_000_000

class Huge(Tiny):
    """Its model is never whole."""

    grows = "own"

    def model(self):
        _TAKEN[self.grows] += 11
        while True:
            time.sleep(0.1)

class Crowded(Huge):
    grows = "others"
'''
)


def test_a_model_that_fills_the_machine_is_refused_while_it_is_built(tmp_path: Path) -> None:
    """Within seconds, for good, in words with both numbers, although the task's model() never comes back; and the phase is not that
    of the data any more. Grown by others meanwhile: left to make room, and started again when there is some."""
    paths = new_run(tmp_path / "own", source=_BUILDING, class_name="Huge")
    trainer = RunningTrainer(paths)
    told = trainer.wait_for(wire.EXCEPTION)
    assert told["permanent"] and told["type"] == "Refused", told
    assert "building the model alone has taken 11.0 GB of RAM, and 16.0 GB are in use where" in told["text"] and len(told["text"]) <= 290
    assert trainer.exit_code() == wire.EXIT_PERMANENT
    assert [e["name"] for e in trainer.events if e["event"] == wire.PHASE][-1] == phases.STARTING

    crowded = RunningTrainer(new_run(tmp_path / "others", source=_BUILDING, class_name="Crowded"))
    assert crowded.wait_for(wire.NO_ROOM)["resource"] == "ram"
    assert crowded.exit_code() == wire.EXIT_NO_ROOM


class _Growing(Toy):
    def model(self) -> Any:
        model = super().model()
        for number in range(200):
            time.sleep(0.05)
            model.register_parameter(f"more{number}", torch.nn.Parameter(torch.zeros(1)))
        raise AssertionError("the model is whole")


def test_in_a_persons_own_process_it_ends_at_the_next_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is not ours to end: Refused is raised out of model(). A run that has trained before is not refused."""
    looks: list[int] = []

    def ram(pid: int | None = None) -> RamFacts:
        looks.append(1)
        return RamFacts((4 if len(looks) == 1 else 15) * GB, 16 * GB)

    monkeypatch.setattr(filling.memory, "ram", ram)
    monkeypatch.setattr(filling, "own_bytes", lambda: (1 if len(looks) <= 1 else 12) * GB)
    with pytest.raises(Refused, match="building the model alone"):
        Trainer(_Growing(), config(), home=tmp_path, link=Script()).train()
    assert len(looks) < 5
