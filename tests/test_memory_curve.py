"""A model whose needs are no line in the samples of a micro-batch: noticed at eight, followed as a curve, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_memory_fitting import WideToy, bound, counted
from trainerd.engine.trace import trace
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup


class Pairs(WideToy):
    """A distance between every two samples of a micro-batch."""

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        losses, metrics = super().loss(model, batch, ctx)
        total, weight = losses["tokens"]
        states = model.embed(batch.clamp(min=0)).mean(1)
        apart = (states[:, None] - states[None]).pow(2).sum(-1)
        return {"tokens": (total + 0 * apart.sum(), weight)}, metrics


class Triples(WideToy):
    """Every three samples: faster than any square."""

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        losses, metrics = super().loss(model, batch, ctx)
        total, weight = losses["tokens"]
        states = model.embed(batch.clamp(min=0)).mean((1, 2))
        apart = (states[:, None, None] - states[None, :, None] * states[None, None]).pow(2)
        return {"tokens": (total + 0 * apart.sum(), weight)}, metrics


def test_a_loss_over_pairs_is_followed_as_a_curve(tmp_path: Path) -> None:
    """Within 2 % of the count at 128 samples, a hundred times what was traced; and it is said that it is a square."""
    task = Pairs()
    model, mixed = bound(task, tmp_path)
    table = trace(task, model, task.train_samples, mixed, 128)
    assert [step.samples for step in table.modes["none"].steps] == [2, 4, 8]
    assert any("the square of its samples" in said for said in estimate(table, Setup("cpu", "fp32", 128, 128)).assumed)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for samples in (16, 128):
        line = table.timeline(Setup("cuda", "fp32", samples, samples * 2))
        truth = counted(task, model, mixed, samples)
        model.zero_grad()
        assert line.peak - line.state_bytes - weights == pytest.approx(truth, rel=0.02), samples


def test_what_grows_faster_than_a_square_is_said(tmp_path: Path) -> None:
    """It cannot be followed, but for most of it: the last three that were traced, and words."""
    task = Triples()
    model, mixed = bound(task, tmp_path)
    table = trace(task, model, task.train_samples, mixed, 256)
    assert [step.samples for step in table.modes["none"].steps] == [4, 8, 16]
    assert any("it grew faster" in said for said in table.assumed)


def test_a_line_is_traced_at_two_numbers_of_samples(tmp_path: Path) -> None:
    """An ordinary model is not said to be a curve, nor is one whose batch is so small that it would make no difference."""
    for task, batch in ((WideToy(), 4096), (Pairs(), 7)):
        model, mixed = bound(task, tmp_path)
        table = trace(task, model, task.train_samples, mixed, batch)
        assert [step.samples for step in table.modes["none"].steps] == [2, 4] and len(table.assumed) == 1
