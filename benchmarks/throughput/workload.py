"""The one workload every contender trains: CADENCE's default model on prepared queries. Knows no contender."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainerd.config.model import RunConfig
from trainerd.contract.paths import Home
from trainerd.engine.batches import Batches
from trainerd.engine.preparing import cache_folder, prepare_here
from trainerd.engine.task import TaskContext
from trainerd.tasks.cadence.data import check
from trainerd.tasks.cadence.task import CadenceTask

SEED = 0


@dataclass
class Workload:
    """A prepared task, its training samples, and the words of the run."""

    home: Path
    config: RunConfig
    task: CadenceTask
    dataset: Any

    def model(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.task.model().train()

    def batch(self, ids: list[int]) -> Any:
        return self.task.collate(self.dataset.__getitems__(ids))

    def sizes(self) -> tuple[int, int]:
        """How many tokens and categories a plain model needs."""
        vocabulary = self.task.vocabulary
        return vocabulary.num_tokens, vocabulary.num_marks

    def row(self, index: int) -> tuple[list[int], int]:
        """A sample as a person's own dataset would give it: its tokens and its category."""
        tokens = self.dataset[index].tolist()
        return tokens, tokens[0] - self.task.vocabulary.begin(0)

    def bucketed(self, batch_size: int) -> Iterator[list[int]]:
        """The engine's own batches, in its own order."""
        order = Batches(len(self.dataset), batch_size, SEED, lengths=np.asarray(self.dataset.lengths))
        return (order.ids(step) for step in range(10**9))

    def shuffled(self, batch_size: int) -> Iterator[list[int]]:
        """What everybody else does: a random batch, padded to its longest."""
        random = np.random.default_rng(SEED)
        while True:
            order = random.permutation(len(self.dataset))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield order[start : start + batch_size].tolist()


def prepare(folder: Path | None = None, data: str | None = None, size: int | None = None, **train: Any) -> Workload:
    """Prepare the queries once and open them, as the engine does."""
    home = folder or Path(tempfile.mkdtemp(prefix="trainerd-bench-"))
    config = RunConfig(
        task="cadence",
        seed=SEED,
        data={"path": data, "size": size},
        settings={"eval_prefixes": 0},
        train={"eval_every_steps": 10**9, "epochs": 10**4, "lr": 3e-3, "threads": torch.get_num_threads(), **train},
        checkpoint={"every_steps": 10**9, "every_minutes": 10**6},
    )
    task = CadenceTask(config.settings)
    fingerprint = check(config.data, task.settings)
    cache = cache_folder(Home(home), task, config, fingerprint)
    prepare_here(task, config, cache, lambda event, **fields: None)
    task.bind(TaskContext(torch.device("cpu"), torch.float32, SEED, cache, config.data))
    return Workload(home, config, task, task.dataset("train"))
