"""A person at a terminal, for tests: types commands, waits for what they can see, looks at the disk. Never sleeps for luck."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainerd.contract import lock, requests, runs, status
from trainerd.contract.paths import Home

ROOT = Path(__file__).resolve().parents[1]
DOOR = ROOT / "run_optimized_training.py"
# The checkout's script, or the installed command that TRAINERD_TEST_COMMAND names.
_COMMAND = [os.environ["TRAINERD_TEST_COMMAND"]] if "TRAINERD_TEST_COMMAND" in os.environ else [sys.executable, str(DOOR)]

# Small enough that a run takes seconds after torch's import, real enough to have every part.
SMALL = (
    "--dataset-size", "2000", "--epochs", "12",
    "--set", "train.batch_size=64", "--set", "settings.vocabulary=2000", "--set", "settings.gru.hidden=96",
    "--set", "settings.eval_prefixes=4", "--set", "settings.min_frequency=1",
    "--set", "polite.priority=normal", "--set", "checkpoint.every_steps=10", "--set", "checkpoint.exact=true", "--set", "train.threads=1",
)  # fmt: skip

# A task of one's own for tests of everything but training: it prepares nothing, and its steps leave the processor to others.
OWN_TASK = """
import time
import torch
from torch import nn
from trainerd.engine.task import Task

class Data:
    def __len__(self): return 320
    def __getitem__(self, i): return {"x": torch.tensor([float(i % 7), float(i % 5)]), "y": i % 2}

class Mine(Task):
    def model(self): return nn.Linear(2, 2)
    def dataset(self, split): return Data()
    def counts(self, batch): return {"loss": len(batch["y"])}
    def loss(self, model, batch, ctx):
        time.sleep(0.01)
        return {"loss": (nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), 1.0)}, {}
"""
FOR_LONG = ("--epochs", "100000")


def own_task(folder: Path) -> tuple[str, ...]:
    """The words that train it until somebody ends it."""
    file = folder / "mine.py"
    file.write_text(OWN_TASK, encoding="utf-8")
    settings = ("polite.priority=normal", "checkpoint.every_steps=10", "checkpoint.exact=true", "train.threads=1")
    return ("--task", f"{file}:Mine", *FOR_LONG, *(word for setting in settings for word in ("--set", setting)))


class Person:
    """One home, and what its owner does with it."""

    def __init__(self, root: Path, state: Path | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.home = Home(root)
        # A state folder of its own: tests must not wait for each other's device lock.
        self.environment = {**os.environ, "TRAINERD_STATE": str(state or root / "state"), "OMP_NUM_THREADS": "1"}
        self.environment.setdefault("TRAINERD_AUTOSTART", "off")
        self.environment.pop("TRAINERD_HOME", None)

    def types(self, *words: str, timeout: float = 280, given: str | None = None) -> subprocess.CompletedProcess[str]:
        if words[:1] == ("start",) and not any("polite.priority" in word for word in words):
            words = (*words, "--set", "polite.priority=normal")  # or the tests beside it would be the work it steps back for
        command = [*_COMMAND, "--home", str(self.home.root), *words]
        return subprocess.run(
            command, input=given, capture_output=True, text=True, encoding="utf-8", timeout=timeout, env=self.environment, check=False
        )

    def starts(self, *words: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.types("start", *words)
        assert done.returncode == expect, f"start ended {done.returncode}: {done.stdout}{done.stderr}\n{self.log()}"
        return done

    def sees(self) -> status.Reading:
        return status.read(self.home)

    def waits_for(self, condition: Callable[[status.Reading], Any], seconds: float = 120, what: str = "the condition") -> status.Reading:
        deadline = time.monotonic() + seconds
        while True:
            reading = self.sees()
            if condition(reading):
                return reading
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not come within {seconds:g} s; last: {reading.state}: {reading.reason}\n{self.log()}")
            time.sleep(0.02)

    def waits_for_state(self, *states: str, seconds: float = 180) -> status.Reading:
        return self.waits_for(lambda reading: reading.state in states, seconds, f"state {' or '.join(states)}")

    def waits_for_step(self, step: int, seconds: float = 120) -> status.Reading:
        return self.waits_for(
            lambda reading: reading.state in status.END_STATES or (reading.status and (reading.status.progress.step or 0) >= step),
            seconds,
            f"step {step}",
        )

    def waits_until_gone(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while lock.is_held(self.home.supervisor_lock) or lock.is_held(self.home.trainer_lock):
            assert time.monotonic() < deadline, f"somebody is left in {self.home.root}"
            time.sleep(0.02)

    def kills(self, pid: int | None) -> bool:
        """kill -9; False when there was nothing left to kill."""
        if not pid:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def run(self) -> str:
        found = runs.names(self.home)
        assert found, "no run was recorded"
        return found[-1]

    def metrics(self, run: str | None = None) -> list[dict[str, Any]]:
        path = self.home.run(run or self.run()).metrics
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]

    def steps(self, run: str | None = None) -> list[tuple[int, float]]:
        """(step, loss) of every step in the committed history."""
        return [(row["step"], row["loss"]) for row in self.metrics(run) if "loss" in row]

    def weights(self, run: str | None = None) -> bytes:
        return (self.home.run(run or self.run()).model / "model.safetensors").read_bytes()

    def events(self, run: str | None = None) -> list[dict[str, Any]]:
        path = self.home.run(run or self.run()).events
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    def log(self, characters: int = 3000) -> str:
        logs = sorted(self.home.logs.glob("*.log"))
        return logs[-1].read_text("utf-8", "replace")[-characters:] if logs else "(no log)"

    def asks(self, verb: str, **arguments: Any) -> Path:
        reading = self.sees()
        assert reading.status and reading.status.supervisor
        return requests.send(self.home, requests.Request(verb, reading.status.supervisor.instance, arguments))

    def leaves(self) -> None:
        """End whatever is left, for a test's own tidying up."""
        if lock.is_held(self.home.supervisor_lock):
            self.types("stop", "--now")
        reading = self.sees()
        if reading.status and reading.alive and reading.status.supervisor:
            self.kills(reading.status.supervisor.pid)
