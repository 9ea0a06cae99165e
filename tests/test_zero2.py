"""DeepSpeed's ZeRO-2 with the optimizer on the CPU: what a run with it promises, held with the real package, on a CPU over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_memory_faults import Runs, strike
from tests.toy import LEAVE, Script, Toy, config, lines, run, same, weights
from tests.trainers import RunningTrainer, killed_and_ended, new_run, outcome
from trainerd.config.model import RunConfig
from trainerd.contract.errors import ConfigError, TrainerdError, UsageError
from trainerd.contract.paths import Home
from trainerd.engine import eager, zero2
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.zero2 import Zero2

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'trainerd[deepspeed]' (Linux)"
)
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ZERO2 = {"offload": "zero2"}
_PARTS = 6
_PATIENT_SECONDS = 90  # DeepSpeed's import, beside other tests
VARIANTS: dict[str, dict[str, Any]] = {
    "accumulated": {"micro_batch": 3, "eval_every_steps": 4},
    "clipped hard": {"micro_batch": 2, "max_grad_norm": 0.05},
    "not clipped": {"optimizer": "sgd", "max_grad_norm": None},
    "fp16": {"precision": "fp16", "micro_batch": 4},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_same_training_and_resumes_to_the_last_bit(variant: str, tmp_path: Path) -> None:
    """Whatever accumulates (in uneven pieces), clips or scales: after 21 steps the weights are those of a run without, within 1e-6
    (DeepSpeed sums the norm in another order); left and resumed, nothing differs."""
    asked = config(VARIANTS[variant], memory=ZERO2)
    run(tmp_path / "plain", config(VARIANTS[variant]))
    link = Script()
    run(tmp_path / "whole", asked, link)
    assert link.of("plan")[-1]["offload"] == "zero2"
    plain, whole = weights(tmp_path / "plain"), weights(tmp_path / "whole")
    assert all(torch.allclose(plain[name], whole[name], rtol=0, atol=1e-6) for name in plain)
    assert run(tmp_path / "parts", asked, Script({9: LEAVE})).outcome == "left"
    assert run(tmp_path / "parts", asked, Script({7: LEAVE})).outcome == "left"
    run(tmp_path / "parts", asked)
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_afterwards_the_process_is_as_before(tmp_path: Path) -> None:
    """Another training in it is the one it would have been, and nothing in the environment says that processes work together."""
    run(tmp_path / "first", config())
    run(tmp_path / "with", config(memory=ZERO2))
    assert not {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)
    run(tmp_path / "after", config())
    assert same(tmp_path / "first", tmp_path / "after")


@pytest.mark.parametrize("first", ["none", "zero2"])
def test_it_may_come_and_go_when_a_run_is_resumed(first: str, tmp_path: Path) -> None:
    """A state has the same form with and without; that the last bits differ from there on is said."""
    other = {"none": "zero2", "zero2": "none"}[first]
    assert run(tmp_path, config({"micro_batch": 3}, memory={"offload": first}), Script({9: LEAVE})).outcome == "left"
    link = Script()
    assert run(tmp_path, config({"micro_batch": 3}, memory={"offload": other}), link).outcome == "finished"
    assert "resumed with the optimizer on" in link.of("exact")[-1]["because"]
    assert link.of("exact")[-1]["since_step"] is not None


def test_a_checkpoint_holds_all_of_it_as_plain_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight's own moments and steps as those of a run without, read by weights_only; the masters are the weights to the bit, so they
    are in it once."""
    masters: list[torch.Tensor] = []
    original = Zero2.close

    def close(self: Zero2) -> None:
        for places, group in zip(self._places, self._optimizer.param_groups, strict=True):
            for place in places:
                masters.append(torch.equal(group["params"][0][place.begin : place.end].view(place.weight.shape), place.weight))
        original(self)

    monkeypatch.setattr(Zero2, "close", close)
    states = []
    for offload in ("none", "zero2"):
        run(tmp_path / offload, config({"micro_batch": 3}, memory={"offload": offload}))
        found = CheckpointStore(Home(tmp_path / offload).run("toy").checkpoints, keep=3, keep_best=True).load(None)
        assert found is not None
        states.append(found[0])
    assert masters and all(masters)
    plain, state = states
    assert state.keys() == plain.keys() and state["model"].keys() == plain["model"].keys()
    groups, known = ([group["params"] for group in one["optimizer"]["param_groups"]] for one in (state, plain))
    assert groups == known
    for number in (number for group in groups for number in group):
        one, other = state["optimizer"]["state"][number], plain["optimizer"]["state"][number]
        assert one.keys() == other.keys() and float(one["step"]) == float(other["step"]) == 21
        for name in ("exp_avg", "exp_avg_sq"):
            assert one[name].dtype == torch.float32 and torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-7) and one[name].any()


