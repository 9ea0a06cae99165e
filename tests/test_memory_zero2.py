"""What DeepSpeed's ZeRO-2 needs, foretold: held against trainings with the real package in which every tensor is counted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import zero2
from tests.memory_oracle import TensorCount
from tests.person import Person
from tests.test_memory_fitting import DeepToy, bound
from tests.test_memory_offload import table_of
from tests.toy import LEAVE, Script, Toy, config, run, same, weights
from trainerd.config import deepspeed
from trainerd.config.model import RunConfig
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home
from trainerd.engine import fitting, optimizers
from trainerd.engine.precision import Precision
from trainerd.engine.zero2 import Zero2
from trainerd.memory import forecast
from trainerd.memory.planner import FITS
from trainerd.memory.profile import Profile
from trainerd.memory.tape import Tape
from trainerd.memory.techniques import TECHNIQUES
from trainerd.memory.timeline import STEP, Setup
from trainerd.memory.zero2 import Buckets, Partitions

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'trainerd[deepspeed]' (Linux)"
)
ZERO2 = {"offload": "zero2"}


@installed
@pytest.mark.parametrize(
    ("name", "micro_batch", "optimizer", "buckets"),
    [
        ("gpt", 4, "adamw", Buckets()),
        ("llama-lora", 2, "adam", Buckets(20_000)),
        ("convnet", 8, "sgd", Buckets(100_000, 2)),
        ("gru-mn", 8, "adamw", Buckets(50_000)),
    ],
)
def test_a_training_with_it_needs_what_is_foretold(name: str, micro_batch: int, optimizer: str, buckets: Buckets, tmp_path: Path) -> None:
    """Within 1 % of the count, and not beyond the bound: with one micro-batch a step and with several, buckets as large as all gradients,
    smaller ones, two, and gradients larger than a bucket."""
    truth = zero2.needed(name, micro_batch, optimizer, buckets, tmp_path)
    found = zero2.foretold(name, micro_batch, optimizer, buckets)
    assert found.tensors == pytest.approx(truth, rel=0.01) and truth <= found.ram.upper


class _Held(TensorCount):
    """Beside all of it, what the device would hold: without what DeepSpeed has in RAM, which stays once it is there."""

    def peak_without(self, in_ram: int, since: int) -> int:
        return max(live for _, _, live in self.log[since:]) - in_ram


def _in_ram(engine: Zero2) -> list[torch.Tensor]:
    """By DeepSpeed's own names."""
    zero = engine._zero
    groups = [t for master in zero.single_partition_of_fp32_groups for t in (master, master.grad)]
    states = [value for state in engine._optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    sums = list(zero.accumulated_grads_in_cpu.values())
    return [*groups, *zero.param_buffer_of_bit16_for_cpu_offload_groups, zero.temp_grad_buffer_for_cpu_offload, *sums, *states]


@installed
@pytest.mark.parametrize(("accumulation", "samples", "numbers"), [(1, 8, 20_000), (2, 8, 20_000), (1, 1, 2_000)])
def test_a_gpu_and_its_ram_are_foretold_of_a_traced_model(tmp_path: Path, accumulation: int, samples: int, numbers: int) -> None:
    """What the device would hold in a step within 2 % of the count, also where gradients larger than a bucket are most of it; and in RAM
    to the byte: 20 bytes for each weight, 24 where gradients are added up, and a place for the largest. Pinned, each piece is rounded up
    to a power of two, as torch's allocator of such memory does."""
    task, buckets = DeepToy(), Buckets(numbers, pins=False)
    table, model, mixed = table_of(task, tmp_path)
    asked = config({"batch_size": samples * accumulation, "micro_batch": samples}, memory=ZERO2)
    document = deepspeed.whole(asked, samples, {"zero_optimization": {"reduce_bucket_size": buckets.numbers}}, on_gpu=False)
    engine = Zero2(model, task, optimizers.build_bare(model, task, asked.train), mixed, document)
    longest = int(task.train_samples.lengths.argmax())
    batch, task.ctx.sample_ids = task.collate([task.train_samples[longest]] * samples), [longest] * samples

    def compute() -> Any:
        losses, _ = task.loss(model, batch, task.ctx)
        return losses["tokens"][0], None

    def step() -> None:
        for piece in range(accumulation):
            total, _ = engine.forward(compute)
            engine.backward(total, last=piece + 1 == accumulation)
            del total
        engine.step(0.01, torch.zeros(()))

    step()
    with _Held([*model.parameters(), *_in_ram(engine), engine._zero.temp_grad_buffer_for_gpu_offload]) as count:
        began = len(count.log)
        step()
    in_ram = sum(t.untyped_storage().nbytes() for t in _in_ram(engine))
    numbers_in_all = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    assert in_ram == pytest.approx((20 if accumulation == 1 else 24) * numbers_in_all + 4 * largest, abs=64)
    line = table.timeline(Setup("cuda", "fp32", samples, samples * accumulation, offload="zero2", buckets=buckets))
    assert line.peaks[STEP] == pytest.approx(count.peak_without(in_ram, began), rel=0.02)
    else_there = line.weight_bytes + line.state_bytes + batch.nbytes * accumulation  # a checkpoint's copy, and the batches that wait
    assert line.host_bytes - else_there == in_ram and line.pinned_bytes == 0
    pinned = table.timeline(Setup("cuda", "fp32", samples, samples * accumulation, offload="zero2", buckets=Buckets(20_000)))
    moments = sum(t.nbytes for state in engine._optimizer.state.values() for t in state.values())
    pieces = [t.untyped_storage().nbytes() for t in _in_ram(engine)[: -2 * 3]]
    assert pinned.pinned_bytes == sum(1 << (size - 1).bit_length() for size in pieces) > in_ram - moments
    assert pinned.host_bytes - else_there == pinned.pinned_bytes + moments and pinned.peak == line.peak
    engine.close()


@installed
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("more", [{"micro_batch": 3}, {"precision": "bf16"}, {"precision": "fp16", "micro_batch": 4}])
def test_on_a_gpu_it_is_the_same_run_and_holds_what_is_foretold(more: dict[str, Any], tmp_path: Path) -> None:
    """After 21 steps the weights agree to 1e-4 with a run without; left and resumed nothing differs; torch's own peaks, of the device
    and of pinned memory, are not beyond the estimate's bounds, nor far below them."""
    run(tmp_path / "plain", config(more))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(tmp_path / "whole", config(more, memory=ZERO2), traces=True)
    document = json.loads((Home(tmp_path / "whole").run("toy").folder / "receipt.json").read_text("utf-8"))
    foretold, needed = document["predicted"]["allocated_bytes"], torch.cuda.max_memory_allocated() - before
    assert needed == pytest.approx(foretold, rel=0.03)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "whole")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one if name != "seen")
    assert run(tmp_path / "left", config(more, memory=ZERO2), Script({9: LEAVE})).outcome == "left"
    run(tmp_path / "left", config(more, memory=ZERO2))
    assert same(tmp_path / "whole", tmp_path / "left")


