"""A model whose needs are no line in the samples of a micro-batch: noticed far from two and four, followed as a curve, and said."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_memory_fitting import WideToy, bound, counted
from tests.toy import Toy
from trainerd.engine import trace as tracing
from trainerd.engine.trace import trace
from trainerd.memory import traced
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
    """Every three samples."""

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


class Fours(WideToy):
    """Every four samples."""

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        losses, metrics = super().loss(model, batch, ctx)
        total, weight = losses["tokens"]
        one = model.embed(batch.clamp(min=0)).mean((1, 2))
        two = one[:, None] * one
        return {"tokens": (total + 0 * (two[:, :, None, None] - two).pow(2).sum(), weight)}, metrics


@pytest.mark.parametrize(
    ("kind", "numbers", "words", "most"), [(Triples, [2, 4, 8, 16], "cube", 160), (Fours, [2, 4, 8, 16, 32], "fourth", 48)]
)
def test_what_grows_faster_than_a_square_is_followed_too(tmp_path: Path, kind: Any, numbers: list[int], words: str, most: int) -> None:
    """Within 2 % of the count: a cube has been checked at 32 samples; beyond that nothing is, and it is said."""
    task = kind()
    model, mixed = bound(task, tmp_path)
    table = trace(task, model, task.train_samples, mixed, most)
    assert [step.samples for step in table.modes["none"].steps] == numbers and table.degree == len(numbers) - 1
    said = [text for text in table.assumed if f"the {words}" in text and "from 2 to 32" in text]
    assert len(said) == 1 and ("nothing was traced that checks it" in said[0]) is (kind is Fours), table.assumed
    line = table.timeline(Setup("cuda", "fp32", most, most * 2))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert line.peak - line.state_bytes - weights == pytest.approx(counted(task, model, mixed, most), rel=0.02)


def _contrast(z: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)))


def _packed(z: torch.Tensor) -> torch.Tensor:
    own = torch.arange(len(z))
    mask = own[:, None] == own[None]
    return torch.nn.functional.scaled_dot_product_attention(z[None], z[None], z[None], attn_mask=mask[None])


def _combined(number: int, z: torch.Tensor) -> torch.Tensor:
    chosen = torch.combinations(torch.arange(len(z)), number)
    return sum((z[chosen[:, place]] * (place + 1) for place in range(number)), torch.zeros(())).square()


def _combined_if_any(z: torch.Tensor) -> torch.Tensor:
    return z.square() if len(z) < 4 else _combined(3, z)


def _with_some(z: torch.Tensor) -> torch.Tensor:
    return (z[:, None] - z[None, : math.isqrt(len(z))]).square().exp()


def _with_a_few(z: torch.Tensor) -> torch.Tensor:
    return (z[:, None] - z[None, : len(z).bit_length()]).square().exp()


_GROWTH: dict[str, tuple[Any, float, float]] = {
    "n ** 1.5": (lambda n: n**1.5, 0.99, 1.01),
    "n ** 2.5": (lambda n: n**2.5, 0.99, 1.01),
    "root": (lambda n: n * math.isqrt(n), 1.0, 1.35),
    "root of more": (lambda n: n * int(2.3 * n**0.5), 0.95, 1.35),
    "root of a little more": (lambda n: n * int(1.1 * n**0.5), 0.95, 1.35),
    "logarithm": (lambda n: n * math.log2(n), 1.0, 2.2),
    "whole logarithm": (lambda n: n * int(math.log2(n)), 1.0, 2.4),
    "at least 16": (lambda n: max(16, n), 0.99, 1.01),
    "square": (lambda n: n * n, 0.99, 1.01),
    "cube": (lambda n: n**3, 0.99, 1.01),
    "of both": (lambda n: 100 * n + n * n, 0.99, 1.01),
    "in eights": (lambda n: (-(-n // 8) * 8) ** 2, 0.9, 1.1),
}


@pytest.mark.parametrize("kind", _GROWTH)
@pytest.mark.parametrize("samples", [100, 2048, 16_000])
def test_what_many_traces_say_is_followed_whatever_the_power(kind: str, samples: int) -> None:
    """Two hundred times as far as was traced, of sizes in whole bytes; before, the root was told 14 and the logarithm 76 times too high."""
    grows, least, most = _GROWTH[kind]
    numbers = [2, 4, *traced.CHECKED]
    told = traced._through(numbers, [float(math.ceil(grows(number) * 64)) for number in numbers], samples)
    assert least <= told / (grows(samples) * 64) <= most


class Among(Toy):
    """A few numbers of each sample, and what compares the samples."""

    compare: Any

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        losses, metrics = super().loss(model, batch, ctx)
        total, weight = losses["tokens"]
        z = model.embed(batch.clamp(min=0)).mean(1)
        return {"tokens": (total + 0 * type(self).compare(z).sum(), weight)}, metrics


@pytest.mark.parametrize(
    ("compare", "samples", "most"),
    [
        (_contrast, 2048, 1.02),
        (_packed, 1024, 1.02),
        (functools.partial(_combined, 3), 128, 1.02),
        (_combined_if_any, 128, 1.02),
        (_with_some, 2048, 1.25),
        (_with_a_few, 2048, 1.6),
    ],
    ids=["contrast", "packed", "combinations", "combinations_if_any", "with_some", "with_a_few"],
)
def test_what_is_next_to_nothing_for_few_samples_is_seen_to_grow(tmp_path: Path, compare: Any, samples: int, most: float) -> None:
    """A table of all pairs has 64 bytes for four samples: it is followed nevertheless, also where so few are not compared at all, or where
    no power fits; never below the count, and little above it where one fits."""
    task = type("Compared", (Among,), {"compare": staticmethod(compare)})()
    model, mixed = bound(task, tmp_path)
    table = trace(task, model, task.train_samples, mixed, samples)
    assert any("a micro-batch needs grows" in said for said in table.assumed), table.assumed
    line = table.timeline(Setup("cuda", "fp32", samples, samples * 2))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    truth = counted(task, model, mixed, samples)
    assert truth * 0.98 <= line.peak - line.state_bytes - weights <= truth * most


class Reading(Pairs):
    """Cannot be traced without computing it."""

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        if float(model.embed.weight.detach().sum().numpy()) == 0.5:
            raise AssertionError
        return super().loss(model, batch, ctx)


@pytest.mark.parametrize("has_time", [True, False])
def test_what_can_only_be_computed_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_time: bool) -> None:
    """Where there is time for it; where not, the line through two and four is taken, and it is said that it was not checked."""
    task = Reading()
    model, mixed = bound(task, tmp_path)
    monkeypatch.setattr(tracing, "_SMALL_BYTES", 0)
    if not has_time:

        def too_long(*_: Any) -> None:
            raise tracing._TooMuch("it takes too long")

        monkeypatch.setattr(tracing._Tracing, "_step", too_long)
    table = trace(task, model, task.train_samples, mixed, 128)
    assert [step.samples for step in table.modes["none"].steps] == ([2, 4, 8] if has_time else [2, 4])
    assert any("not checked (it takes too long)" in said for said in table.assumed) is not has_time


def test_a_line_is_traced_at_two_numbers_of_samples(tmp_path: Path) -> None:
    """An ordinary model is not said to be a curve, nor is one whose batch is so small that it would make no difference."""
    for task, batch in ((WideToy(), 4096), (Pairs(), 7)):
        model, mixed = bound(task, tmp_path)
        table = trace(task, model, task.train_samples, mixed, batch)
        assert [step.samples for step in table.modes["none"].steps] == [2, 4] and len(table.assumed) == 1