def test_an_out_of_memory_at_any_allocation_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 97th allocation of a whole run, those of DeepSpeed's buffers, hooks and step among them: what it has begun is taken out
    of it, and the run has the bits of one that had this micro-batch from there."""
    train = {"max_steps": 5, "micro_batch": 4, "eval_every_steps": 3}
    runs = Runs(tmp_path, config(train, checkpoint={"every_steps": 2, "exact": True}, memory=ZERO2))
    number = 1
    while _strike(number, runs, monkeypatch):
        number += 97
    assert number > 400, "the run is shorter than it was: fewer places are looked at"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(_PARTS))
def test_an_out_of_memory_at_every_allocation(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for each of them, in parts: half a second of a processor for each, of more than a thousand."""
    train = {"max_steps": 5, "micro_batch": 4, "eval_every_steps": 3}
    runs = Runs(tmp_path, config(train, checkpoint={"every_steps": 2, "exact": True}, memory=ZERO2))
    number = 1 + part
    while _strike(number, runs, monkeypatch):
        number += _PARTS
    assert number > 400, "the run is shorter than it was: fewer places are looked at"
    print(f"\nup to allocation {number - 1}, one in {_PARTS} failed")


def _strike(number: int, runs: Runs, patch: pytest.MonkeyPatch) -> bool:
    """False: the run has fewer allocations. Half way through the optimizer the error is raised, and a restart ends with the same bits."""
    try:
        return strike(number, runs, runs._configuration, patch)
    except torch.OutOfMemoryError:
        home = runs._folder / str(next(runs._numbers) - 1)
        run(home, runs._configuration)
        assert same(home, runs.calm(None, patch)), f"allocation {number}"
        return True


def test_a_step_broken_off_in_any_hook_is_forgotten(tmp_path: Path) -> None:
    """In the first or the second micro-batch, before or after each weight's gradient has reached DeepSpeed: as if it had not begun."""

    class Fails(Toy):
        """Fails once, when the n-th gradient of step 4 is made."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.left = number

        def model(self) -> nn.Module:
            model = super().model()
            for weight in model.parameters():
                weight.register_hook(self._count)
            return model

        def _count(self, gradient: torch.Tensor) -> torch.Tensor:
            if self.ctx.training and self.ctx.step == 4:
                self.left -= 1
                if self.left == 0:
                    raise OOM
            return gradient

    train = {"micro_batch": 4, "max_steps": 7}
    runs = Runs(tmp_path, config(train, memory=ZERO2))
    with pytest.MonkeyPatch.context() as patch:
        reference = runs.calm((5, 2), patch)
    for number in range(1, 7):
        home = runs.home()
        link = Script()
        run(home, config(train, memory=ZERO2), link, Fails(number))
        assert link.of("plan")[-1]["micro_batch"] == 2
        assert same(home, reference), f"gradient {number}"


def test_an_optimizer_that_failed_half_way_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One group of weights has been stepped and the other not: only a checkpoint helps, and a restart begins from there."""
    original, calls = eager.plain(torch.optim.AdamW).step, []

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        calls.append(1)
        if len(calls) == 11:  # two groups: the second half of a step, the first call made the states
            raise OOM
        return original(self, closure)

    asked = config(memory=ZERO2)
    run(tmp_path / "ample", asked)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(eager.plain(torch.optim.AdamW), "step", step)
        run(tmp_path / "tight", asked)
    run(tmp_path / "tight", asked)
    assert same(tmp_path / "ample", tmp_path / "tight")


def test_a_step_of_no_finite_number_changes_nothing(tmp_path: Path) -> None:
    """It is left out, running statistics and all, and the steps after it are those of a run without DeepSpeed within 1e-6."""

    class Infinite(Toy):
        def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
            losses, metrics = super().loss(model, batch, ctx)
            factor = float("inf") if ctx.training and ctx.step == 4 else 1.0
            return {name: (value * factor, weight) for name, (value, weight) in losses.items()}, metrics

    for name in ("none", "zero2"):
        run(tmp_path / name, config({"micro_batch": 3}, faults={"nan_steps": 2}, memory={"offload": name}), task=Infinite())
    plain, other = weights(tmp_path / "none"), weights(tmp_path / "zero2")
    assert all(torch.allclose(plain[name], other[name], rtol=0, atol=1e-6) for name in plain)
    assert lines(tmp_path / "zero2")[4]["loss"] is None


