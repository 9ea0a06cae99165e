"""A trace on tensors without memory says what a real one says, and what it cannot say it does not guess."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from benchmarks.memory import families
from benchmarks.memory.counted import FamilyTask
from tests.test_memory_fitting import AttendingToy, DeepToy, WideToy, bound
from tests.toy import Toy, ToyModel
from trainerd.engine import chunked, rng
from trainerd.engine import trace as tracing
from trainerd.engine.dropout import SampleDropout
from trainerd.engine.fakes import Fakes, Undecided
from trainerd.engine.largest import largest
from trainerd.engine.task import Task
from trainerd.memory.traced import Trace, TracedTable, Traces
from trainerd.tasks.cadence import blocks
from trainerd.tasks.cadence.settings import CadenceSettings


class FamilyOf(FamilyTask):
    """A family of the benchmarks, with its repeated layers named."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        inner: Any = getattr(model, "inner", model)
        return list(next((getattr(inner, name) for name in ("blocks", "stages", "layers") if hasattr(inner, name)), []))


def _words(samples: int) -> list[Tensor]:
    return [torch.randint(0, 200, (samples, 16)), torch.randint(0, 200, (samples, 16))]


def _images(samples: int) -> list[Tensor]:
    return [torch.randn(samples, 3, 8, 8, 8), torch.randint(0, 10, (samples,))]


def small(name: str) -> Task:
    """A family with less of everything."""
    own: Any = {"embedding": 16, "hidden": [20, 12], "attention": [10, 6], "context": 8}
    made: dict[str, Callable[[], Any]] = {
        "gru": lambda: families._cadence(CadenceSettings(), blocks.Sizes(310, 306, 4), 4),
        "gru-mn": lambda: families._cadence(CadenceSettings(model="gru-mn", gru_mn=own), blocks.Sizes(310, 306, 4), 3),
        "gpt": lambda: _family(lambda: families._Gpt(200, 32, 4, 2, 16), _words),
        "llama-lora": lambda: _family(lambda: families._Llama(200, 32, 4, 2, 2, 64, 4), _words),
        "cnn3d": lambda: _family(lambda: families._ConvNet(8, 2, 10, 3), _images),
    }
    return FamilyOf(made[name](), 8)


def _family(model: Callable[[], nn.Module], batch: Callable[[int], list[Tensor]]) -> families.Family:
    return families.Family(model, lambda tape: lambda *given: given[0], batch)


TASKS: dict[str, Callable[[], Task]] = {
    "toy": Toy,
    "attending": AttendingToy,
    "deep": DeepToy,
    **{name: functools.partial(small, name) for name in ("gru", "gru-mn", "gpt", "llama-lora", "cnn3d")},
}


def attempts(task: Any, tmp_path: Path, precision: str, kernel: str = "auto") -> tuple[TracedTable, TracedTable]:
    """The table of a trace on real tensors, and of one on tensors without memory; of one micro-batch, to be quick."""
    task.splittable = False
    model, mixed = bound(task, tmp_path, precision)
    given = (task, model, task.dataset("train"), mixed, 4, kernel, tracing.Means(), largest(task, task.dataset("train")))
    return tracing._Tracing(*given).computed(600.0), tracing._Tracing(*given).without_memory()


def ordered(table: TracedTable) -> dict[str, Traces]:
    """Its traces, with ends that follow each other in order: what autocast kept, for one, ends in the order of addresses."""

    def sorted_ends(found: Trace) -> Trace:
        groups = itertools.groupby(found.events, key=lambda event: event < 0)
        return replace(found, events=[event for ends, some in groups for event in (sorted(some) if ends else some)])

    return {
        name: Traces([sorted_ends(t) for t in both.steps], [sorted_ends(t) for t in both.held_out]) for name, both in table.modes.items()
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(TASKS))
def test_what_is_traced_without_memory_is_what_is_traced_really(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    """Event by event, in every mode of what is computed again, a frozen base streamed or not: the same births, sizes, ends, gradients,
    work and products."""
    monkeypatch.setattr(tracing, "_STREAMED", [("full", True)])  # the other three: the slow test
    real, fake = attempts(TASKS[name](), tmp_path, precision)
    assert ordered(real) == ordered(fake)
    assert replace(real, modes={}) == replace(fake, modes={})
    assert len(real.modes) == {"toy": 1, "attending": 3, "gru": 1, "llama-lora": 4}.get(name, 3) and real.modes["none"].steps[0].flops > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [*families.KNOWN, *families.HELD_OUT])
