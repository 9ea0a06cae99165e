"""A loss, gradient or weight that is no number: noticed before anything is made of it, and the batch is named."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import Script, Toy, config, lines, run
from trainerd.contract import wire
from trainerd.contract.errors import NotFinite, TrainerdError
from trainerd.contract.paths import Home
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.finite import FiniteWatch

EXACT: dict[str, Any] = {"checkpoint": {"every_steps": 1, "exact": True}}


class Bad(Toy):
    """From step `at` (counted from 1), for `steps` steps, the loss is multiplied by `factor`."""

    at, steps, factor = 9, 1000, float("nan")

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        losses, more = super().loss(model, batch, ctx)
        bad = ctx.training and self.at <= ctx.step + 1 < self.at + self.steps
        return {name: (value * self.factor if bad else value, weight) for name, (value, weight) in losses.items()}, more


class BadGradient(Toy):
    """A finite loss whose gradient is none: the square root at zero."""

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        losses, more = super().loss(model, batch, ctx)
        weight = next(model.parameters())
        extra = torch.sqrt((weight * 0).sum()) if ctx.step + 1 >= 9 else 0.0
        return {name: (value + extra, weight_of) for name, (value, weight_of) in losses.items()}, more


def states(home: Path) -> list[dict[str, Any]]:
    folder = Home(home).run("toy").checkpoints
    found = [CheckpointStore(folder).read_step(int(p.stem.rpartition("_")[2])) for p in folder.glob("checkpoint_*.json")]
    return [state for state in found if state is not None]


@pytest.mark.parametrize("policy", ["rollback", "stop"])
def test_the_first_bad_step_ends_the_training_and_names_its_samples(tmp_path: Path, policy: str) -> None:
    """An error a person can use, an event with the dataset indices, and no checkpoint with a weight that is no number."""
    link, task = Script(), Bad()
    with pytest.raises(TrainerdError, match=r"The loss is not a finite number any more at step 9 \(epoch 2, samples ") as caught:
        run(tmp_path, config(faults={"nan": policy}, **EXACT), link, task)
    assert isinstance(caught.value, NotFinite) and caught.value.for_good == (policy == "stop")
    (told,) = link.of(wire.NAN)
    assert (told["step"], told["epoch"], told["what"], told["policy"], told["num_samples"]) == (9, 2, "the loss", policy, 8)
    seen = Bad()
    with pytest.raises(NotFinite):
        run(tmp_path / "again", config(faults={"nan": policy}, train={"eval_every_steps": 100}, **EXACT), Script(), seen)
    assert sorted(told["samples"]) == sorted(seen.train_samples.log[50 + 8 : 50 + 16])
    assert sorted(state["step"] for state in states(tmp_path)) == [6, 7, 8]
    assert all(torch.isfinite(tensor).all() for state in states(tmp_path) for tensor in state["model"].values())
    assert not Home(tmp_path).run("toy").result.exists()


def test_a_bad_gradient_is_as_bad_as_a_bad_loss(tmp_path: Path) -> None:
    """The loss is fine, the update would not be."""
    with pytest.raises(NotFinite, match="The gradient is not a finite number any more at step 9"):
        run(tmp_path, config(**EXACT), Script(), BadGradient())
    assert max(state["step"] for state in states(tmp_path)) == 8


def test_a_bad_weight_behind_good_numbers_is_never_saved(tmp_path: Path) -> None:
    """What the numbers do not show is found when the weights are about to be saved, by name."""

    class Poisons(Toy):
        def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
            if ctx.step + 1 == 9 and ctx.training:
                self.poison = model
            return super().loss(model, batch, ctx)

    class After(Script):
        def send(self, event: str, **fields: Any) -> None:
            super().send(event, **fields)
            if event == wire.PROGRESS and fields["step"] == 9:
                task.poison.mix.bias.data[0] = float("inf")

    task = Poisons()
    with pytest.raises(NotFinite, match=r"The weight mix\.bias is not a finite number any more at step"):
        run(tmp_path, config(train={"eval_every_steps": 9}, **EXACT), After(), task)
    assert all(torch.isfinite(tensor).all() for state in states(tmp_path) for tensor in state["model"].values())


def test_so_many_bad_steps_in_a_row_are_left_out(tmp_path: Path) -> None:
    """faults.nan_steps: nothing is learned from them, the weights stay good; one more in a row is a fault that names the first."""

    class Twice(Bad):
        steps = 2

    run(tmp_path / "two", config(faults={"nan_steps": 2}), Script(), Twice())
    assert [line["step"] for line in lines(tmp_path / "two") if "eval" not in line and line["loss"] is None] == [9, 10]
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "two") if line.get("step", 0) > 10 and "loss" in line)
    with pytest.raises(NotFinite, match="at step 9 "):
        run(tmp_path / "one", config(faults={"nan_steps": 1}), Script(), Twice())
    with pytest.raises(NotFinite):
        run(tmp_path / "none", config(faults={"nan_steps": 0}), Script(), Twice())


def watch(scale: float | None, **faults: Any) -> FiniteWatch:
    class Scaler:
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)

    if Scaler.scaler is not None:
        Scaler.scaler.scale(torch.ones(()))  # its scale exists from the first use on
    return FiniteWatch(config(faults=faults).faults, torch.nn.Linear(2, 2), Scaler(), lambda step: [step] * 40, lambda *_, **__: None)  # type: ignore[arg-type]


def line(step: int, loss: float | None = 1.0, grad_norm: float | None = 1.0) -> dict[str, Any]:
    return {"step": step, "epoch": 1, "loss": loss, "grad_norm": grad_norm}


def test_a_step_that_fp16_leaves_out_is_no_fault_but_a_collapsed_scale_is() -> None:
    """The scaler overflows now and then to find its scale; when it has halved it to nothing the gradient itself is bad."""
    watch(65536.0).look([line(1, grad_norm=None)] * 20)
    with pytest.raises(NotFinite, match="The gradient, at any scale, is not a finite number any more at step 1"):
        watch(1e-5).look([line(1, grad_norm=None)])
    with pytest.raises(NotFinite, match="The loss"):
        watch(65536.0).look([line(1, loss=None)])
    with pytest.raises(NotFinite, match=r"samples 0(, 0){15}, … \(40 in all\)"):
        watch(None).look([line(1, grad_norm=None)])


def test_bad_steps_count_only_in_a_row() -> None:
    """A good step in between begins the count anew."""
    looking = watch(None, nan_steps=1)
    looking.look([line(1, loss=None), line(2), line(3, loss=None), line(4)])
    with pytest.raises(NotFinite, match="at step 5 "):
        looking.look([line(5, loss=None), line(6, loss=None)])
