"""What a model of one's own needs beside its own operations: optimizer, offload, evaluation, the batches; counted in the real engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.memory_oracle import TensorCount
from tests.test_memory_fitting import CPU, WideToy, bound
from tests.toy import Toy, config
from trainerd.config.model import RunConfig
from trainerd.engine import optimizers
from trainerd.engine.batches import Batches
from trainerd.engine.loader import Fetch, Loader
from trainerd.engine.trace import trace
from trainerd.memory import forecast, traced
from trainerd.memory.estimate import estimate
from trainerd.memory.planner import FITS, TOO_LARGE
from trainerd.memory.timeline import EVALUATING, Setup, Timeline

MB = 1_000_000
SAMPLES = 64


class Half(nn.Module):
    """Weights in two types, some of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 256)
        self.low = nn.Linear(256, 512, dtype=torch.bfloat16)
        self.kept = nn.Linear(512, 64).requires_grad_(False)
        self.out = nn.Linear(64, 20)
        self.register_buffer("seen", torch.zeros(1000))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.kept(torch.tanh(self.low(self.embed(tokens).bfloat16())).float()))


class HalfToy(Toy):
    model_kind = Half


class Repeated:
    """As many samples as are asked for, of a few."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Tensor:
        return self._samples[index % len(self._samples)]


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def counted(task: Toy, model: nn.Module, asked: RunConfig, several: bool) -> tuple[int, int]:
    """The most that the real optimizer's steps hold at once: two steps, so that the second meets the first one's states; and what the
    states are. The batches, weights and buffers are there before."""
    longest = int(task.train_samples.lengths.argmax())
    batches = [Fetch(task, task.train_samples)[0, 0, [longest] * SAMPLES] for _ in range(2 if several else 1)]
    with TensorCount([*model.parameters(), *model.buffers(), *batches]) as count:
        offload = None
        if asked.memory.offload == "optimizer":
            optimizer, offload = optimizers.build_on_host(model, task, asked.train, CPU)
        else:
            optimizer = optimizers.build(model, task, asked.train)
        for _ in range(2):
            for batch in batches:
                task.ctx.sample_ids = [longest] * SAMPLES
                task.loss(model, batch, task.ctx)[0]["tokens"][0].backward()
            if offload is not None:
                offload.arrive()
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.get_total_norm([p.grad for p in trained])
            optimizer.step()
            optimizer.zero_grad()
        if offload is not None:
            offload.close()
    states = {t.data_ptr(): t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)}  # some are shared
    return count.peak, bytes_of(states.values())


def needed(line: Timeline) -> int:
    """Without a checkpoint's copy, and what keeps buffers for a step that is tried again: neither is counted here."""
    staging = line.weight_bytes + line.state_bytes
    return line.peak - staging


@pytest.mark.parametrize("several", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "adamw8bit"])
@pytest.mark.parametrize("kind", [WideToy, HalfToy])
def test_a_traced_training_needs_what_the_real_optimizer_takes(
    tmp_path: Path, kind: Callable[[], Toy], name: str, offload: str, several: bool
) -> None:
    """Within 2 % of the count: states in the weights' own type, what a step makes for a moment, gradients from before, and on the
    host another copy of the weights and the sums of the gradients."""
    if name == "adamw8bit" and (offload != "none" or kind is HalfToy):
        pytest.skip("refused by the engine, or not computed on a CPU")
    task = kind()
    model, mixed = bound(task, tmp_path)
    asked = config({"batch_size": SAMPLES, "optimizer": name}, memory={"offload": offload})
    table = trace(task, model, task.train_samples, mixed, SAMPLES)
    assert table is not None
    line = table.timeline(Setup("cpu", "fp32", SAMPLES, SAMPLES * (2 if several else 1), name, offload=offload))
    peak, states = counted(task, model, asked, several)
    copies = bytes_of(model.buffers())
    assert needed(line) - copies == pytest.approx(peak, rel=0.02)
    assert line.state_bytes == pytest.approx(states, rel=0.02)
    assert line.num_parameters == sum(p.numel() for p in model.parameters())


