"""The trainer's own half: an open micro-batch is closed to fit, a model without a table is traced without a trace of it, receipts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.memory_oracle import TensorCount
from tests.toy import Script, Toy, ToyModel, config
from trainerd.contract.paths import Home
from trainerd.engine import checkpointing, fitting, receipt, rng
from trainerd.engine import plan as plans
from trainerd.engine.precision import Precision
from trainerd.engine.task import TaskContext
from trainerd.engine.trace import trace
from trainerd.engine.trainer import Trainer
from trainerd.memory import forecast, traced
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup, tells

CPU = torch.device("cpu")


class Wide(nn.Module):
    """Large enough that tensors, not rounding, decide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.inner = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Dropout(0.1), nn.Linear(256, 64))
        self.out = nn.Linear(64, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.out(x + self.inner(x))


class WideToy(Toy):
    model_kind = Wide


def bound(task: Toy, tmp_path: Path, precision: str = "fp32") -> tuple[nn.Module, Precision]:
    mixed = Precision(precision, CPU)
    task.bind(TaskContext(device=CPU, dtype=mixed.dtype, seed=0, cache_dir=tmp_path, data=config().data))
    torch.manual_seed(0)
    return task.model(), mixed


def counted(task: Toy, model: nn.Module, mixed: Precision, samples: int) -> int:
    """The tensor peak of one step with AdamW, beside weights and states, gradients from before included."""
    longest = int(task.train_samples.lengths.argmax())
    batch = task.collate([task.train_samples[longest]] * samples)
    task.ctx.sample_ids = [longest] * samples
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        p.grad = torch.zeros_like(p)
    with TensorCount([*model.parameters(), *model.buffers(), *(p.grad for p in learned if p.grad is not None)]) as count:
        with mixed.autocast():
            losses, _ = task.loss(model, batch, task.ctx)
        losses["tokens"][0].backward()
        del losses
    return count.peak - sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_traced_model_is_stretched_to_other_micro_batches(tmp_path: Path, precision: str) -> None:
    """Traced at 2 and 4 samples, it is within 2 % of the count at 1, 8 and 32: each size is a line in the samples."""
    task = WideToy()
    model, mixed = bound(task, tmp_path, precision)
    found = trace(task, model, task.train_samples, mixed, 32)
    assert found is not None and [t.samples for t in found.modes["none"].steps] == [2, 4]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for samples in (1, 8, 32):
        # A second micro-batch, with the gradients of the first: what counted() counts.
        line = found.timeline(Setup("cuda", precision, samples, samples * 2))
        states = line.state_bytes + weights
        truth = counted(task, model, mixed, samples)
        model.zero_grad()
        assert line.peak - states == pytest.approx(truth, rel=0.02), samples


class Deep(Wide):
    """The same with three blocks to compute again."""

    def __init__(self) -> None:
        super().__init__()
        del self.inner
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Tanh(), nn.Linear(256, 64)) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class DeepToy(Toy):
    model_kind = Deep

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_trace_knows_what_is_computed_again(tmp_path: Path, mode: str) -> None:
    """Each way is traced, and within 2 % of the count; computing again shows in the work, selectively hardly."""
    task = DeepToy()
    model, mixed = bound(task, tmp_path)
    found = trace(task, model, task.train_samples, mixed, 32)
    assert found is not None and found.offers == ("selective", "full")
    assert not any("forward" in vars(module) for module in model.modules())
    line = found.timeline(Setup("cuda", "fp32", 8, 16, checkpointing=mode))
    checkpointing.wrap(model, task.blocks(model), mode)
    truth = counted(task, model, mixed, 8)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert line.peak - line.state_bytes - weights == pytest.approx(truth, rel=0.02)
    once = found.timeline(Setup("cuda", "fp32", 8, 16)).flops
    assert once > 0 and line.flops == pytest.approx(once * (7 / 6 if mode == "full" else 1.0), rel=0.02)  # the last product is not needed


