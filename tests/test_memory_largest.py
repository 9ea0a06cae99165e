"""Which sample a model is traced with: the largest, as far as a bounded look tells; and that no look is seen by the training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_memory_fitting import bound
from tests.toy import Toy
from trainerd.engine import largest as looking
from trainerd.engine import rng
from trainerd.engine.largest import largest
from trainerd.engine.trace import trace
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup


class Rows:
    """Rows of tokens that say nothing of their lengths; reading one draws at random, as augmentations do."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        noise = int(torch.rand(()) + random.random() + np.random.default_rng(0).random()) * 0 + int(np.random.rand() * 0)
        return torch.full((self._lengths[index],), noise)


class Told(Toy):
    def length(self, sample: Any) -> int:
        return len(sample)


def assumed(task: Toy, rows: Rows, tmp_path: Path) -> tuple[str, int]:
    """What the trace of these rows says, and what it holds for 32 samples."""
    model, mixed = bound(task, tmp_path)
    table = trace(task, model, rows, mixed, 32)
    found = estimate(table, Setup("cpu", "fp32", 32, 32))
    return found.assumed[0], found.tensors


def test_one_long_sample_among_those_without_a_length_is_found(tmp_path: Path) -> None:
    """The last of 330 is 100 times longer: by the bytes of batches of one; what was done to find it is said."""
    short, long = (assumed(Toy(), Rows([8] * 329 + [last]), tmp_path) for last in (8, 800))
    assert long[0] == "every sample as large as the largest of 64 samples that were looked at of 330; the task tells no length()"
    assert long[1] > 10 * short[1]
    task, few = Toy(), Rows([8, 900, 8])
    assert "of all 3; the task tells no length()" in assumed(task, few, tmp_path)[0] and largest(task, few).index == 1


def test_lengths_are_asked_of_samples_spread_over_all(tmp_path: Path) -> None:
    """More than are looked at, the long ones in the last tenth: one of those is found; no sample is read twice for it."""
    rows = Rows([5] * 4500 + [300] * 500)
    found = largest(Told(), rows)
    assert found.index >= 4500 and len(rows.read) == len(set(rows.read)) == 2048
    assert found.assumed == "every sample as large as the longest of 2,048 samples that were looked at of 5,000, by the task's length()"
    assert largest(Told(), Rows([2, 9, 5])) == looking.Largest(1, "every sample as large as the longest of all 3, by the task's length()")


def test_a_slow_dataset_is_looked_at_for_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the time is over it ends; the first and the last have been seen by then, and how many were is said."""
    task = Toy()
    bound(task, tmp_path)
    clock = iter(range(1000))
    monkeypatch.setattr(looking.time, "monotonic", lambda: float(next(clock)))
    rows = Rows([5] * 329 + [50])
    found = largest(task, rows)
    assert rows.read[:3] == [0, 329, 167] and len(rows.read) == 4
    assert found.index == 329 and "of 4 samples that were looked at of 330" in found.assumed


def test_no_random_state_is_moved_by_the_looks(tmp_path: Path) -> None:
    """Python's, NumPy's and torch's are as before, and so is the task's context, whatever the dataset draws."""
    task = Toy()
    model, mixed = bound(task, tmp_path)
    task.ctx.sample_ids = [7]
    before, context = rng.take(), dict(vars(task.ctx))
    trace(task, model, Rows([8] * 100), mixed, 32)
    after = rng.take()
    assert before.python == after.python and torch.equal(before.torch, after.torch) and vars(task.ctx) == context
    assert all(np.array_equal(one, other) for one, other in zip(before.numpy[1:3], after.numpy[1:3], strict=True))
