"""A base in 4 or 8 bits that is streamed: to the bit bitsandbytes' own, and few blocks of it on the device at once."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.memory_oracle import TensorCount
from tests.test_engine_streaming import _Counting
from tests.test_memory_faults import Runs, strike
from tests.test_memory_fitting import CPU, bound, counted
from tests.toy import LEAVE, Blocks, Script, Toy, config, run, same
from tests.trainers import RunningTrainer, killed_and_ended, new_run, outcome
from trainerd.config.model import RunConfig
from trainerd.contract.errors import ConfigError, UsageError
from trainerd.contract.paths import Home
from trainerd.engine import checkpointing, fitting, packed
from trainerd.engine import plan as plans
from trainerd.engine import trace as tracing
from trainerd.engine.export import weights_bytes
from trainerd.engine.fakes import Fakes
from trainerd.engine.streaming import Copies, Stream, streamable
from trainerd.memory import forecast, planner, profile
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::DeprecationWarning:bitsandbytes")
_WIDTH, _BLOCKS = 64, 5
BASE = {"offload": "base"}
KINDS = ("4 bits", "4 bits, flat scales", "8 bits")


def _layer(kind: str, given: int, made: int, bias: bool) -> nn.Module:
    if kind == "8 bits":
        return bnb.nn.Linear8bitLt(given, made, bias=bias, has_fp16_weights=False)
    return bnb.nn.Linear4bit(given, made, bias=bias, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=kind == "4 bits")


class Adapted(nn.Module):
    """Two packed matrices, one with a bias, under a small pair that is learned."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.up = _layer(kind, width, 2 * width, True).requires_grad_(False)
        self.down = _layer(kind, 2 * width, width, False).requires_grad_(False)
        self.first, self.second = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x))) + self.second(self.first(x))


def _model(kind: str, number: int = _BLOCKS, width: int = _WIDTH) -> Blocks:
    return Blocks(lambda: Adapted(kind, width), number, width)


class Packed(Toy):
    """Its model is not packed yet when the task gives it."""

    kind, number, width = "4 bits", _BLOCKS, _WIDTH

    def __init__(self, kind: str = "4 bits") -> None:
        super().__init__()
        self.kind = kind

    def model(self) -> nn.Module:
        return _model(self.kind, self.number, self.width)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]


def _packed_bytes(kind: str) -> int:
    """Of a block, and its bias."""
    return 2 * _WIDTH * 2 * _WIDTH // (1 if kind == "8 bits" else 2) + 2 * _WIDTH * 4


