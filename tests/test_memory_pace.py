"""A step's time follows what was measured of this machine: its memory, the bus, the CPU's memory; and so does what a plan takes up."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_memory_traced import LARGE, MB, made
from trainerd.config.model import RunConfig
from trainerd.memory import forecast, pace, profile
from trainerd.memory.estimate import estimate
from trainerd.memory.planner import FITS
from trainerd.memory.profile import Profile
from trainerd.memory.timeline import Setup, Timeline
from trainerd.memory.traced import Trace, Traces
from trainerd.tasks.cadence.blocks import table
from trainerd.tasks.cadence.settings import CadenceSettings

MEASURED = Profile(
    measured=True,
    gigaflops={"fp32": 4000.0},
    ram_bytes_per_second=2e10,
    to_device_bytes_per_second=1.2e10,
    from_device_bytes_per_second=1.2e10,
    device_bytes_per_second=1.6e11,
)
WEIGHTS = 100_000_000


def seconds(known: Profile, where: str = "none", micro_batch: int = 8) -> float:
    found = estimate(LARGE, Setup("cuda", "fp32", micro_batch, 8, offload=where), known).seconds_per_step
    assert found is not None and found.point < found.upper
    return found.point


def test_the_optimizers_step_takes_what_its_memory_takes() -> None:
    """On the GPU through the GPU's memory: 100 million weights, 28 bytes each, in 18 ms, and 16 bytes on the ways there and back; on the
    CPU through the CPU's, and over the bus on both ways. Half the speed of one: twice its part, and nothing else."""
    here, away = seconds(MEASURED), seconds(MEASURED, "optimizer")
    assert 44 * WEIGHTS / 1.6e11 < here < 1.2 * 44 * WEIGHTS / 1.6e11
    assert away > 28 * WEIGHTS / 2e10 + 8 * WEIGHTS / 1.2e10
    slow = {name: replace(MEASURED, **{f"{name}_bytes_per_second": getattr(MEASURED, f"{name}_bytes_per_second") / 2}) for name in PARTS}
    for name, (on_the_gpu, on_the_cpu) in PARTS.items():
        assert seconds(slow[name]) - here == pytest.approx(on_the_gpu * WEIGHTS, rel=0.02, abs=1e-6), name
        assert seconds(slow[name], "optimizer") - away == pytest.approx(on_the_cpu * WEIGHTS, rel=0.02, abs=1e-6), name


PARTS = {
    "device": (44 / 1.6e11, 0),
    "ram": (0, 28 / 2e10),
    "to_device": (0, 4 / 1.2e10),
    "from_device": (0, 4 / 1.2e10),
}
"""What each half of a speed costs more for a weight, with the optimizer on the GPU and on the CPU."""


def test_gradients_leave_once_for_every_piece() -> None:
    """Eight pieces: eight times over the bus, and seven sums on the CPU."""
    more = seconds(MEASURED, "optimizer", 1) - seconds(MEASURED, "optimizer")
    assert more == pytest.approx(7 * WEIGHTS * (4 / 1.2e10 + 12 / 2e10), rel=0.01)


def test_what_was_not_measured_is_assumed_and_said() -> None:
    """A profile of an earlier trainerd has no speed of the GPU's memory: a small laptop's, and the answer says so."""
    older = replace(MEASURED, device_bytes_per_second=None)
    assert seconds(older) == pytest.approx(seconds(replace(MEASURED, device_bytes_per_second=1.536e11)))
    said, unsaid = (estimate(LARGE, Setup("cuda", "fp32", 8, 8), known).assumed for known in (older, MEASURED))
    assert any("154 GB/s for the GPU's own memory" in text for text in said) and not any("GB/s" in text for text in unsaid)


def test_an_older_profile_is_read(tmp_path: Path) -> None:
    """Without what is measured now, and with what is not kept any more."""
    document = {"schema": 1, **asdict(MEASURED), "others_bytes": 123_000_000}
    del document["device_bytes_per_second"]
    path = tmp_path / "older.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert profile.read(path) == replace(MEASURED, device_bytes_per_second=None)
    profile.write(path, MEASURED)
    assert profile.read(path) == MEASURED