def test_weights_that_a_task_changes_itself_stay_changed(tmp_path: Path) -> None:
    """DeepSpeed's masters take over what somebody else has written into a weight."""

    class Clips(Toy):
        def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
            with torch.no_grad():
                model.mix.weight.clamp_(-0.1, 0.1)
            return super().loss(model, batch, ctx)

    for name in ("none", "zero2"):
        run(tmp_path / name, config(memory={"offload": name}), task=Clips())
    plain, other = weights(tmp_path / "none"), weights(tmp_path / "zero2")
    assert all(torch.allclose(plain[name], other[name], rtol=0, atol=1e-6) for name in plain)


class Sometimes(Toy):
    """Uses one weight only in the first of a window's micro-batches: DeepSpeed would lose its gradient."""

    micro = 0

    def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
        losses, metrics = super().loss(model, batch, ctx)
        self.micro += ctx.training
        if ctx.training and self.micro == 4:
            value, weight = losses["tokens"]
            logits = model.out(model.embed(batch[:, :-1].clamp(min=0)))  # past the mix
            losses = {"tokens": (logits.square().mean() + 0 * value.detach(), weight)}
        return losses, metrics


def test_a_weight_without_a_gradient_in_one_micro_batch_stops_the_run(tmp_path: Path) -> None:
    """By name, before a step was taken with an old gradient; a task that says so beforehand is refused before the first step."""
    with pytest.raises(UsageError, match=r"2 of 3 trainable weights have no gradient: mix\.weight, mix\.bias"):
        run(tmp_path / "a", config({"micro_batch": 4}, memory=ZERO2), task=Sometimes())
    task = Toy()
    task.sometimes_unused = ("mix.*",)
    with pytest.raises(ConfigError, match=r"memory\.offload = zero2: the task says that some batches do not use mix"):
        run(tmp_path / "b", config(memory=ZERO2), task=task)


@pytest.mark.parametrize(("wrong", "said"), [({"stage": 1}, "ZeRO's stage: 1, not 2"), ({"offload_optimizer": None}, "on the CPU: False")])
def test_what_is_not_active_is_not_believed(wrong: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When DeepSpeed does something else than it was asked, the run stops, and says what."""
    import deepspeed

    original = deepspeed.initialize

    def initialize(config: dict[str, Any], **more: Any) -> Any:
        return original(config={**config, "zero_optimization": {**config["zero_optimization"], **wrong}}, **more)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    with pytest.raises(TrainerdError, match=f"does something else.*{said}"):
        run(tmp_path, config(memory=ZERO2))


def test_without_the_package_it_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a library user too, whom no client has told."""
    monkeypatch.setattr(zero2, "_installed", lambda: None)
    with pytest.raises(ConfigError, match=r"pip install 'trainerd\[deepspeed\]'"):
        run(tmp_path, config(memory=ZERO2))


def test_its_configuration_is_in_the_runs_folder_and_a_persons_own_is_followed(tmp_path: Path) -> None:
    """Edited between two starts it is read again; moved away, the run goes on with what it was given last."""
    own = tmp_path / "mine.json"
    home = tmp_path / "home"
    memory = {"offload": "zero2", "deepspeed_config": str(own)}

    def given(bucket: int | None, left: bool) -> int:
        if bucket is not None:
            own.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 2, "reduce_bucket_size": bucket}}))
        run(home, config({"micro_batch": 4}, memory=memory), Script({6: LEAVE}) if left else None)
        written = json.loads((Home(home).run("toy").folder / "ds_config.json").read_text("utf-8"))
        assert (written["train_batch_size"], written["train_micro_batch_size_per_gpu"], written["gradient_accumulation_steps"]) == (8, 4, 2)
        return int(written["zero_optimization"]["reduce_bucket_size"])

    assert given(100, left=True) == 100
    assert given(200, left=True) == 200
    own.unlink()
    assert given(None, left=False) == 200
    run(tmp_path / "plain", config({"micro_batch": 4}, memory=ZERO2))
    assert weights(home).keys() == weights(tmp_path / "plain").keys()


def test_a_killed_trainer_resumes_to_the_last_bit(tmp_path: Path) -> None:
    """kill -9 of a real trainer process after a checkpoint: every step's numbers and the model are those of one that was not."""
    memory = RunConfig.model_validate({"memory": ZERO2}).memory
    whole = RunningTrainer(new_run(tmp_path / "whole", memory=memory))
    assert whole.exit_code(_PATIENT_SECONDS) == 0, whole.text()[-3000:]
    paths = new_run(tmp_path / "killed", memory=memory)
    assert killed_and_ended(paths, _PATIENT_SECONDS) == outcome(whole.paths)