@installed
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
def test_on_a_gpu_torch_pins_what_is_foretold(tmp_path: Path) -> None:
    """Every piece rounded up to a power of two."""
    model = torch.nn.Sequential(*[torch.nn.Linear(700, 700, bias=False) for _ in range(4)]).cuda()
    asked, weights_bytes = config({"micro_batch": 4}, memory=ZERO2), 4 * 700 * 700 * 4
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    document = deepspeed.whole(asked, 4, None, on_gpu=True)
    engine = Zero2(model, Toy(), optimizers.build_bare(model, Toy(), asked.train), Precision("fp32", torch.device("cuda")), document)
    for last in (False, True):
        total, _ = engine.forward(lambda: (model(torch.ones(1, 700, device="cuda")).sum(), None))
        engine.backward(total, last)
    tape = Tape("cuda")
    for p in model.parameters():
        tape.parameter(*p.shape)
    table = Partitions(tape, "adamw", Buckets(), accumulates=True)
    table.allocate()
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert weights_bytes * 4 < pinned == table.pinned_bytes
    engine.close()


def _planned(table: Any, budget: float, ram: int | None = None, **train: Any) -> Any:
    asked = RunConfig.model_validate({"train": {"batch_size": 32, "precision": "fp32", **train}, "memory": ZERO2})
    return forecast.answer(asked, forecast.Place("cuda", int(budget), "fp32", ram_bytes=ram), table)