def test_an_evaluation_is_a_phase_of_its_own(tmp_path: Path) -> None:
    """Forwards alone, in the mode of an evaluation: what it holds beyond what rests is within 2 % of the count, and less than a step's."""
    task = WideToy()
    model, mixed = bound(task, tmp_path)
    table = trace(task, model, task.train_samples, mixed, SAMPLES)
    assert table is not None and model.training and task.ctx.training
    line = table.timeline(Setup("cuda", "fp32", SAMPLES, SAMPLES))
    longest = int(task.train_samples.lengths.argmax())
    batch = Fetch(task, task.train_samples)[0, 0, [longest] * SAMPLES]
    model.eval()
    with torch.no_grad(), TensorCount([*model.parameters(), *model.buffers(), batch]) as count:
        task.loss(model, batch, task.ctx)
    held = count.peak - count.known + bytes_of([batch])
    assert line.peaks[EVALUATING] - line.resting_bytes == pytest.approx(held, rel=0.02)
    assert line.resting_bytes < line.peaks[EVALUATING] < line.peak


@pytest.mark.parametrize("samples", [2, 3])
def test_every_batch_of_a_step_that_waits_on_the_host_is_counted(tmp_path: Path, samples: int) -> None:
    """However many they are: all lie in RAM from the step's beginning, whatever the device; as many bytes as the loader really holds."""
    task = HalfToy()
    model, mixed = bound(task, tmp_path)
    longest = int(task.train_samples.lengths.argmax())
    task.train_samples.rows = [task.train_samples.rows[longest].repeat(1000)] * 50
    task.train_samples.lengths = np.full(50, len(task.train_samples.rows[0]))
    table = trace(task, model, task.train_samples, mixed, 400)
    batches = Batches(400, 400, 0)
    loader = Loader(task, Repeated(task.train_samples), batches, num_workers=0, seed=0, pin_memory=False)
    loader.seek(0, samples)
    held = bytes_of(batch for _, batch in loader.window().parts)
    few, many = (table.timeline(Setup("cpu", "fp32", samples, number)) for number in (2 * samples, 400))
    assert many.peak - few.peak == pytest.approx(held * (1 - 2 * samples / 400), rel=0.001)
    on_gpu = table.timeline(Setup("cuda", "fp32", samples, 400))
    assert on_gpu.host_bytes - on_gpu.weight_bytes - on_gpu.state_bytes == pytest.approx(held, rel=0.001)


def made(weights: list[tuple[str, list[int]]], activations: int = MB, **more: Any) -> traced.TracedTable:
    """A table whose step makes some activations, and then each weight's gradient."""
    number = len(weights)
    sizes = {"fp32": 4, "bf16": 2, "complex64": 8}
    gradients = [sizes[dtype] * int(torch.Size(shape).numel()) for dtype, shape in weights]
    events = [0, *range(1, number + 1), ~0]
    marks = [[place + 2, place + 1, place] for place in range(number)]
    steps = [traced.Trace(samples, [activations * samples, *gradients], events, 1e9, 0, marks, 5) for samples in (1, 2)]
    held_out = [traced.Trace(samples, [activations * samples], [0, ~0]) for samples in (1, 2)]
    about = {"num_parameters": sum(torch.Size(shape).numel() for _, shape in weights), **more}
    return traced.TracedTable("made", "fp32", weights, [], [], [], modes={"none": traced.Traces(steps, held_out)}, **about)


LARGE = made([("fp32", [1000, 1000])] * 100)


def planned(budget: int, ram: int | None = 10**11, **memory: Any) -> Any:
    asked = RunConfig.model_validate({"task": "a.py:A", "train": {"batch_size": 8, "precision": "fp32"}, "memory": memory})
    return forecast.answer(asked, forecast.Place("cuda", budget, "fp32", ram_bytes=ram), LARGE)


