"""However a batch is cut, its gradient is the same: one micro-batch of 8, two of 4, eight of 1, through the engine's own step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.sketches.fusion import FusionNet, FusionSketch
from tests.toy import LEAVE, Script, config, run
from trainerd.config.model import DataConfig
from trainerd.engine import dropout
from trainerd.engine.batches import Batches
from trainerd.engine.dropout import SampleDropout
from trainerd.engine.loader import Loader, lengths_of
from trainerd.engine.precision import Precision
from trainerd.engine.step import Stepper
from trainerd.engine.task import Task, TaskContext
from trainerd.engine.updates import Updates
from trainerd.tasks.cadence.prepare import prepare
from trainerd.tasks.cadence.settings import CadenceSettings
from trainerd.tasks.cadence.task import CadenceTask

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SAMPLES = 8, 21  # two whole windows, and a last one of 5
CUTS = (8, 4, 3, 1)
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}
SETTINGS: dict[str, dict[str, Any]] = {
    "gru": {"gru": {"word_embedding": 12, "category_embedding": 5, "hidden": 16}},
    "gru-mn": {"model": "gru-mn", "gru_mn": {"embedding": 12, "hidden": [14, 10], "attention": [6, 5], "context": 9, "dropout": 0.5}},
}


class Fused(FusionNet):
    """The fusion net with dropout keyed by sample on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = SampleDropout(0.3)

    def forward(self, image: Tensor, events: Tensor) -> Any:
        return super().forward(image, self.drop(events))


class Fusion(FusionSketch):
    """Three losses, each with items of its own number; numbers in the type of the weights."""

    dtype = torch.float32

    def model(self) -> nn.Module:
        return Fused().to(self.dtype)

    def collate(self, samples: Sequence[Any]) -> Any:
        return [part.to(self.dtype) if part.is_floating_point() else part for part in super().collate(samples)]


class Recorder(torch.optim.SGD):
    """Remembers every step's gradients, as they are when the step is taken."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__([{"params": list(model.parameters()), "lr_scale": 1.0}], lr=1e-3)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])
        super().step()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries, prepared once for both models: their settings of data are the same."""
    folder = tmp_path_factory.mktemp("rows")
    prepare(CadenceSettings(), DataConfig(size=300), 0, folder, lambda *what: None)
    return folder


def task_of(kind: str, dtype: torch.dtype) -> Task:
    if kind == "fusion":
        task = Fusion()
        task.dtype = dtype
        return task
    return CadenceTask(CadenceSettings.model_validate(SETTINGS[kind]))


def steps(kind: str, rows: Path, dtype: torch.dtype, precision: str, micro_batch: int) -> list[list[Tensor]]:
    """The gradients of an epoch's steps, by the engine's stepper."""
    task, mixed = task_of(kind, dtype), Precision(precision, torch.device("cpu"))
    task.bind(TaskContext(mixed.device, mixed.dtype, 7, rows, DataConfig()))
    if precision == "fp16":
        exactly = task.loss

        def loss(*given: Any) -> Any:
            with torch.autocast("cpu", enabled=False):  # the scaler is looked at here, not half precision's own rounding
                return exactly(*given)

        task.loss = loss  # type: ignore[method-assign]
    dataset = task.dataset("train")
    assert dataset is not None
    batches = Batches(len(dataset), BATCH, 7, lengths=lengths_of(task, dataset), limit=SAMPLES)
    torch.manual_seed(7)
    model = task.model().to(dtype).train()
    dropout.attach(model, task.ctx)
    optimizer = Recorder(model)
    loader = Loader(task, dataset, batches, num_workers=0, seed=7, pin_memory=False)
    loader.seek(0, micro_batch)
    stepper = Stepper(task, model, Updates(model, task, optimizer, mixed, None), mixed, loader)
    if mixed.scaler is not None:
        mixed.scaler.scale(torch.zeros(()))  # it makes its scale with the first use
        assert mixed.scaler.get_scale() == 2.0**16
    for number in range(batches.steps_per_epoch):
        taken = stepper.take(1e-3, lambda: False, lambda *what: None)
        assert taken is not None and taken.num_samples == (BATCH if number < 2 else SAMPLES - 2 * BATCH)
    loader.close()
    return optimizer.seen


def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The relative difference of two gradients, all weights together."""
    difference = torch.stack([(a.double() - b.double()).norm() for a, b in zip(one, other, strict=True)]).norm()
    return float(difference / torch.stack([a.double().norm() for a in one]).norm())


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, "fp32"), (torch.float32, "fp32"), (torch.float32, "fp16")])
@pytest.mark.parametrize("kind", ["gru", "gru-mn", "fusion"])
def test_the_gradient_is_the_same_however_the_batch_is_cut(kind: str, dtype: torch.dtype, precision: str, rows: Path) -> None:
    """Ragged rows, a last short window, several losses, dropout, fp16's scaler: within 1e-12 in float64, 1e-6 in float32."""
    found = {micro_batch: steps(kind, rows, dtype, precision, micro_batch) for micro_batch in CUTS}
    assert len(found[BATCH]) == 3 and all(gradient.dtype == dtype for gradient in found[BATCH][0])
    for micro_batch in CUTS[1:]:
        for whole, cut in zip(found[BATCH], found[micro_batch], strict=True):
            assert apart(whole, cut) <= BOUNDS[dtype], micro_batch


@pytest.mark.parametrize("dtype", BOUNDS)
def test_it_is_the_same_after_a_resume(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of an epoch and begun again from its checkpoint, each way of cutting goes on with the same gradients."""
    seen: list[list[Tensor]] = []
    update = Updates.step

    def recording(self: Updates, lr: float, loss: Tensor) -> tuple[Tensor, bool]:
        seen.append([p.grad.clone() for p in self._trainable if p.grad is not None])
        return update(self, lr, loss)

    monkeypatch.setattr(Updates, "step", recording)
    found: Mapping[int, list[list[Tensor]]] = {}
    for micro_batch in (8, 4, 1):
        seen.clear()
        asked = config({"optimizer": "sgd", "micro_batch": micro_batch, "max_steps": 5, "lr": 1e-3})
        for link in (Script({4 * (8 // micro_batch): LEAVE}), Script()):
            task = Fusion()
            task.dtype = dtype
            run(tmp_path / str(micro_batch), asked, link, task)
            assert len(seen) == 5 if link.commands == {} and len(seen) > 4 else 0 < len(seen) < 5
        found = {**found, micro_batch: list(seen)}
    for micro_batch in (4, 1):
        assert all(apart(whole, cut) <= BOUNDS[dtype] for whole, cut in zip(found[8], found[micro_batch], strict=True))
