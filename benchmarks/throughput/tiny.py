"""A 4x4 model whose arithmetic costs nothing: what is left is the loop itself."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.throughput.contenders import WARM
from trainerd.config.model import RunConfig
from trainerd.engine.loop import Link
from trainerd.engine.task import Task
from trainerd.engine.trainer import Trainer

ROWS, BATCH = 4096, 4


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    return x, x.roll(1, 1)


class Tiny(Task):
    """Four numbers in, four numbers out."""

    def model(self) -> nn.Module:
        return nn.Linear(4, 4)

    def dataset(self, split: str) -> Any:
        return torch.utils.data.TensorDataset(*rows()) if split == "train" else None

    def counts(self, batch: Any) -> dict[str, int]:
        return {"loss": batch[1].numel()}

    def loss(self, model: nn.Module, batch: Any, ctx: Any) -> Any:
        return {"loss": (nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), 1.0)}, {}


def engine(home: Path, steps: int) -> float:
    config = RunConfig(
        task="tiny",
        train={
            "max_steps": steps, "batch_size": BATCH, "epochs": 10**4, "scheduler": "constant", "eval_every_steps": 10**9,
            "precision": "fp32", "threads": torch.get_num_threads(),
        },
        checkpoint={"every_steps": 10**9, "every_minutes": 10**6},
    )  # fmt: skip
    name = f"tiny-{time.monotonic_ns()}"
    Trainer(Tiny(), config, home=home, run=name, link=Link()).train()
    lines = (home / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines()
    stamps = {row["step"]: row["t"] for row in map(json.loads, lines) if "loss" in row}
    for kind in ("runs", "checkpoints", "models"):
        shutil.rmtree(home / kind / name, ignore_errors=True)
    return stamps[steps] - stamps[WARM]


def bare(steps: int) -> float:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    data = torch.utils.data.TensorDataset(*rows())
    since = 0.0
    for step in range(steps):
        if step == WARM:
            since = time.perf_counter()
        ids = range(step * BATCH % ROWS, step * BATCH % ROWS + BATCH)
        x, y = torch.utils.data.default_collate([data[i] for i in ids])
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return time.perf_counter() - since
