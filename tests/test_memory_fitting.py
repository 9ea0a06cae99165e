"""The trainer's own half: an open micro-batch is closed to fit, a model without a table is traced without a trace of it, receipts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from tests.memory_oracle import TensorCount
from tests.toy import Samples, Script, Toy, ToyModel, config
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home
from trainerd.engine import attention, checkpointing, entry, fitting, peak, receipt, rng
from trainerd.engine import plan as plans
from trainerd.engine.precision import Precision
from trainerd.engine.task import TaskContext
from trainerd.engine.trace import trace
from trainerd.engine.trainer import Trainer
from trainerd.machine.memory import RamFacts
from trainerd.memory import forecast, traced
from trainerd.memory.estimate import estimate
from trainerd.memory.profile import Profile
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
    found = fitting.foresee(task, model, task.train_samples, asked, plan, Home(tmp_path).run("toy"), mixed, link.send, traces=True)
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


class Attending(Deep):
    """torch's attention over the places, before the blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        x = x + nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class AttendingToy(DeepToy):
    model_kind = Attending


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_a_trace_follows_the_kernel_of_attention(tmp_path: Path, kernel: str) -> None:
    """train.attention=math holds its table of scores, and that is what is traced: within 2 % of the count."""
    task = AttendingToy()
    model, mixed = bound(task, tmp_path)
    found = trace(task, model, task.train_samples, mixed, 32, kernel)
    assert found is not None
    line = found.timeline(Setup("cuda", "fp32", 8, 16, attention=kernel))
    with attention.for_trace(kernel):
        truth = counted(task, model, mixed, 8)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert line.peak - line.state_bytes - weights == pytest.approx(truth, rel=0.02)


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


def fitted(task: Toy, tmp_path: Path, room: forecast.Place, monkeypatch: pytest.MonkeyPatch, begun: bool = False, **train: Any) -> Script:
    """What a trainer says that has so much room."""
    model, mixed = bound(task, tmp_path)
    monkeypatch.setattr(fitting, "_place", lambda *_: room)
    asked, link = config(train), Script()
    plan = plans.resolve(asked, task)
    fitting.foresee(task, model, task.train_samples, asked, plan, Home(tmp_path).run("toy"), mixed, link.send, traces=True, begun=begun)
    assert "open" not in plan
    return link


class ManyToy(WideToy):
    """As many samples as are asked for; the longest is one of the real ones."""

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.train_samples.__class__ = type("Many", (Samples,), {"__len__": lambda self: 1_000_000})


def test_an_open_micro_batch_is_closed_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little room the plan splits the batch before the first step, aloud; a fixed micro-batch stays."""
    task = ManyToy()
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
        fitting.foresee(task, model, task.train_samples, asked, plan, Home(tmp_path).run("toy"), mixed, link.send, traces=True)
        assert plan["micro_batch"] in expected and plan["effective_batch"] == 4096
        assert plan["grad_accum"] == -(-4096 // plan["micro_batch"]) and "open" not in plan
        assert bool(link.of("plan")) is not fixed


def needs_of(tmp_path: Path, samples: int, **more: Any) -> Any:
    task = WideToy()
    model, mixed = bound(task, tmp_path)
    table = trace(task, model, task.train_samples, mixed, samples)
    assert table is not None
    return estimate(table, Setup("cpu", "fp32", samples, samples, **more)).ram


def test_what_is_too_large_for_a_cpu_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When what is likely is more than there is, however it is cut: exit 5, and the changes that help come first, within what a status
    shows. One byte of room for it: tried, with a warning, and so is what only the bound exceeds."""
    needs = needs_of(tmp_path, 100_000)
    whole = {"batch_size": 100_000, "micro_batch": 100_000}
    said = r"It does not fit: .* It would fit with --set train\.micro_batch=\d+ \([\d.]+ [GM]B at most\)"
    with pytest.raises(Refused, match=said) as error:
        fitted(ManyToy(), tmp_path, forecast.Place("cpu", int(needs.point) - 1, "fp32"), monkeypatch, **whole)
    assert error.value.exit_code == 5 and entry.verdict(error.value, retry_helps=True)[1]["permanent"]
    assert len(f"Refused: {error.value}") <= 300 and "\n" not in str(error.value)
    with pytest.raises(Refused, match="A smaller model would fit"):
        fitted(ManyToy(), tmp_path, forecast.Place("cpu", Profile().process_bytes + 1, "fp32"), monkeypatch, batch_size=8)
    with pytest.raises(Refused, match=r"No model fits: Python and torch alone need 388 MB of RAM\. Raise the limit"):
        fitted(ManyToy(), tmp_path, forecast.Place("cpu", 1000, "fp32"), monkeypatch, batch_size=8)
    for budget in (needs.point + 1, needs.upper - 1):
        link = fitted(ManyToy(), tmp_path, forecast.Place("cpu", int(budget), "fp32"), monkeypatch, **whole)
        assert "It is tried; past the limit" in link.of("warning")[0]["text"]