def test_a_plan_takes_the_optimizer_off_the_gpu_where_the_bus_is_fast() -> None:
    """Two ways to fit: small pieces with everything on the GPU, or large ones with the optimizer on the CPU. A fast bus and RAM make
    the second faster, slow ones the first; in both, what is taken is what the pace says is faster."""
    table = made([("fp32", [1000, 1000])] * 20, 100 * MB)
    budget = int(estimate(table, Setup("cuda", "fp32", 1, 64), MEASURED).needed.upper) + 1
    fast = replace(MEASURED, ram_bytes_per_second=2e11, to_device_bytes_per_second=6e10, from_device_bytes_per_second=6e10)
    slow = replace(MEASURED, ram_bytes_per_second=4e9, to_device_bytes_per_second=1e9, from_device_bytes_per_second=1e9)

    def chosen(known: Profile, **memory: Any) -> forecast.Answer:
        asked = RunConfig.model_validate({"task": "a", "train": {"batch_size": 64, "precision": "fp32"}, "memory": memory})
        answer = forecast.answer(asked, forecast.Place("cuda", budget, "fp32", known, ram_bytes=10**12), table)
        assert answer.verdict == FITS
        return answer

    for known, taken, other in ((fast, "optimizer", "none"), (slow, "none", "optimizer")):
        found = chosen(known)
        assert found.setup.offload == taken
        assert found.estimate.pace < chosen(known, offload=other).estimate.pace


def test_on_a_cpu_results_take_time_beside_products() -> None:
    """Four times the results, the same products: longer by their way through memory; and the bound is well above the likely value."""
    known = Profile(measured=True, gigaflops={"fp32": 80.0}, ram_bytes_per_second=4e10)
    small, large = (
        estimate(made([("fp32", [1000, 1000])], size * MB), Setup("cpu", "fp32", 8, 8), known).seconds_per_step for size in (10, 40)
    )
    assert small is not None and large is not None and large.upper > 2 * large.point
    assert large.point - small.point == pytest.approx(15 * 30 * MB * 8 / 4e10, rel=0.02)


def test_the_batches_that_wait_are_not_made_for_each_piece() -> None:
    """A hundred times the samples in pieces of the same size: a hundred times as long, but for the optimizer's step."""
    known = Profile(measured=True, gigaflops={"fp32": 80.0}, ram_bytes_per_second=4e10)
    step = [Trace(samples, [2 * MB * samples, MB * samples, 400], [0, 1, 2, ~1, ~0], 1e6, 1, [[3, 2, 0]]) for samples in (1, 2)]
    table = replace(made([("fp32", [10, 10])]), modes={"none": Traces(step, step)})
    few, many = (estimate(table, Setup("cpu", "fp32", 1, number), known).seconds_per_step for number in (8, 800))
    assert few is not None and many is not None and many.point == pytest.approx(100 * few.point, rel=0.01)


def test_a_recurrent_layers_weights_are_gone_through_at_each_place() -> None:
    """The paper's layers read theirs once a place and way: with twice the places twice that, and with four micro-batches four times."""

    def computing(line: Timeline, setup: Setup, bytes_per_second: float) -> float:
        known = replace(MEASURED, device_bytes_per_second=bytes_per_second)
        return pace.computing(line, setup, known, pace.speeds(known, "cuda"))

    read = []
    for words, accumulation in ((11, 1), (23, 1), (23, 4)):
        setup = Setup("cuda", "fp32", 2, 2 * accumulation)
        line = table(CadenceSettings.model_validate({"model": "gru-mn", "max_words": words})).timeline(setup)
        rest = replace(line, reread_bytes=0)
        read.append(computing(line, setup, 1e10) - computing(rest, setup, 1e10))
        assert computing(line, setup, 1e20) == pytest.approx(computing(rest, setup, 1e20))
    weights = 4 * (2000 * 7000 + 1500 * 5250 + 1000 * 3500 + 7000 + 5250 + 3500 + 2000 * 1000 + 1500 * 750 + 1000 * 500 + 2250)
    assert read == pytest.approx([weights * 12 * 2 / 1e10, weights * 24 * 2 / 1e10, weights * 24 * 8 / 1e10])
