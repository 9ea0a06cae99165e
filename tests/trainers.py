"""Real trainers for tests: a tiny task in a file, a run in a home, and a process driven through its pipes. No tests here."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainerd.config.model import RunConfig
from trainerd.contract import interpreter, runs, wire
from trainerd.contract.paths import Home, RunPaths
from trainerd.memory import heap

TASK = '''
"""A task that learns a sum; TINY_PAUSE slows its steps, TINY_FAIL breaks it. It prepares nothing: that is a process, and one more torch."""
import os, time
import torch
from pydantic import BaseModel
from torch import nn
from trainerd.contract.errors import UsageError
from trainerd.engine.task import Task

class Settings(BaseModel):
    rows: int = 96

class Tiny(Task):
    Settings = Settings

    def model(self):
        if os.environ.get("TINY_FAIL") == "model":
            raise TypeError("this model is wrong")
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))

    def dataset(self, split):
        x = self.inputs(self.ctx.seed)
        return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)) if split == "train" else None

    def inputs(self, seed):
        return torch.randn(self.settings.rows, 4, generator=torch.Generator().manual_seed(seed))

    def counts(self, batch):
        return {"loss": len(batch[1])}

    def loss(self, model, batch, ctx):
        print("a stray print")
        time.sleep(float(os.environ.get("TINY_PAUSE", "0")))
        if os.environ.get("TINY_FAIL") == "step" and ctx.step >= 12:
            raise KeyError("in the middle of training")
        x, y = batch
        if os.environ.get("TINY_FAIL") == "first step":
            x = x[:, :3]
        return {"loss": (nn.functional.mse_loss(model(x), y, reduction="sum"), 1.0)}, {}
'''
PREPARING = f'''{TASK}
class Prepares(Tiny):
    """The same of data that are prepared; TINY_PREPARE slows that."""

    def prepare(self, ctx):
        print("preparing", os.getpid(), flush=True)
        if os.environ.get("TINY_FAIL") == "prepare":
            raise UsageError("The data is of no use.")
        for number in range(int(os.environ.get("TINY_PREPARE", "0")) + 1):
            ctx.progress(number, None, "rows")
            time.sleep(0.01 if number else 0)
        torch.save(super().inputs(ctx.seed), ctx.cache_dir / "x.pt")
        ctx.report_data(self.settings.rows + 3, self.settings.rows, {{"blank": 3}})

    def inputs(self, seed):
        return torch.load(self.ctx.cache_dir / "x.pt")
'''
PREPARED = {"source": PREPARING, "class_name": "Prepares"}


def new_run(root: Path, name: str = "run", source: str = TASK, class_name: str = "Tiny", **config: Any) -> RunPaths:
    """A run as the supervisor leaves it for its trainer: run.json and the copy of the task file."""
    train = {"epochs": 5, "batch_size": 8, "micro_batch": 4, "threads": 1, "precision": "fp32", **config.pop("train", {})}
    checkpoint = {"every_steps": 5, "exact": True, **config.pop("checkpoint", {})}
    polite = {"priority": "normal"}  # the tests' machine is busy, and idle priority would wait for all of it
    whole = RunConfig(task=f"/somewhere/tiny_task.py:{class_name}", train=train, checkpoint=checkpoint, polite=polite, **config)
    home = Home(root)
    paths = home.run(name)
    paths.task.mkdir(parents=True)
    (paths.task / "tiny_task.py").write_text(source, encoding="utf-8")
    runs.write(home, runs.RunRecord(name, whole.task, time.time(), whole.model_dump(mode="json"), {"data": {"kind": "own"}}))
    return paths


class RunningTrainer:
    """A trainer process with somebody at both pipes. `events` grows while it runs; its log is beside the run."""

    def __init__(
        self, paths: RunPaths, *, state: Path | None = None, read: bool = True, before_step: int | None = None, **environment: str
    ) -> None:
        self.paths = paths
        self.events: list[dict[str, Any]] = []
        state = state or paths.home.root / "state"
        base = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRAINERD_STATE": str(state)}
        base |= {heap.TUNABLES: heap.tunables(os.environ.get(heap.TUNABLES)), **environment}  # as the supervisor does
        words = ["--home", str(paths.home.root), "--run", paths.name]
        words += [] if before_step is None else ["--before-step", str(before_step)]
        self.log = paths.folder / "trainer.log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                interpreter.command("trainerd.engine", *words),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=interpreter.environment(base),
                cwd=paths.folder,
            )
        self._reading = threading.Thread(target=self._read, daemon=True)
        if read:
            self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = wire.decode(line)
            assert message is not None, f"not an event: {line!r}"
            self.events.append(message)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [message for message in list(self.events) if message["event"] == event]

    def wait_for(self, event: str, such: Callable[[dict[str, Any]], bool] = lambda message: True, seconds: float = 60) -> dict[str, Any]:
        """The first event of that kind that is such."""
        deadline = time.monotonic() + seconds
        while True:
            found = next((message for message in self.of(event) if such(message)), None)
            if found is not None:
                return found
            assert time.monotonic() < deadline and self.process.poll() is None, f"no {event}: {self.events[-5:]}\n{self.text()[-3000:]}"
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> dict[str, Any]:
        return self.wait_for(wire.PROGRESS, lambda message: message["step"] >= step)

    def command(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(wire.encode(command))
        self.process.stdin.flush()

    def leave(self) -> int:
        self.command(do=wire.LEAVE, why="stop", save=True)
        return self.exit_code()

    def kill(self) -> None:
        self.process.kill()
        self.exit_code()

    def exit_code(self, seconds: float = 60) -> int:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it did not end: {self.text()[-3000:]}") from None
        if self._reading.ident is not None:
            self._reading.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:
                pass  # what was not read before it died
        return code

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def steps_of(paths: RunPaths) -> list[dict[str, Any]]:
    """What metrics.jsonl says of each step, without the times."""
    lines = [json.loads(line) for line in paths.metrics.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "t"} for line in lines]


def outcome(paths: RunPaths) -> tuple[list[dict[str, Any]], bytes]:
    """What must be the same, whatever happened on the way: every step's numbers, and the model to the last bit."""
    return steps_of(paths), (paths.model / "model.safetensors").read_bytes()


def killed_and_ended(paths: RunPaths, seconds: float) -> tuple[list[dict[str, Any]], bytes]:
    """kill -9 in the midst of a run, after a checkpoint, and another trainer that brings it to its end; what comes out."""
    trainer = RunningTrainer(paths, TINY_PAUSE="0.01")
    trainer.wait_for(wire.PROGRESS, lambda message: message["step"] >= 12, seconds)
    trainer.kill()
    assert 0 < newest_step(paths) < 60
    last = RunningTrainer(paths)
    assert last.exit_code(seconds) == 0, last.text()[-3000:]
    return outcome(paths)


def newest_step(paths: RunPaths) -> int:
    """The newest committed checkpoint."""
    return max((int(path.stem.rpartition("_")[2]) for path in paths.checkpoints.glob("checkpoint_*.json")), default=0)