class Large(nn.Module):
    """Much weight, in RAM that nobody touches, and nothing that could be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(300_000, 1_000))


class LargeToy(Toy):
    model_kind = Large


def test_a_model_that_cannot_be_traced_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients, AdamW's two states and a checkpoint's copy of weights and states: seven times its 1.2 GB. Less room: refused
    before the first step, with what would need less; more: only foretold, and said why no more. A run with steps behind it goes on, a
    GPU is tried."""
    least = 7 * 1_200_000_000
    with pytest.raises(
        Refused, match=r"weights, their gradients.* alone it needs 8\.\d GB of RAM.* would fit with --set train.optimizer="
    ) as error:
        fitted(LargeToy(), tmp_path, forecast.Place("cpu", least, "fp32"), monkeypatch)
    assert error.value.exit_code == 5 and len(str(error.value)) <= 300
    for room, begun in ((2 * least, False), (1000, True)):
        link = fitted(LargeToy(), tmp_path, forecast.Place("cpu", room, "fp32"), monkeypatch, begun=begun)
        (told,) = link.of("memory")
        assert least < told["predicted_bytes"] < least + 1_000_000_000
        assert ["it could not be traced" in warning["text"] for warning in link.of("warning")] == ([] if begun else [True])
    said = fitted(LargeToy(), tmp_path, forecast.Place("cuda", 4_000_000_000, "fp32"), monkeypatch).of("warning")[1]["text"]
    assert "GB of GPU memory" in said and "It is tried" in said


def test_what_has_trained_is_never_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with steps behind it goes on, whatever room there is now; and a batch larger than all the data is no larger than the data."""
    link = fitted(ManyToy(), tmp_path, forecast.Place("cpu", 1000, "fp32"), monkeypatch, begun=True, batch_size=100_000)
    assert not link.of("warning") and not link.of("plan")
    room = forecast.Place("cpu", int(needs_of(tmp_path, 100).upper), "fp32")
    assert not fitted(WideToy(), tmp_path, room, monkeypatch, batch_size=100_000, micro_batch=100_000).of("warning")
    assert not fitted(WideToy(), tmp_path, room, monkeypatch, batch_size=100_000).of("plan")


def test_a_resumed_run_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint, or with steps in its metrics, a trainer without any room trains on; without either it is refused."""
    link = Script({4: {"do": "leave", "why": "pause", "save": True}})
    Trainer(Toy(), config({"max_steps": 9}), home=tmp_path / "a", link=link, traces=True).train()
    monkeypatch.setattr(fitting, "_place", lambda *_: forecast.Place("cpu", 1000, "fp32"))
    assert Trainer(Toy(), config({"max_steps": 9}), home=tmp_path / "a", link=Script(), traces=True).train().outcome == "finished"
    with pytest.raises(Refused, match="It does not fit"):
        Trainer(Toy(), config({"max_steps": 9}), home=tmp_path / "b", link=Script(), traces=True).train()
    paths = Home(tmp_path / "c").run("toy")
    paths.folder.mkdir(parents=True)
    paths.metrics.write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
    assert Trainer(Toy(), config({"max_steps": 9}), home=tmp_path / "c", link=Script(), traces=True).train().outcome == "finished"


def test_on_a_gpu_what_would_help_is_printed_and_it_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its allocator says no by itself, and then no step is lost: a warning, with the changes that would make it fit."""
    whole = {"batch_size": 100_000, "micro_batch": 100_000}
    link = fitted(ManyToy(), tmp_path, forecast.Place("cuda", 900_000_000, "fp32"), monkeypatch, **whole)
    text = link.of("warning")[0]["text"]
    assert "running out of memory loses no step. It would fit with --set train.micro_batch=" in text


def test_a_limit_that_others_have_passed_bounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be kept by this training: then what the machine has left decides whether it fits."""
    monkeypatch.setattr(fitting.machine_memory, "ram", lambda: RamFacts(used_bytes=10_000_000_000, total_bytes=16_000_000_000))
    own = fitting.machine_memory.own_bytes()
    assert fitting._ram_left(config(memory={"ram_limit": "4GB"})) == pytest.approx(6e9 + own, rel=0.01)
    assert fitting._ram_left(config(memory={"ram_limit": "12GB"})) == pytest.approx(2e9 + own, rel=0.01)


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
    found = peak.ram_bytes()
    assert found is not None and found >= psutil.Process().memory_info().rss * 0.95


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_what_was_held_before_the_training_is_no_need_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The copy that a trace makes is forgotten; where the system cannot, a count that was never passed again tells nothing."""
    held = bytearray(300_000_000)
    held[:] = bytes(300_000_000)
    before = peak.ram_bytes()
    del held
    assert peak.begin_anew() == 0
    now = peak.ram_bytes()
    assert before is not None and now is not None and now < before - 150_000_000
    monkeypatch.setattr(peak, "_REFERENCES", tmp_path / "no such folder" / "clear_refs")
    known = peak.begin_anew()
    assert known == pytest.approx(now, rel=0.1)
    assert receipt._ram(fitting.Forecast(None, forecast.Place("cpu", 1, "fp32"), peak_before=known + 500_000_000)) is None


class Tight(Toy):
    """Runs out of memory once, in its fourth step."""

    def loss(self, model: nn.Module, batch: torch.Tensor, ctx: Any) -> Any:
        if ctx.training and ctx.step == 3 and len(batch) > 4:
            raise torch.OutOfMemoryError("Out of memory (made).")
        return super().loss(model, batch, ctx)


def test_a_receipt_says_when_its_plan_has_changed(tmp_path: Path) -> None:
    """After an out-of-memory the most was the larger plan's, and the forecast is the smaller one's: it counts for nothing. The next
    life, which has the smaller one from its beginning, counts again."""
    stop = {9: {"do": "leave", "why": "pause", "save": True}}
    for home, task, mixed in (("plain", Toy(), False), ("tight", Tight(), True)):
        Trainer(task, config({"max_steps": 12}), home=tmp_path / home, link=Script(dict(stop)), traces=True).train()
        path = Home(tmp_path / home).run("toy").folder / "receipt.json"
        document = json.loads(path.read_text("utf-8"))
        assert document["mixed"] is mixed and document["setup"]["precision"] == "fp32"
        Trainer(Toy(), config({"max_steps": 12}), home=tmp_path / home, link=Script(), traces=True).train()
        assert json.loads(path.read_text("utf-8"))["mixed"] is False
