"""What lies on the host in the estimate of a traced model: a streamed base, and an optimizer; held against runs that are counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.memory_oracle import TensorCount
from tests.test_memory_fitting import CPU, DeepToy, bound, counted
from tests.toy import Blocks, Script, Toy, config
from trainerd.config.model import RunConfig
from trainerd.contract.errors import ConfigError
from trainerd.contract.paths import Home
from trainerd.engine import checkpointing, fitting
from trainerd.engine import plan as plans
from trainerd.engine.streaming import Copies, Stream
from trainerd.engine.trace import trace
from trainerd.engine.trainer import Trainer
from trainerd.memory import forecast, traced
from trainerd.memory.estimate import estimate
from trainerd.memory.planner import FITS, Answer
from trainerd.memory.timeline import Setup

_WIDTH, _BLOCKS = 96, 6


class Adapted(nn.Module):
    """Two frozen matrices with a small learned one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(_WIDTH, 4 * _WIDTH).requires_grad_(False)
        self.down = nn.Linear(4 * _WIDTH, _WIDTH).requires_grad_(False)
        self.first, self.second = nn.Linear(_WIDTH, 4, bias=False), nn.Linear(4, _WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x))) + self.second(self.first(x))


class Lora(Blocks):
    def __init__(self) -> None:
        super().__init__(Adapted, _BLOCKS, _WIDTH)


class LoraToy(Toy):
    model_kind = Lora

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]


BLOCK_BYTES = 4 * (2 * 4 * _WIDTH * _WIDTH + 4 * _WIDTH + _WIDTH)


def table_of(task: Toy, tmp_path: Path, precision: str = "fp32") -> tuple[traced.TracedTable, nn.Module, Any]:
    model, mixed = bound(task, tmp_path, precision)
    found = trace(task, model, task.train_samples, mixed, 32)
    assert found is not None
    return found, model, mixed