def test_so_are_the_families_of_the_benchmarks(tmp_path: Path, name: str, precision: str) -> None:
    """As large as they are measured."""
    parts = families.family(name)
    real, fake = attempts(FamilyOf(parts, 8), tmp_path, precision, parts.attention)
    assert ordered(real) == ordered(fake)


def test_math_attention_too(tmp_path: Path) -> None:
    real, fake = attempts(AttendingToy(), tmp_path, "fp32", "math")
    assert ordered(real) == ordered(fake)
    fused = attempts(AttendingToy(), tmp_path, "fp32")[1]
    assert ordered(fused) != ordered(fake)


class One(Task):
    """One kind of layer, and one kind of loss."""

    def __init__(self, layer: Callable[[], nn.Module], batch: Callable[[int], Tensor], loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(None)
        self._layer, self._batch, self._loss = layer, batch, loss

    def model(self) -> nn.Module:
        return self._layer()

    def dataset(self, split: str) -> Any:
        return range(8)

    def collate(self, samples: Any) -> Tensor:
        return self._batch(len(samples))

    def counts(self, batch: Tensor) -> dict[str, int]:
        return {"loss": len(batch)}

    def loss(self, model: nn.Module, batch: Tensor, ctx: Any) -> Any:
        return {"loss": (self._loss(model, batch), 1.0)}, {}


def rows(*shape: int) -> Callable[[int], Tensor]:
    return lambda samples: torch.randn(samples, *shape)


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    out = model(batch)
    return (out[0] if isinstance(out, tuple) else out).float().square().sum()


def linear() -> nn.Module:
    return nn.Linear(32, 32)


def _masked(model: nn.Module, batch: Tensor) -> Tensor:
    real = torch.arange(12) < torch.arange(4, 4 + len(batch))[:, None]
    out = model(batch)
    return out[real].sum() + out.masked_select(real[..., None]).sum() + out[real.nonzero(as_tuple=True)].square().sum()


def _decided(model: nn.Module, batch: Tensor) -> Tensor:
    """Goes by what the batch holds."""
    for length in (batch[:, :, 0].abs() >= 0).sum(1).tolist():
        assert length == 12
    return model(batch[:, : int(batch.isfinite().sum().item()) // batch[:, 0].numel()]).square().sum()


def _ctc(model: nn.Module, batch: Tensor) -> Tensor:
    scores = model(batch).float().log_softmax(-1).transpose(0, 1)
    lengths = torch.full((len(batch),), 12), torch.full((len(batch),), 4)
    return nnf.ctc_loss(scores, torch.ones(len(batch), 4, dtype=torch.long), *lengths, reduction="sum")


def _chunked(model: nn.Module, batch: Tensor) -> Tensor:
    targets = torch.arange(12).repeat(len(batch), 1)
    return chunked.linear_cross_entropy(batch, model.weight, model.bias, targets, ignore_index=3)  # type: ignore[arg-type]


def _elementwise(name: str, **more: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    loss = getattr(nnf, name)
    return lambda model, batch: loss(model(batch).float().sigmoid(), batch.sigmoid(), **more) * 3


ONE = {
    "lstm": One(lambda: nn.LSTM(32, 16, 2, batch_first=True, bidirectional=True, dropout=0.1), rows(12, 32), squares),
    "recurrent cells": One(lambda: nn.GRU(32, 16, batch_first=True), rows(12, 32), squares),
    "group norm": One(
        lambda: nn.Sequential(nn.Conv1d(8, 16, 3), nn.GroupNorm(4, 16), nn.GELU(), nn.Conv1d(16, 8, 1)), rows(8, 64), squares
    ),
    "norm of low": One(lambda: nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)), rows(12, 32), squares),
    "encoder": One(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2), rows(12, 32), squares),
    "transposed": One(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True), nn.ConvTranspose2d(8, 4, 4, 2, 1)),
        rows(3, 16, 16),
        squares,
    ),
    "unfolded": One(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Unfold(3, padding=1), nn.Fold((8, 8), 3, padding=1)), rows(3, 8, 8), squares
    ),
    "dropout by sample": One(lambda: nn.Sequential(nn.Linear(32, 32), SampleDropout(0.1), nn.Linear(32, 32)), rows(12, 32), squares),
    "masks": One(linear, rows(12, 32), _masked),
    "decided by the batch": One(linear, rows(12, 32), _decided),
    "ctc": One(linear, rows(12, 32), _ctc),
    "loss in pieces": One(linear, rows(12, 32), _chunked),
    "mse": One(linear, rows(12, 32), _elementwise("mse_loss", reduction="sum")),
    "smooth l1": One(linear, rows(12, 32), _elementwise("smooth_l1_loss")),
    "each term": One(linear, rows(12, 32), lambda m, batch: nnf.mse_loss(m(batch).float(), batch, reduction="none").sum()),
    "binary": One(linear, rows(12, 32), _elementwise("binary_cross_entropy")),
    "soft margin": One(linear, rows(12, 32), _elementwise("soft_margin_loss", reduction="sum")),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(ONE))
