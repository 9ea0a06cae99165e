"""A tiny task with everything that must survive a resume, and a link that plays the supervisor. For the engine's tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from trainerd.config.model import RunConfig
from trainerd.contract.paths import Home
from trainerd.engine.loop import Link, Result
from trainerd.engine.task import Task
from trainerd.engine.trainer import Trainer

NUM_TRAIN, NUM_EVAL = 50, 11


class ToyModel(nn.Module):
    """Global random numbers in nn.Dropout, a running statistic in the buffers, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.dropout = nn.Dropout(0.2)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return self.out(torch.tanh(self.mix(self.dropout(self.embed(tokens)))))


class Blocks(nn.Module):
    """Blocks over a frozen embedding: for what is done block by block. `make()` gives one."""

    def __init__(self, make: Callable[[], nn.Module], number: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width).requires_grad_(False)
        self.blocks = nn.ModuleList(make() for _ in range(number))
        self.out = nn.Linear(width, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Samples:
    """Sequences of 2 to 9 tokens; `log` remembers what was read."""

    def __init__(self, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.rows = [(np.arange(random.integers(2, 10)) * 3 + random.integers(20)) % 20 for _ in range(count)]
        self.lengths = np.array([len(row) for row in self.rows])
        self.log: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.log.append(index)
        return torch.from_numpy(self.rows[index])


class Toy(Task):
    tokens = "tokens"
    model_kind: Any = ToyModel

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.train_samples, self.eval_samples = Samples(NUM_TRAIN, 1), Samples(NUM_EVAL, 2)

    def model(self) -> nn.Module:
        return self.model_kind()

    def dataset(self, split: str) -> Samples:
        return self.train_samples if split == "train" else self.eval_samples

    def collate(self, samples: Any) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence(list(samples), batch_first=True, padding_value=-1)

    def counts(self, batch: torch.Tensor) -> dict[str, int]:
        return {"tokens": int((batch[:, 1:] >= 0).sum())}

    def loss(self, model: nn.Module, batch: torch.Tensor, ctx: Any) -> Any:
        real = batch[:, 1:] >= 0
        logits = model(batch[:, :-1].clamp(min=0))[real]
        return {"tokens": (nn.functional.cross_entropy(logits, batch[:, 1:][real], reduction="sum"), 1.0)}, {}


class Script(Link):
    """Remembers every event; gives `commands[n]` at the n-th look for one."""

    def __init__(self, commands: dict[int, dict[str, Any]] | None = None) -> None:
        self.commands = commands or {}
        self.looks = 0
        self.events: list[dict[str, Any]] = []

    def send(self, event: str, **fields: Any) -> None:
        json.dumps(fields, allow_nan=False)  # it must fit on a wire
        self.events.append({"event": event, **fields})

    def command(self) -> dict[str, Any] | None:
        self.looks += 1
        return self.commands.pop(self.looks, None)

    def of(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]


LEAVE = {"do": "leave", "why": "pause", "save": True}


def config(train: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    base = {"epochs": 3, "batch_size": 8, "lr": 0.01, "precision": "fp32", "threads": 1, "warmup_steps": 3}
    return RunConfig.model_validate({"task": "toy", "name": "toy", "train": {**base, **(train or {})}, **sections})


def run(home: Path, asked: RunConfig, link: Link | None = None, task: Task | None = None, **more: Any) -> Result:
    return Trainer(task or Toy(), asked, home=home, link=link or Script(), **more).train()


def lines(home: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    found = [json.loads(line) for line in Home(home).run("toy").metrics.read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "t"} for line in found]


def weights(home: Path) -> dict[str, torch.Tensor]:
    return load_file(Home(home).run("toy").model / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether two homes hold the same run: every line of the metrics, and the weights' file to the byte."""
    files = [(Home(home).run("toy").model / "model.safetensors").read_bytes() for home in (one, other)]
    return lines(one) == lines(other) and files[0] == files[1]