def test_an_open_plan_takes_up_checkpointing_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for the whole batch, and none to split it: the blocks are computed again, aloud, and the receipt foretells that."""

    class Whole(DeepToy):
        splittable = False

    task = Whole()
    model, mixed = bound(task, tmp_path)
    asked = config({"batch_size": 512})
    table = trace(task, model, task.train_samples, mixed, 512)
    assert table is not None
    needs = [estimate(table, Setup("cpu", "fp32", 512, 512, checkpointing=mode)).ram.upper for mode in ("none", "selective")]
    monkeypatch.setattr(fitting, "_place", lambda *_: forecast.Place("cpu", int(sum(needs) / 2), "fp32"))
    plan, link = plans.resolve(asked, task), Script()
    found = fitting.foresee(task, model, task.train_samples, asked, plan, Home(tmp_path), mixed, link.send, traces=True)
    assert plan["activation_checkpointing"] == "selective" == link.of("plan")[0]["activation_checkpointing"]
    predicted = found.predicted(plan, asked)
    assert predicted is not None and predicted.ram.upper == pytest.approx(needs[1])


def setup_of(table: traced.TracedTable, **more: Any) -> Setup:
    return replace(Setup("cpu", table.precision, 8, 8), **more)


def test_a_trace_answers_only_for_what_was_traced(tmp_path: Path) -> None:
    """Another precision, another attention, other logits: unknown. A batch that cannot be split, or of one: its own alone; of two and
    more: any, stretched. No bf16 is proposed by a trace of fp32."""
    task = WideToy()
    model, mixed = bound(task, tmp_path)
    found = trace(task, model, task.train_samples, mixed, 32, "math")
    assert found is not None and tells(found, setup_of(found, attention="math"))
    for other in ({"precision": "bf16"}, {"logits": "full"}, {"attention": "auto"}):
        assert not tells(found, setup_of(found, **{"attention": "math", **other})), other
    for batch, expected in ((1, [1]), (2, [1, 2]), (3, [1, 3]), (32, [2, 4])):
        found = trace(task, model, task.train_samples, mixed, batch)
        assert found is not None and [t.samples for t in found.modes["none"].steps] == expected
        assert tells(found, setup_of(found, micro_batch=64, effective_batch=64)) is (len(expected) > 1)
    task.splittable = False
    whole = trace(task, model, task.train_samples, mixed, 32)
    assert whole is not None and tells(whole, setup_of(whole, micro_batch=32, effective_batch=32))
    assert not tells(whole, setup_of(whole, micro_batch=64, effective_batch=64))
    asked = config({"batch_size": 32, "micro_batch": 32, "optimizer": "sgd"})
    answer = forecast.answer(asked, forecast.Place("cpu", 1000, "fp32"), whole, False)
    assert not any("precision" in setting for proposal in answer.proposals for setting in proposal.settings)


def test_tracing_leaves_no_trace(tmp_path: Path) -> None:
    """Random states, context, weights, gradients and buffers are what they were."""
    task = Toy()
    model, mixed = bound(task, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    context, states = dict(vars(task.ctx)), rng.take()
    assert trace(task, model, task.train_samples, mixed, 8) is not None
    assert vars(task.ctx) == context
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(states.torch, torch.get_rng_state()) and states.python == rng.take().python


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    """Written and read it says the same; another format, or damage, is no trace."""
    task = Toy()
    model, mixed = bound(task, tmp_path)
    found = trace(task, model, task.train_samples, mixed, 8)
    assert found is not None
    path = tmp_path / "traces" / "one.json"
    traced.write(path, found)
    again = traced.read(path)
    setup = Setup("cuda", "fp32", 8, 8)
    assert again is not None and again.timeline(setup).peak == found.timeline(setup).peak
    document = json.loads(path.read_text("utf-8"))
    for change in ({"format": 99}, {"modes": {"none": {"steps": [{"samples": 1}]}}}, {"format": None}):
        path.write_text(json.dumps({**document, **change}), encoding="utf-8")
        assert traced.read(path) is None
    path.write_text("{", encoding="utf-8")
    assert traced.read(path) is None


def test_a_model_that_cannot_be_traced_is_trained_all_the_same(tmp_path: Path) -> None:
    """Nothing is foretold, a note says why, and the whole batch is tried."""

    class Odd(ToyModel):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("this model is not to be copied")

    class OddToy(Toy):
        model_kind = Odd

    link = Script()
    Trainer(OddToy(), config({"max_steps": 3}), home=tmp_path, link=link, traces=True).train()
    notes = [event for event in link.of("note") if event["kind"] == "no_memory_estimate"]
    assert len(notes) == 1 and "not to be copied" in notes[0]["text"]
    document = json.loads((Home(tmp_path).run("toy").folder / "receipt.json").read_text("utf-8"))
    assert document["predicted"] == {} and document["real"]["ram_bytes"] > 0


def test_an_open_micro_batch_is_closed_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little room the plan splits the batch before the first step, aloud; a fixed micro-batch stays."""
    task = WideToy()
    model, mixed = bound(task, tmp_path)
    needs = forecast.answer(
        config({"batch_size": 4096}),
        forecast.Place("cpu", 1 << 40, "fp32"),
        trace(task, model, task.train_samples, mixed, 4096),  # type: ignore[arg-type]
    ).estimate.ram
    small = forecast.Place("cpu", int(needs.upper) - 20_000_000, "fp32")
    monkeypatch.setattr(fitting, "_place", lambda *_: small)
    for fixed, expected in ((False, range(2, 4096)), (True, range(4096, 4097))):
        asked = config({"batch_size": 4096, **({"micro_batch": 4096} if fixed else {})})
        plan, link = plans.resolve(asked, task), Script()
        fitting.foresee(task, model, task.train_samples, asked, plan, Home(tmp_path), mixed, link.send, traces=True)
        assert plan["micro_batch"] in expected and plan["effective_batch"] == 4096
        assert plan["grad_accum"] == -(-4096 // plan["micro_batch"]) and "open" not in plan
        assert bool(link.of("plan")) is not fixed


def test_a_plan_is_fitted_once(tmp_path: Path) -> None:
    """A resumed run keeps its recorded micro-batch, whatever fits now: another would change the last bits."""
    link = Script({4: {"do": "leave", "why": "pause", "save": True}})
    Trainer(Toy(), config({"max_steps": 9}), home=tmp_path, link=link, traces=True).train()
    recorded = link.of("plan")[-1]["record"]
    again = Script()
    Trainer(Toy(), config({"max_steps": 9}), home=tmp_path, link=again, traces=True).train()
    resumed = again.of("plan")[0]["record"]
    assert resumed["micro_batch"] == recorded["micro_batch"] and "open" not in resumed


def test_the_ram_peak_is_the_systems_own_count() -> None:
    """It is at least what the process holds now."""
    import psutil

    found = receipt.ram_peak_bytes()
    assert found is not None and found >= psutil.Process().memory_info().rss * 0.95