def test_layers_and_losses_where_torchs_rules_and_a_cpus_kernels_are_not_the_same(tmp_path: Path, name: str, precision: str) -> None:
    """Saved statistics, workspaces, storages larger than their tensors; masks and numbers that come of the batch alone."""
    real, fake = attempts(ONE[name], tmp_path, precision)
    assert ordered(real) == ordered(fake)
    assert fake.assumed == real.assumed


class Packed(nn.Module):
    """A base in 4 or 8 bits with a small learned layer beside each."""

    def __init__(self, bits: int, **more: Any) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes.nn as packed

            kind, given = (packed.Linear4bit, more) if bits == 4 else (packed.Linear8bitLt, {"has_fp16_weights": False})
            self.base = nn.ModuleList(kind(64, 64, **given).to("cpu").requires_grad_(False) for _ in range(2))
        self.beside = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for base, beside in zip(self.base, self.beside, strict=True):
            x = base(x) + beside(x)
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["4 bits", "4 bits in bf16", "8 bits"])
def test_a_packed_base_too(tmp_path: Path, kind: str, precision: str) -> None:
    """bitsandbytes' weights: what is noted on them goes with them, and they are counted as they are held."""
    pytest.importorskip("bitsandbytes")
    more = {"4 bits": {"compress_statistics": True, "quant_type": "nf4"}, "4 bits in bf16": {"quant_storage": torch.bfloat16}}
    real, fake = attempts(One(lambda: Packed(int(kind[0]), **more.get(kind, {})), rows(12, 64), squares), tmp_path, precision)
    assert ordered(real) == ordered(fake)
    assert replace(real, modes={}) == replace(fake, modes={}) and real.frozen


class ByWeights(WideToy):
    """Goes by what its weights make of the batch."""

    def loss(self, model: nn.Module, batch: Tensor, ctx: Any) -> Any:
        scores = model(batch[:, :-1].clamp(min=0))
        sure = scores[scores > 0]
        return {"tokens": (sure.square().sum() + scores.sum(), 1.0)}, {}


class Telling(WideToy):
    """Shows numbers of its step, as many tasks do."""

    def loss(self, model: nn.Module, batch: Tensor, ctx: Any) -> Any:
        losses, _ = super().loss(model, batch, ctx)
        value = losses["tokens"][0].detach()
        return losses, {"loss": value.item(), "root": float(value) ** 0.5}


def traced(task: Any, tmp_path: Path, means: tracing.Means | None = None) -> TracedTable:
    model, mixed = bound(task, tmp_path)
    return tracing.trace(task, model, task.dataset("train"), mixed, 8, means=means)


def test_code_that_goes_by_what_is_computed_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only values tell, it is traced on real tensors, if there is room and time; else it is said what was in the way."""
    real = traced(ByWeights(), tmp_path)
    monkeypatch.setattr(tracing, "_SMALL_BYTES", 0)
    assert traced(ByWeights(), tmp_path).modes["none"].steps[0].peak == pytest.approx(real.modes["none"].steps[0].peak, rel=0.2)
    weights = sum(p.numel() * p.element_size() for p in ByWeights().model().parameters())
    why = r"Not traced without computing \(.*only computing would tell \(aten.index.Tensor\)\), nor computed: "
    for means, said in (
        (tracing.Means(room_bytes=1000), r"a copy of the model and its gradients need \d+ kB, and 1 kB are free"),
        (tracing.Means(room_bytes=2 * weights + 1000), "a step of the fewest samples holds more than the 0.0 GB that are free"),
    ):
        with pytest.raises(tracing.NotTraced, match=why + said):
            traced(ByWeights(), tmp_path, means)
    monkeypatch.setattr(tracing, "_LARGE_SECONDS", 1e-4)
    with pytest.raises(tracing.NotTraced, match=why + r"it (takes more than|would take) \d+ seconds"):
        traced(ByWeights(), tmp_path)


def test_a_number_that_is_only_shown_does_not_stop_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`loss.item()` among the metrics: the same trace, and what that assumes is said."""
    real = traced(Telling(), tmp_path)
    monkeypatch.setattr(tracing, "_SMALL_BYTES", 0)
    fake = traced(Telling(), tmp_path)
    assert ordered(real) == ordered(fake)
    assert set(fake.assumed) - set(real.assumed) == {tracing._GUESSED}