def test_it_is_judged_like_any_other_and_never_chosen(tmp_path: Path) -> None:
    """Its batch is split to fit; without the RAM for it the optimizer on the CPU is proposed in its place, and nothing DeepSpeed refuses.
    No technique leads to it."""
    table, _, _ = table_of(DeepToy(), tmp_path)
    whole = _planned(table, 1 << 40)
    assert whole.verdict == FITS and whole.setup.offload == "zero2" and whole.setup.buckets == Buckets()
    tight = _planned(table, 1 << 40, int(whole.estimate.ram.upper) - 1)
    assert tight.verdict != FITS and tight.setup.offload == "zero2"
    settings = {setting for proposal in tight.proposals for setting in proposal.settings}
    assert "memory.offload=optimizer" in settings and not any("8bit" in one or "adafactor" in one for one in settings)
    for offload in ("none", "optimizer", "base"):
        setup = Setup("cuda", "fp32", 8, 32, offload=offload, checkpointing="full")
        made = [technique.applied(setup, table) for technique in TECHNIQUES]
        assert all(one is None or one.offload != "zero2" for one in made)
        assert offload != "optimizer" or not any(one is not None and "8bit" in one.optimizer for one in made)


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trainer before its first step, for it would need more than there is; and a run that fits has a forecast."""
    task = Toy()
    model, mixed = bound(task, tmp_path)
    plan = {**fitting.plans.resolve(config(memory=ZERO2), task)}
    monkeypatch.setattr(fitting, "_place", lambda *_: forecast.Place("cpu", 10_000_000, "fp32", Profile(measured=True, process_bytes=0)))
    with pytest.raises(Refused, match=r"It does not fit: it needs \d+ MB of RAM, and 10 MB are left"):
        paths = Home(tmp_path).run("toy")
        fitting.foresee(task, model, task.train_samples, config(memory=ZERO2), plan, paths, mixed, Script().send, traces=True)


@installed
def test_a_run_with_it_has_a_forecast_and_a_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose own ds_config.json has gone away: it goes by what it was given last."""
    monkeypatch.setattr(fitting.machine_memory, "own_bytes", lambda: 0)  # the tests' own process is in it otherwise
    own, home = tmp_path / "mine.json", tmp_path / "home"
    own.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 10_000_000}}), "utf-8")
    asked, seen = config({"max_steps": 3}, memory={**ZERO2, "deepspeed_config": str(own)}), []
    for leaves in (True, False):
        link = Script({2: LEAVE} if leaves else None)
        run(home, asked, link, traces=True)
        seen.append(json.loads((Home(home).run("toy").folder / "receipt.json").read_text("utf-8"))["predicted"]["ram_bytes"])
        assert link.of("memory")[0]["predicted_bytes"] == seen[-1]
        own.unlink(missing_ok=True)
    run(tmp_path / "other", config({"max_steps": 3}, memory=ZERO2), traces=True)
    other = json.loads((Home(tmp_path / "other").run("toy").folder / "receipt.json").read_text("utf-8"))["predicted"]["ram_bytes"]
    assert seen[0] == seen[1] == other + 4 * 5_000_000


@installed
def test_plan_shows_the_numbers(tmp_path: Path) -> None:
    """On a GPU that is asked about: driver, allocated, RAM and how much of it is pinned."""
    person = Person(tmp_path / "home")
    asked = ("plan", "--json", "--budget", "3.5GB", "--set", "train.micro_batch=16")
    with_it = json.loads(person.types(*asked, "--set", "memory.offload=zero2").stdout)
    other = json.loads(person.types(*asked, "--set", "memory.offload=optimizer").stdout)
    found, beside = with_it["estimate"], other["estimate"]
    assert found["setup"]["offload"] == "zero2" and found["setup"]["buckets"] == {"numbers": 5_000_000, "copies": 1, "pins": True}
    assert 0 < found["allocated"]["point"] - beside["allocated"]["point"] < 80_000_000
    assert found["ram"]["point"] > beside["ram"]["point"] and found["pinned"]["point"] > beside["pinned"]["point"]