def test_a_model_that_fits_with_its_optimizer_on_the_host_is_not_refused() -> None:
    """100 million weights and 1.5 GB: by itself the plan takes the optimizer off the GPU, where gradients then do not stay; set by
    hand it says the same. Not where the RAM has no room for it."""
    found = planned(1500 * MB)
    assert found.verdict == FITS and found.setup.offload == "optimizer" and found.used == ("optimizer on the CPU",)
    assert planned(1500 * MB, offload="optimizer").estimate.driver == found.estimate.driver
    assert found.estimate.pinned.point == pytest.approx(808 * MB, rel=0.01) and found.estimate.ram.point > 1600 * MB
    assert planned(1500 * MB, offload="none").verdict == TOO_LARGE
    assert planned(1500 * MB, ram=10**9).verdict == TOO_LARGE
    timelines = [LARGE.timeline(Setup("cuda", "fp32", 8, 8, offload=where)) for where in ("none", "optimizer")]
    assert timelines[0].peak - timelines[1].peak == pytest.approx(1200 * MB, rel=0.02)


def test_paged_states_lie_on_the_host() -> None:
    """Those of large tensors: on the GPU there is less by as much as RAM has more."""
    small, paged = (LARGE.timeline(Setup("cuda", "fp32", 8, 8, name)) for name in ("adamw8bit", "paged_adamw8bit"))
    assert small.resting_bytes - paged.resting_bytes == paged.host_bytes - small.host_bytes == 200 * MB


def test_where_torch_has_no_fused_step_its_temporaries_are_counted(tmp_path: Path) -> None:
    """Complex weights: the engine takes the step that is not fused, and the estimate a list as large as the weights on a GPU; on a CPU
    three copies of one of them, with that of the one before."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    assert optimizers.kernel(optimizers.build(model, Toy(), config().train)) == "adamw"
    plain, complex_ = (made([(dtype, [1000, 1000])] * 10, 1000) for dtype in ("fp32", "complex64"))
    setup = Setup("cuda", "fp32", 1, 1)
    assert plain.timeline(setup).peak == pytest.approx(4 * 40 * MB, rel=0.01)
    assert complex_.timeline(setup).peak == pytest.approx(5 * 80 * MB, rel=0.01)
    assert complex_.timeline(replace(setup, device="cpu")).peak == pytest.approx((4 + 3 + 3 / 10) * 80 * MB, rel=0.01)


def test_what_onednn_keeps_compiled_is_counted_for_a_traced_model(tmp_path: Path) -> None:
    """In bf16 on a CPU each shape of a product has its share."""
    task = WideToy()
    model, mixed = bound(task, tmp_path, "bf16")
    table = trace(task, model, task.train_samples, mixed, 8)
    assert table is not None and table.modes["none"].steps[0].products == 3
    setup = Setup("cpu", "bf16", 8, 8)
    assert table.timeline(setup).num_products == 3
    none = table.modes["none"]
    steps, held_out = ([replace(t, products=0) for t in some] for some in (none.steps, none.held_out))
    fewer = replace(table, modes={"none": traced.Traces(steps, held_out)})
    assert estimate(table, setup).ram.point - estimate(fewer, setup).ram.point > 50 * MB


def test_a_packed_weight_counts_as_what_it_stands_for(tmp_path: Path) -> None:
    """Four bits per number: the parameters of the model as it is known, the bytes as they are held, scales included and told apart."""
    import trainerd.engine.trace as tracing
    from trainerd.engine.packed import scale_bytes

    class Scales:
        shape, absmax, code, state2 = torch.Size([64, 64]), torch.zeros(64), torch.zeros(16), None

    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2048, 1, dtype=torch.uint8), requires_grad=False)
    model.weight.quant_state = Scales()  # type: ignore[attr-defined]
    assert tracing._numbers_of(model.weight) == 4096 and scale_bytes(model) == {id(model.weight): 80 * 4}
    task = WideToy()
    _, mixed = bound(task, tmp_path)
    assert list(tracing.of_weights(task, model, mixed).frozen) == [2048, 80 * 4]
    assert made([("bf16", [1000, 1000])]).timeline(Setup("cuda", "fp32", 1, 1)).num_parameters == MB


def test_a_trace_for_a_gpu_says_that_it_was_made_on_a_cpu() -> None:
    """Kernels and autocast of the two may keep other things; for a CPU there is nothing to say."""
    said = {
        device: any("traced on the CPU" in text for text in estimate(LARGE, Setup(device, "fp32", 8, 8)).assumed)
        for device in ("cuda", "cpu")
    }
    assert said == {"cuda": True, "cpu": False}