def test_a_small_model_that_takes_long_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little weight and much work: given up for the trace without memory, to the same result."""
    real = traced(WideToy(), tmp_path)
    for name, value in (("_SMALL_SECONDS", 1e-4), ("_SMALL_HELD_BYTES", 100_000)):
        with monkeypatch.context() as less:
            less.setattr(tracing, name, value)
            less.setattr(tracing._Tracing, "computed", _counting(tracing._Tracing.computed, counts := []))
            assert ordered(traced(WideToy(), tmp_path)) == ordered(real) and counts == ["given up"]


def _counting(computed: Any, counts: list[str]) -> Any:
    def counted(*given: Any) -> Any:
        try:
            return computed(*given)
        except tracing._TooMuch:
            counts.append("given up")
            raise

    return counted


def test_a_trace_without_memory_leaves_no_trace(tmp_path: Path) -> None:
    """Random states, context, weights, gradients, buffers, hooks; and it shows signs of life all the while."""
    task, beats = Toy(), []
    model, mixed = bound(task, tmp_path)
    model.extra = [torch.arange(3.0)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    context, states = dict(vars(task.ctx)), rng.take()
    means = tracing.Means(beat=lambda: beats.append(1))
    given = (task, model, task.train_samples, mixed, 8, "auto", means, tracing._sample(task, task.train_samples, means))
    assert tracing._Tracing(*given).without_memory().num_parameters == 232
    assert vars(task.ctx) == context and len(beats) > 50
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(type(p) is nn.Parameter and p.grad is None and not p._backward_hooks for p in model.parameters())
    assert torch.equal(states.torch, torch.get_rng_state()) and states.python == rng.take().python
    assert model.extra[0].tolist() == [0.0, 1.0, 2.0] and torch.ones(2).sum().item() == 2


class Huge(Toy):
    """400 MB of weights, one matrix of them used twice."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = ToyModel()
        model.wide = nn.Sequential(nn.Linear(8, 6_000_000, bias=False), nn.Linear(6_000_000, 8, bias=False))
        return model

    def loss(self, model: nn.Module, batch: Tensor, ctx: Any) -> Any:
        losses, metrics = super().loss(model, batch, ctx)
        return {"tokens": (losses["tokens"][0] + model.wide(torch.ones(len(batch), 40, 8)).sum(), 1.0)}, metrics


def test_it_takes_next_to_no_ram(tmp_path: Path) -> None:
    """A copy of the model and a step of it would take 18 GB here: it takes less than 150 MB."""
    torch.empty(1).sum()
    Fakes()  # what torch loads for it is there
    task = Huge()
    model, mixed = bound(task, tmp_path)
    before = psutil.Process().memory_info().rss
    table = tracing.trace(task, model, task.train_samples, mixed, 4)
    assert psutil.Process().memory_info().rss - before < 150_000_000
    assert table.modes["none"].steps[-1].peak > 7_000_000_000


def test_values_are_known_as_long_as_all_they_come_from_is() -> None:
    """What is written with something unknown is unknown from then on, in all its views; a real tensor that is written to stays."""
    weight, outer = nn.Parameter(torch.ones(4)), torch.zeros(4)
    fakes = Fakes()
    model = nn.Module()
    model.weight = weight
    copied = fakes.copied(model)
    with fakes:
        places = torch.arange(4)
        part = places[1:]
        assert part.tolist() == [1, 2, 3] and (places > 1).nonzero().tolist() == [[2], [3]]
        places.add_(1)
        assert part.tolist() == [2, 3, 4] and int(part.sum()) == 9
        part.copy_(copied.weight[1:])
        with pytest.raises(Undecided, match="_local_scalar_dense"):
            places.tolist()
        outer += copied.weight
        assert outer.sum().item() != outer.sum().item()
    assert outer.tolist() == [0.0] * 4 and fakes.guessed == 2


def test_a_weight_outside_of_the_model_is_not_learned_by_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, held by the task: it must not be given a gradient without memory."""
    monkeypatch.setattr(tracing, "_SMALL_BYTES", 0)
    scale = torch.ones(1, requires_grad=True)

    class Scaled(WideToy):
        def loss(self, model: nn.Module, batch: Tensor, ctx: Any) -> Any:
            losses, metrics = super().loss(model, batch, ctx)
            return {"tokens": (losses["tokens"][0] * scale, 1.0)}, metrics

    with pytest.raises(tracing.NotTraced, match="it learns a weight that is not part of the model"):
        traced(Scaled(), tmp_path, tracing.Means(room_bytes=0))
    assert scale.grad is None
