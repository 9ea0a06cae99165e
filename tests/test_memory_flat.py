"""A long training's RAM does not grow: shapes that vary, evaluations, checkpoints, and the allocator's holes come to rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainerd.engine.process import CACHES

_CODE = """
import json, sys
from pathlib import Path

import psutil

from trainerd.engine import arenas
from trainerd.memory import heap

arenas.hold(heap.GIVEN_BACK)
from trainerd.config.model import DataConfig, RunConfig
from trainerd.contract import wire
from trainerd.engine.loop import Link
from trainerd.engine.trainer import Trainer
from trainerd.tasks.cadence.settings import DEFAULTS
from trainerd.tasks.cadence.task import CadenceTask

steps, precision = int(sys.argv[2]), sys.argv[3]
process, seen = psutil.Process(), []


class Watching(Link):
    def send(self, event, **fields):
        if event == wire.PROGRESS:
            seen.append((fields["step"], process.memory_info().rss))


settings = {"gru": {"hidden": 64, "word_embedding": 48, "category_embedding": 16}, "eval_prefixes": 4}
train = {**DEFAULTS["train"], "batch_size": 32, "epochs": 1000, "max_steps": steps, "threads": 1, "precision": precision}
train["eval_every_steps"] = 100
config = RunConfig(data=DataConfig(size=3000), settings=settings, train=train, checkpoint={"every_steps": 50, "exact": True})
Trainer(CadenceTask(settings), config, home=Path(sys.argv[1]), run="run", link=Watching()).train()
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="the C library's heap is looked at")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_long_training_stays_as_large_as_it_was(precision: str, tmp_path: Path) -> None:
    """After the first quarter, 2,000 steps of rows of any length with 20 evaluations and 40 checkpoints add less than 2 % and 8 MB, with
    the limits a trainer's process sets for what is kept compiled."""
    steps = int(os.environ.get("TRAINERD_FLAT_STEPS", "2000"))
    command = [sys.executable, "-c", _CODE, str(tmp_path), str(steps), precision]
    environment = {**os.environ, **CACHES, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    seen = json.loads(done.stdout.splitlines()[-1])
    early = max(rss for step, rss in seen if step <= steps // 4)
    late = max(rss for step, rss in seen if step > steps * 3 // 4)
    print(f"\n{precision}: {early / 1e6:.0f} MB in the first quarter, {late / 1e6:.0f} MB in the last, {steps} steps")
    assert late <= early * 1.02 + 8e6
