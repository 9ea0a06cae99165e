"""A run of the small task in a home: its record, its configuration, its copy of the task's file. Must not start anything."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainerd.config.model import RunConfig
from trainerd.contract import clock, files, runs
from trainerd.contract.paths import Home, RunPaths

TASK_FILE = Path(__file__).with_name("small_task.py")
TASK = f"{TASK_FILE.name}:Small"
BATCH_SIZE = 8
KEEP = 3
# Saved this often, a small run is inside a commit for most of its time.
EVERY_STEPS = 4


def config(seed: int, *, epochs: int = 100, precision: str = "fp32") -> RunConfig:
    """Accumulation, a schedule, evaluations and a best checkpoint: whatever a resume could get wrong."""
    train: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH_SIZE, "micro_batch": BATCH_SIZE // 2, "precision": precision}
    train |= {"lr": 0.01, "warmup_steps": 5, "eval_every_steps": 10, "threads": 1}
    checkpoint = {"every_steps": EVERY_STEPS, "exact": True, "keep": KEEP}
    polite = {"priority": "normal"}  # somebody is waiting for it
    return RunConfig.model_validate({"task": TASK, "seed": seed, "train": train, "checkpoint": checkpoint, "polite": polite})


def begin(home: Home, name: str, wanted: RunConfig) -> RunPaths:
    """Record the run as a supervisor would, and copy the task's file into it."""
    paths = home.run(name)
    files.make_folder(paths.task)
    shutil.copyfile(TASK_FILE, paths.task / TASK_FILE.name)
    document = wanted.model_dump(mode="json")
    runs.write(home, runs.RunRecord(id=name, task=TASK, created_at=clock.wall(), config=document, identity={}))
    return paths


def remove(paths: RunPaths) -> None:
    """A run that has been compared is of no further use."""
    for folder in (paths.folder, paths.checkpoints, paths.model):
        shutil.rmtree(folder, ignore_errors=True)
