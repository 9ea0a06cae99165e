"""A model of one's own that is too large to be computed for its forecast: refused before its first step, or trained, as a small one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.person import Person
from tests.trainers import RunningTrainer, new_run
from trainerd.contract import status, wire
from trainerd.memory import receipts, traced

# 77 MB of weights, and nearly 5 MB of activations for each sample. Who computes says so in the log.
_WIDE = '''
import torch
from torch import nn
from trainerd.engine.task import Task
from trainerd.engine import trace
from trainerd.machine import memory

trace._LARGE_SECONDS = 0.0
memory.ram = lambda pid=None: memory.RamFacts(4_000_000_000, 16_000_000_000)

class Data:
    def __len__(self): return 1024
    def __getitem__(self, index): return (torch.arange(256) * 7 + index) % 300_000

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(300_000, 64)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)) for _ in range(4))

    def forward(self, words):
        x = self.words(words)
        for layer in self.layers:
            x = x + layer(x)
        return x

class Wide(Task):
    def model(self): return Model()
    def blocks(self, model): return list(model.layers)
    def dataset(self, split): return Data() if split == "train" else None
    def counts(self, batch): return {"loss": len(batch)}
    def loss(self, model, batch, ctx):
        x = model(batch)
        print("computed by", type(x).__name__, flush=True)
        return {"loss": (x.square().sum(), 1.0)}, {}

class Deciding(Wide):
    """Goes by what it has computed."""
    def loss(self, model, batch, ctx):
        x = model(batch)
        return {"loss": (x[x > 0].square().sum(), 1.0)}, {}
'''


def wide(root: Path, limit: str, class_name: str = "Wide") -> RunningTrainer:
    train = {"batch_size": 256, "micro_batch": 256, "max_steps": 1, "optimizer": "sgd", "activation_checkpointing": "none"}
    return RunningTrainer(new_run(root, source=_WIDE, class_name=class_name, train=train, memory={"ram_limit": limit}))


def test_what_does_not_fit_is_refused_and_with_room_it_trains(tmp_path: Path) -> None:
    """Its activations are too much, not its weights: nothing is computed, the changes that help are named, and the trace is kept. With
    room the same model has the same forecast, and takes its step."""
    small = wide(tmp_path / "small", "4.9GB")
    told = small.wait_for(wire.EXCEPTION)
    assert told["permanent"] and told["type"] == "Refused", told
    assert "It does not fit: it needs 2.0 GB" in told["text"] and "It would fit with --set train.micro_batch=" in told["text"], told
    assert small.exit_code() == wire.EXIT_PERMANENT
    assert set(re.findall(r"computed by (\w+)", small.text())) == {"FakeTensor"}
    noted = json.loads((small.paths.folder / receipts.TRACE).read_text("utf-8"))
    assert traced.read(small.paths.home.cache / "traces" / noted["trace"]) is not None and noted["samples"] == 1024

    large = wide(tmp_path / "large", "12GB")
    large.wait_for_step(1)
    assert large.exit_code() == wire.EXIT_FINISHED
    assert json.loads((large.paths.folder / receipts.TRACE).read_text("utf-8"))["trace"] == noted["trace"]
    receipt = json.loads((large.paths.folder / receipts.FILE).read_text("utf-8"))
    assert 0.8 < receipt["predicted"]["ram_bytes"] / receipt["real"]["ram_bytes"] < 1.25, receipt


def test_where_it_can_only_be_computed_and_there_is_no_room_the_reason_is_told(tmp_path: Path) -> None:
    """An event, a warning, a note for `plan`; the least is foretold, and it is tried."""
    trainer = wide(tmp_path, "4.9GB", "Deciding")
    found = trainer.wait_for(wire.NOTE, lambda note: note["kind"] == "no_memory_estimate")
    for part in ("Not traced without computing", "numbers that only computing would tell (aten.index.Tensor)", "nor computed: it "):
        assert part in found["text"], found
    assert found["text"] in trainer.wait_for(wire.WARNING, lambda warning: "forecast" in warning["text"])["text"]
    assert trainer.wait_for(wire.MEMORY, lambda memory: memory.get("predicted_bytes"))["predicted_bytes"] > 300_000_000
    noted = json.loads((trainer.paths.folder / receipts.TRACE).read_text("utf-8"))
    assert noted["trace"] is None and noted["untraced"] == found["text"]
    trainer.kill()


# 1.1 GB of weights, most of them not learned, and nearly 40 MB of activations for each sample.
_GIGABYTE = """
import torch
from torch import nn
from trainerd.engine.task import Task

class Data:
    def __len__(self): return 640
    def __getitem__(self, index): return torch.full((64, 16), index / 640)

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4096, 4096, bias=False).requires_grad_(False)
        self.own = nn.Linear(4096, 4, bias=False)
        self.back = nn.Linear(4, 4096, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.base(x)) + self.back(self.own(x))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 4096)
        self.layers = nn.ModuleList(Layer() for _ in range(16))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x

class Large(Task):
    def model(self): return Model()
    def blocks(self, model): return list(model.layers)
    def dataset(self, split): return Data() if split == "train" else None
    def counts(self, batch): return {"loss": len(batch)}
    def loss(self, model, batch, ctx): return {"loss": (model(batch).square().mean((1, 2)).sum(), 1.0)}, {}
"""


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    found = Person(tmp_path / "home")
    yield found
    found.leaves()


@pytest.mark.slow
def test_a_model_of_more_than_a_gigabyte(person: Person, tmp_path: Path) -> None:
    """From a person's first start to `plan`: refused with what helps where its activations are too much, trained with just that, and
    known from then on."""
    (tmp_path / "large.py").write_text(_GIGABYTE, encoding="utf-8")
    limit = psutil.virtual_memory().used + 4_500_000_000
    words = ["--task", f"{tmp_path / 'large.py'}:Large", "--set", f"memory.ram_limit={limit // 1_000_000}MB"]
    for setting in ("precision=fp32", "optimizer=sgd", "max_steps=1", "batch_size=640", "threads=2"):
        words += ["--set", f"train.{setting}"]
    whole = ("--set", "train.micro_batch=640", "--set", "train.activation_checkpointing=none")
    refused = person.types("start", *words, *whole, "--wait", timeout=300)
    assert refused.returncode == 5 and "It does not fit: it needs 2" in refused.stdout, refused
    reading = person.sees()
    assert reading.state == status.FAILED and "It would fit with --set train.micro_batch=" in reading.reason, reading.reason
    again = person.types("plan", "--json", *words, *whole)
    assert again.returncode == 5 and json.loads(again.stdout)["verdict"] == "too large", again.stdout
    assert json.loads(again.stdout)["estimate"]["num_trainable"] == 4096 * (17 + 16 * 8)

    person.starts(*words, "--set", "train.batch_size=4", "--set", "train.micro_batch=2", "--wait")
    receipt: dict[str, Any] = json.loads((person.home.run(person.run()).folder / receipts.FILE).read_text("utf-8"))
    assert 0.85 < receipt["predicted"]["ram_bytes"] / receipt["real"]["ram_bytes"] < 1.2, receipt
    assert receipt["real"]["ram_bytes"] < 3_000_000_000