_PIECES = {"micro_batch": 3, "eval_every_steps": 2, "precision": "bf16"}
_SELECTIVE = {"activation_checkpointing": "selective"}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("4 bits", _PIECES),
        ("8 bits", _SELECTIVE),
        *(pytest.param(kind, more, marks=pytest.mark.slow) for kind in KINDS for more in ({}, _PIECES, _SELECTIVE)),
    ],
)
def test_a_run_is_that_of_bitsandbytes_to_the_last_bit(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Every loss and every weight, evaluations included; also when it comes and goes on a resume."""
    more = {"max_steps": 6, **more}
    again = {"activation_checkpointing": "full", **more}
    run(tmp_path / "resident", config(again), task=Packed(kind))
    run(tmp_path / "streamed", config(more, memory=BASE), task=Packed(kind))
    assert same(tmp_path / "resident", tmp_path / "streamed")
    assert run(tmp_path / "mixed", config(more, memory=BASE), Script({4: LEAVE}), Packed(kind)).outcome == "left"
    run(tmp_path / "mixed", config(again, memory={"offload": "none"}), task=Packed(kind))
    assert same(tmp_path / "resident", tmp_path / "mixed")


def test_the_room_for_the_result_is_that_of_what_was_learned(tmp_path: Path) -> None:
    """A frozen base is not in it, and to ask makes no tensor: there is always memory to ask."""
    run(tmp_path, config({"max_steps": 2}, memory=BASE), task=Packed())
    model = _made("4 bits")
    with TensorCount(model.parameters()) as count:
        told = weights_bytes(model)
    written = sum(file.stat().st_size for file in Home(tmp_path).run("toy").model.iterdir())
    assert written <= told < written + (1 << 20) + 70_000 and not count.log[len(list(model.parameters())) :]


def _made(kind: str) -> Blocks:
    torch.manual_seed(3)
    model = _model(kind)
    packed.pack(model, CPU)
    return model


def _step(model: nn.Module) -> list[torch.Tensor]:
    model.train()(torch.arange(18).view(2, 9) % 20).square().sum().backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learned)
    return [p.grad.clone() for p in learned if p.grad is not None]


_ALL = [(kind, mode, ahead) for kind in KINDS for mode in (checkpointing.FULL, checkpointing.SELECTIVE) for ahead in (False, True)]


@pytest.mark.parametrize(("kind", "mode", "ahead"), _ALL)
def test_few_blocks_of_it_are_there_at_once(kind: str, mode: str, ahead: bool) -> None:
    """One, or two where the next is fetched ahead: nothing keeps a packed weight until the way back; every trainable weight has the
    gradient that it has by bitsandbytes. Closed, the layers are bitsandbytes' own again."""
    resident = _made(kind)
    checkpointing.wrap(resident, list(resident.blocks), mode)
    expected = _step(resident)
    model, copies = _made(kind), _Counting(ahead)
    stream = Stream(model, list(model.blocks), CPU, copies)
    assert stream.bytes == [_packed_bytes(kind)] * _BLOCKS
    kinds = set()  # of the weights while a block computes: PEFT's DoRA goes by them
    model.blocks[1].up.register_forward_hook(lambda layer, *_: kinds.add((type(layer.weight), *vars(layer.weight))))
    gc.disable()
    try:
        with checkpointing.wrapped(model, list(model.blocks), mode):
            found = _step(model)
        assert copies.most == (2 if ahead else 1) and copies.made == 2 * _BLOCKS
    finally:
        gc.enable()
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert kinds == {(type(model.blocks[1].up.weight), *vars(model.blocks[1].up.weight))}
    stream.close()
    assert not copies.alive and all("forward" not in vars(layer) for block in model.blocks for layer in (block.up, block.down))
    model.zero_grad()
    again = _step(model)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_bitsandbytes_own_functions_would_keep_all_of_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the layers compute by functions of ours: with theirs every block's weights in 4 bits stay until the way back, and of those in 8
    the ones at home are computed with, not the copies."""
    monkeypatch.setattr(packed, "replace_forward", lambda layer, device: None)
    model, copies = _made(kind), _Counting(False)
    Stream(model, list(model.blocks), CPU, copies)
    checkpointing.wrap(model, list(model.blocks), checkpointing.FULL)
    homes = [block.up.weight.data_ptr() for block in model.blocks]
    _step(model)
    if kind == "8 bits":
        assert [block.up.state.CB.data_ptr() for block in model.blocks] == homes
    else:
        assert copies.most >= _BLOCKS - 1


def test_what_is_packed_otherwise_stays_on_the_device(tmp_path: Path) -> None:
    """A layer with a forward of its own, or that somebody has hooked, and one in the order for inference: never taken from under its code.
    Where nothing else is frozen, it is refused, with what can be streamed."""

    class Own(bnb.nn.Linear4bit):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Owned(Packed):
        def model(self) -> nn.Module:
            model = super().model()
            for block in self.blocks(model):
                block.up, block.down = (Own(*shape, bias=False).requires_grad_(False) for shape in ((64, 128), (128, 64)))
            return model

    with pytest.raises(ConfigError, match="no frozen weight that can be streamed") as refused:
        run(tmp_path, config(memory=BASE), task=Owned())
    assert "bitsandbytes' linear layers in 4 or 8 bits" in str(refused.value.hint)
    layers = list(_made("4 bits").blocks[0].children())[:2]
    assert all(packed.is_weight(layer, "weight") for layer in layers)
    layers[0].forward = layers[0].forward
    layers[1].weight.quant_state.packing_format_for_cpu = True  # type: ignore[union-attr]
    assert not any(packed.is_weight(layer, "weight") for layer in layers)


class _Sparse(nn.Parameter):
    """A weight of a kind of its own, that has no part of a plain one's promise."""


def test_what_is_no_plain_weight_is_none_in_a_trace_either(tmp_path: Path) -> None:
    """Of the model and of its copy without memory the same can be streamed: what one library packs its own way is in neither."""
    model = _made("4 bits")
    model.blocks[1].own = nn.Module()
    model.blocks[1].own.weight = _Sparse(torch.zeros(8, 8), requires_grad=False)
    copied = Fakes().copied(model)
    names = [{id(p): name for name, p in one.named_parameters()} for one in (model, copied)]
    found = [[of[id(p)] for p in streamable(one, list(one.blocks))] for of, one in zip(names, (model, copied), strict=True)]
    assert found[0] == found[1] and len(found[0]) == 3 * _BLOCKS and "blocks.1.own.weight" in names[0].values()


def test_an_adapter_without_a_gradient_stops_the_run(tmp_path: Path) -> None:
    """After the first backward pass, by its name."""

    class Cut(Packed):
        def model(self) -> nn.Module:
            model = super().model()
            block = model.blocks[2]  # type: ignore[index]
            block.forward = lambda x: x + block.down(torch.tanh(block.up(x))) + block.second(block.first(x).detach())
            return model

    with pytest.raises(UsageError, match=r"blocks\.2\.first\.weight"):
        run(tmp_path, config(memory=BASE), task=Cut())


_TASK = """
import os, time, warnings
warnings.simplefilter("ignore")
import bitsandbytes as bnb
import torch
from torch import nn
from trainerd.engine.task import Task

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        four = bnb.nn.Linear4bit(32, 64, bias=True, compute_dtype=torch.float32, quant_type="nf4")
        self.base = nn.ModuleList((four, bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False))).requires_grad_(False)
        self.first, self.second = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x):
        return x + self.base[1](torch.tanh(self.base[0](x))) + self.second(self.first(x))

class Qlora(Task):
    reads_data = False

    def model(self):
        return nn.Sequential(*(Block() for _ in range(3)), nn.Linear(32, 1))

    def blocks(self, model):
        return list(model)[:-1]

    def dataset(self, split):
        x = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)) if split == "train" else None

    def counts(self, batch):
        return {"loss": len(batch[1])}

    def loss(self, model, batch, ctx):
        time.sleep(float(os.environ.get("TINY_PAUSE", "0")))
        x, y = batch
        return {"loss": (nn.functional.mse_loss(model(x), y, reduction="sum"), 1.0)}, {}
"""


@pytest.mark.slow
def test_a_killed_trainer_resumes_to_the_last_bit(tmp_path: Path) -> None:
    """kill -9 of a real trainer process after a checkpoint, with a base in 4 and in 8 bits: every step's numbers and the model are those of
    one that was not killed, and of one whose base was resident."""
    patient_seconds, finished, again = 120, [], {"activation_checkpointing": "full"}
    base, none = (RunConfig.model_validate({"memory": {"offload": name}}).memory for name in ("base", "none"))
    for name, memory in (("streamed", base), ("resident", none)):
        paths = new_run(tmp_path / name, source=_TASK, class_name="Qlora", memory=memory, train=again)
        trainer = RunningTrainer(paths)
        assert trainer.exit_code(patient_seconds) == 0, trainer.text()[-3000:]
        finished.append(outcome(paths))
    paths = new_run(tmp_path / "killed", source=_TASK, class_name="Qlora", memory=base, train=again)
    assert killed_and_ended(paths, patient_seconds) == finished[0] == finished[1]


class Small(Packed):
    number, width = 2, 16


_PARTS = 6
_EVERY = [pytest.param(kind, 1 + part, _PARTS, marks=pytest.mark.slow) for kind in ("4 bits", "8 bits") for part in range(_PARTS)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "first", "stride"), [("4 bits", 1, 397), *_EVERY])
def test_an_out_of_memory_at_any_allocation_loses_no_step(
    kind: str, first: int, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a block's copies, in what it unpacks, in what is computed again: the same bits as a run with that micro-batch from there."""
    monkeypatch.setattr("tests.test_memory_faults.run", lambda *given: run(*given, task=Small(kind)))
    train = {"max_steps": 5, "micro_batch": 4, "eval_every_steps": 3}
    runs = Runs(tmp_path, config(train, checkpoint={"every_steps": 2, "exact": True}, memory=BASE))
    number = first
    while strike(number, runs, runs._configuration, monkeypatch):
        number += stride
    assert number > 400, "the run is shorter than it was: fewer places are looked at"
    print(f"\nup to allocation {number - 1}, one in {stride} failed")


_TRACED = [(device, memory, kind) for device in ("cuda", "cpu") for memory in (True, False) for kind in KINDS]


@pytest.mark.parametrize(
    ("device", "memory", "kind"),
    [("cuda", True, "4 bits"), ("cpu", False, "8 bits"), *(pytest.param(*one, marks=pytest.mark.slow) for one in _TRACED)],
)
def test_a_streamed_base_is_foretold(device: str, memory: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half a percent of what is counted while it is really streamed; traced on a copy with memory and on one without. Its scales
    stay on the device, its packed weights are told as RAM, and products that are kept are not counted as made again."""
    if not memory:
        monkeypatch.setattr(tracing, "_SMALL_BYTES", -1)
    task = Packed(kind)
    model, mixed = bound(task, tmp_path)
    packed.pack(model, CPU)  # as the engine does before it traces
    found = tracing.trace(task, model, task.train_samples, mixed, 32)
    away = _BLOCKS * _packed_bytes(kind)
    assert found.offers == ("selective", "full", "base") and sum(found.streamed) == away
    copies = Copies()
    copies.ahead = device == "cuda"
    Stream(model, task.blocks(model), CPU, copies)
    checkpointing.wrap(model, task.blocks(model), "full")
    weights, scales = sum(p.numel() * p.element_size() for p in model.parameters()), sum(packed.scale_bytes(model).values())
    assert 0 < scales < away / 3
    for samples in (8, 32):
        setup = Setup(device, "fp32", samples, 2 * samples, offload="base", checkpointing="full")
        line = found.timeline(setup)
        assert line.pinned_bytes == line.streamed_bytes == (away if device == "cuda" else 0)
        beside = line.state_bytes + scales + (weights - away if device == "cuda" else weights + line.weight_bytes + line.state_bytes)
        assert line.peak - beside == pytest.approx(counted(task, model, mixed, samples), rel=0.005)
        model.zero_grad()
    none, selective = (found.timeline(replace(setup, offload="none", checkpointing=mode)).flops for mode in ("none", "selective"))
    assert none == selective < 0.85 * line.flops


def test_its_scales_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model, and not once more with what the process holds beside it."""
    task, model = Packed(), _made("4 bits")
    monkeypatch.setattr(fitting.machine_memory, "own_bytes", lambda: 10**9)
    place = forecast.Place("cpu", 10**10, "fp32", process_bytes=1)
    found, _ = fitting._with_process(place, None, task, model, None)
    tensors = [*model.parameters(), *model.buffers()]
    of_model = sum(t.numel() * t.element_size() for t in tensors) + sum(packed.scale_bytes(model).values())
    assert found.process_bytes == 10**9 - of_model + profile.LATER_BYTES


def test_a_plan_takes_it_up_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer without room for a resident base in 4 bits streams it, aloud, and its forecast is the one of that."""
    task, link = Packed(), Script()
    model, mixed = bound(task, tmp_path)
    packed.pack(model, CPU)
    small = tracing.trace(task, model, task.train_samples, mixed, 32)
    found = small.__class__(**{**vars(small), "streamed": [200 * size for size in small.streamed]})
    needs = [estimate(found, Setup("cuda", "fp32", 1, 32, offload=how, checkpointing="full")).needed.upper for how in ("base", "none")]
    assert needs[0] < needs[1]
    place = forecast.Place("cuda", int(sum(needs) / 2), "fp32")
    monkeypatch.setattr(fitting, "_place", lambda *_: place)
    monkeypatch.setattr(fitting, "_traced", lambda *_: (found, 0))
    asked = config({"batch_size": 32})
    plan = {**plans.resolve(asked, task), "open": True}
    paths = Home(tmp_path).run("toy")
    foreseen = fitting.foresee(task, model, task.train_samples, asked, plan, paths, mixed, link.send, traces=True)
    assert plan["offload"] == "base" == link.of("plan")[0]["offload"] and plan["activation_checkpointing"] in ("selective", "full")
    told = foreseen.predicted(plan, asked)
    assert told is not None and told.needed.upper <= place.budget_bytes and told.pinned.point >= sum(found.streamed)
    fixed = config({"batch_size": 32, "micro_batch": 1, "activation_checkpointing": "full"}, memory={"offload": "none"})
    answer = forecast.answer(fixed, place, found)
    assert answer.verdict != planner.FITS and [one.settings for one in answer.proposals] == [("memory.offload=base",)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_it_is_the_same_run_and_two_blocks_of_it_at_most(kind: str, tmp_path: Path) -> None:
    """The same bits as resident, packed by the same device; of sixteen blocks no more than two are there."""
    run(tmp_path / "resident", config({"activation_checkpointing": "full"}), task=Packed(kind))
    run(tmp_path / "streamed", config(memory=BASE), task=Packed(kind))
    assert same(tmp_path / "resident", tmp_path / "streamed")
    device = torch.device("cuda")
    model = nn.Sequential(*[nn.Sequential(_layer(kind, 1024, 1024, False).requires_grad_(False), nn.LayerNorm(1024)) for _ in range(16)])
    packed.pack(model, device)
    stream = Stream(model, list(model), device)
    checkpointing.wrap(model, list(model), checkpointing.FULL)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model.train()(torch.ones(4, 1024, device=device)).sum().backward()
    torch.cuda.synchronize()
    unpacked = 1024 * 1024 * 4
    assert stream.is_pinned and torch.cuda.max_memory_allocated() - held < 2 * sum(stream.bytes) / 16 + 3 * unpacked
    stream.close()