@pytest.mark.parametrize(
    ("device", "again", "precision"),
    [  # each pair of them; the slow ones bring no new pair
        ("cuda", "selective", "bf16"), ("cuda", "full", "fp32"), ("cpu", "selective", "fp32"), ("cpu", "full", "bf16"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (
            ("cuda", "selective", "fp32"), ("cuda", "full", "bf16"), ("cpu", "selective", "bf16"), ("cpu", "full", "fp32"),
        )),
    ],
)  # fmt: skip
def test_a_streamed_base_is_foretold(tmp_path: Path, device: str, again: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half a percent of what is counted while the base is really streamed (one block ahead, as to a GPU), also far from the two
    and four samples of the trace: one block's copy or two in place of six; what stays on the host is told as RAM, and to the byte what
    the engine asks to pin for a GPU."""
    task, pinned = LoraToy(), list[int]()
    monkeypatch.setattr("trainerd.engine.streaming.pin", lambda numbers: pinned.append(numbers.nbytes) or True)
    found, model, mixed = table_of(task, tmp_path, precision)
    assert found.offers == ("selective", "full", "base") and sum(found.streamed) == _BLOCKS * BLOCK_BYTES
    streamed, weights = sum(found.streamed), sum(p.numel() * p.element_size() for p in model.parameters())
    copies = Copies()
    copies.ahead = device == "cuda"
    stream = Stream(model, task.blocks(model), CPU, copies)
    if device == "cuda":
        stream._pin()  # as it does by itself where the device is one
    checkpointing.wrap(model, task.blocks(model), again)
    for samples in (8, 32):
        line = found.timeline(Setup(device, precision, samples, 2 * samples, offload="base", checkpointing=again))
        truth = counted(task, model, mixed, samples)
        model.zero_grad()
        beside = line.state_bytes + (weights - streamed if device == "cuda" else weights + line.weight_bytes + line.state_bytes)
        assert line.peak - beside == pytest.approx(truth, rel=0.005)
        assert line.pinned_bytes == line.streamed_bytes == sum(pinned) == (streamed if device == "cuda" else 0)
        resident = found.timeline(Setup(device, precision, samples, 2 * samples, checkpointing=again))
        if device == "cuda" and samples == 8:
            assert 3 * BLOCK_BYTES < resident.peak - line.peak < 5.1 * BLOCK_BYTES
            assert line.host_bytes - resident.host_bytes == streamed


def test_a_model_without_a_frozen_base_offers_none(tmp_path: Path) -> None:
    """Nothing more is traced; and asked for, it is refused in words, by the plan already."""
    found, _, _ = table_of(DeepToy(), tmp_path)
    assert "base" not in found.offers and set(found.modes) == {"none", "selective", "full"}
    with pytest.raises(ConfigError, match=r"memory\.offload = base: .* no frozen weight .*linear layers in 4 or 8 bits"):
        _plan(found, 10**9, memory={"offload": "base"})


def _larger(table: traced.TracedTable, times: int) -> traced.TracedTable:
    """The same model with everything so many times as large: for an allocator whose smallest piece is 2 MiB."""

    def more(some: list[traced.Trace]) -> list[traced.Trace]:
        return [replace(one, sizes=[size * times for size in one.sizes]) for one in some]

    modes = {name: traced.Traces(more(both.steps), more(both.held_out)) for name, both in table.modes.items()}
    weights = [(dtype, [times * shape[0], *shape[1:]]) for dtype, shape in table.weights]
    frozen, streamed = ([size * times for size in some] for some in (table.frozen, table.streamed))
    return replace(table, modes=modes, weights=weights, frozen=frozen, streamed=streamed)


def _plan(table: traced.TracedTable, budget: float, ram: int | None = None, memory: dict[str, Any] | None = None, **train: Any) -> Answer:
    train = {"batch_size": 32, "precision": "fp32", **train}
    asked = RunConfig.model_validate({"task": "a", "train": train, "memory": memory or {}})
    return forecast.answer(asked, forecast.Place("cuda", int(budget), "fp32", ram_bytes=ram), table)


def test_a_base_is_taken_to_the_host_when_nothing_smaller_helps(tmp_path: Path) -> None:
    """By the plan itself, with blocks that are computed again, where even one sample at a time would not fit beside all of the base; not
    without room for it in RAM, and never where a person said no: then it is proposed, and fits when it is applied."""
    found = _larger(table_of(LoraToy(), tmp_path)[0], 200)

    def least(offload: str) -> float:
        return estimate(found, Setup("cuda", "fp32", 1, 32, offload=offload, checkpointing="full")).needed.upper

    budget = (least("base") + min(least("none"), least("optimizer"))) / 2
    answer = _plan(found, budget)
    assert answer.verdict == FITS and answer.setup.offload == "base" and "frozen base on the CPU" in answer.used
    assert answer.setup.checkpointing in ("selective", "full")
    assert _plan(found, budget, ram=10**6).setup.offload != "base"
    fixed = _plan(found, budget, memory={"offload": "none"})
    assert fixed.setup.offload == "none" and fixed.verdict != FITS and fixed.proposals
    wanted = [dict(setting.split("=") for setting in proposal.settings) for proposal in fixed.proposals]
    assert any(one.get("memory.offload") == "base" for one in wanted)
    for one in wanted:
        train = {key.removeprefix("train."): value for key, value in one.items() if key.startswith("train.")}
        changed = _plan(found, budget, memory={"offload": one.get("memory.offload", "none")}, **train)
        assert changed.verdict == FITS and changed.estimate.needed.upper <= budget, one


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_that_leave_are_foretold_of_a_traced_model_too(tmp_path: Path, accumulation: int) -> None:
    """memory.offload=optimizer: states and masters on the host, each gradient gone when it is complete, as counted; the host has them."""
    task = DeepToy()
    found, model, _ = table_of(task, tmp_path)
    setup = Setup("cuda", "fp32", 8, 8 * accumulation, offload="optimizer")
    line, plain = found.timeline(setup), found.timeline(Setup("cuda", "fp32", 8, 8 * accumulation))
    longest = int(task.train_samples.lengths.argmax())
    batch = task.collate([task.train_samples[longest]] * 8)
    task.ctx.sample_ids = [longest] * 8

    def leave(weight: torch.Tensor) -> None:
        weight.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(leave)
    with TensorCount([*model.parameters()]) as count:
        losses, _ = task.loss(model, batch, task.ctx)
        losses["tokens"][0].backward()
        del losses
    assert line.peak == pytest.approx(count.peak, rel=0.02)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert line.host_bytes - plain.host_bytes == line.pinned_bytes + line.state_bytes and line.pinned_bytes > 2 * weights
    assert line.state_bytes == plain.state_bytes and line.peak < plain.peak - line.state_bytes
    here = found.timeline(Setup("cpu", "fp32", 8, 8 * accumulation, offload="optimizer"))
    assert here.host_bytes == here.pinned_bytes == 0 and here.resting_bytes > 2 * line.state_bytes


def test_a_streamed_run_has_a_forecast_and_a_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, it is foretold like any other; left open, a trainer without room takes it up by itself, aloud."""
    link = Script()
    Trainer(LoraToy(), config({"max_steps": 3}, memory={"offload": "base"}), home=tmp_path, link=link, traces=True).train()
    assert not [event for event in link.of("note") if event["kind"] == "no_memory_estimate"]
    document = json.loads((Home(tmp_path).run("toy").folder / "receipt.json").read_text("utf-8"))
    assert document["predicted"]["ram_bytes"] > 0 and document["trace"]
    task = LoraToy()
    small, model, mixed = table_of(task, tmp_path)
    found = _larger(small, 200)
    needs = [estimate(found, Setup("cuda", "fp32", 1, 32, offload=kind, checkpointing="full")).needed.upper for kind in ("base", "none")]
    monkeypatch.setattr(fitting, "_place", lambda *_: forecast.Place("cuda", int(sum(needs) / 2), "fp32"))
    monkeypatch.setattr(fitting, "_traced", lambda *_: (found, 0))
    asked, open_link = config({"batch_size": 32}), Script()
    plan = {**plans.resolve(asked, task), "open": True}
    fitting.foresee(task, model, task.train_samples, asked, plan, Home(tmp_path).run("toy"), mixed, open_link.send, traces=True)
    assert plan["offload"] == "base" == open_link.of("plan")[0]["offload"] and plan["activation_checkpointing"] in ("selective", "full")
