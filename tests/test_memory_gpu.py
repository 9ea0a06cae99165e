"""What only a GPU can tell: torch's real allocator and its real counters against the replay and the tables. Skipped without one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory.families import family
from tests.test_memory_faults import Runs
from tests.toy import Script, Toy, config, run, same
from trainerd.contract.paths import Home
from trainerd.engine import guard, measuring
from trainerd.machine import gpu
from trainerd.memory.allocator import Allocator, replay
from trainerd.memory.optimizers import Optimizer
from trainerd.memory.tape import Tape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")]
_LARGEST_EXPONENT = 25.5


def random_trace(seed: int, number: int = 400) -> tuple[list[int], list[int]]:
    """Sizes of every scale, freed in any order."""
    draw = random.Random(seed)
    sizes: list[int] = []
    events: list[int] = []
    alive: list[int] = []
    for _ in range(number):
        if alive and (draw.random() < 0.45 or len(alive) > 60):
            events.append(~alive.pop(draw.randrange(len(alive))))
        else:
            events.append(len(sizes))
            alive.append(len(sizes))
            sizes.append(int(2 ** draw.uniform(4, _LARGEST_EXPONENT)))
    return sizes, events + [~n for n in alive]


@pytest.mark.parametrize("seed", range(12))
def test_the_replay_counts_what_torch_counts(seed: int) -> None:
    """The same trace on the device: memory_allocated and memory_reserved are equal after every event, to the byte."""
    sizes, events = random_trace(seed)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    if torch.cuda.memory_reserved():
        pytest.skip("another test's tensors are still on the device")
    allocator = Allocator()
    blocks, tensors = {}, {}
    for event in events:
        if event >= 0:
            blocks[event] = allocator.malloc(sizes[event])
            tensors[event] = torch.empty(sizes[event], dtype=torch.uint8, device="cuda")
        else:
            allocator.free(blocks.pop(~event))
            del tensors[~event]
        assert torch.cuda.memory_allocated() == allocator.allocated
        assert torch.cuda.memory_reserved() == allocator.reserved


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gpt", "llama-lora", "convnet", "cnn3d", "gru", "gru-mn"])
def test_a_training_step_needs_on_a_gpu_what_the_tables_say(name: str, precision: str) -> None:
    """Allocated within 3 % and reserved within 5 % of torch's own peaks, libraries' workspaces left out of both."""
    parts = family(name)
    made = parts.model().to("cuda")
    weights = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, fused=True)

    def step() -> None:
        batch = [t.to("cuda") for t in parts.batch(8)]
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = made(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    resting = torch.cuda.memory_allocated()
    states = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    held = sum(t.numel() * t.element_size() for t in [*made.parameters(), *made.buffers()]) + states
    workspace = max(0, resting - held)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    allocated = torch.cuda.max_memory_allocated() - workspace
    tape = Tape("cuda", None if precision == "fp32" else precision)
    table = parts.table(tape)
    shadow = Optimizer(tape, "adamw")
    shadow.allocate()
    for _ in range(2):
        batch = [tape.input(*t.shape, dtype="int64" if t.dtype == torch.int64 else "fp32") for t in parts.batch(8)]
        with tape.autocast():
            loss = table(*batch)
        del batch
        tape.backward(loss)
        del loss
        shadow.work()
        shadow.zero_grad()
    peaks = replay(tape.sizes, list(tape.events), Allocator())
    assert peaks.allocated == pytest.approx(allocated, rel=0.03)
    assert peaks.reserved == pytest.approx(torch.cuda.max_memory_reserved() - workspace, rel=0.05)


class _Full(Toy):
    """The real allocator refuses something at the fourth step, while a micro-batch has more than four samples."""

    def loss(self, model: Any, batch: torch.Tensor, ctx: Any) -> Any:
        if ctx.training and ctx.step == 3 and len(batch) > 4:
            torch.empty(torch.cuda.get_device_properties(0).total_memory * 2, dtype=torch.uint8, device="cuda")
        return super().loss(model, batch, ctx)


def test_a_real_out_of_memory_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit the run that had half the micro-batch from that step on."""
    asked, link = config({"max_steps": 7}), Script()
    run(tmp_path / "tight", asked, link, _Full())
    assert link.of("plan")[-1]["micro_batch"] == 4 and link.of("exact")[-1]["since_step"] == 4
    assert same(Runs(tmp_path, asked).calm((4, 4), monkeypatch), tmp_path / "tight")


def test_the_cap_is_an_out_of_memory_before_the_driver_spills() -> None:
    """Past the share of the device that the guard gives, torch itself refuses."""
    device = torch.device("cuda", 0)
    senses = guard._senses(device)
    use = senses.device()
    assert use is not None and 0 <= use.allocated_bytes <= use.reserved_bytes <= use.used_bytes <= use.total_bytes
    try:
        senses.cap((use.reserved_bytes + (64 << 20)) / use.total_bytes)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(use.reserved_bytes + (256 << 20), dtype=torch.uint8, device=device)
    finally:
        senses.cap(1.0)


def test_the_speeds_of_a_gpu_are_measured() -> None:
    """Its own memory is faster than the bus, and both are what such things can be."""
    found, _, _ = measuring.measured()
    there, back, within = found.to_device_bytes_per_second, found.from_device_bytes_per_second, found.device_bytes_per_second
    assert there is not None and back is not None and within is not None
    assert min(there, back) > 1e8 and max(there, back) < within < 2e13


def test_a_receipt_holds_what_the_driver_saw(tmp_path: Path) -> None:
    """More than our allocator held, by a context's size, and what the driver says of this process; never more than all hold."""
    if not any(one.used_bytes for one in gpu.processes()):
        pytest.skip("the driver does not tell here what a process holds")
    run(tmp_path, config({"max_steps": 12}), Script())
    real = json.loads((Home(tmp_path).run("toy").folder / "receipt.json").read_text("utf-8"))["real"]
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    assert real["reserved_bytes"] + (50 << 20) < real["driver_bytes"] < total_bytes
    assert real["driver_bytes"] < total_bytes - free_bytes + torch.cuda.max_memory_reserved() + (64 << 20)
