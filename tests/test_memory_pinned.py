"""How much of the RAM is pinned for a GPU, against what the engine really asks the system to pin in whole trainings.

No GPU is there: the system's answer is ours, and copies are done at once. Who asks, for how much, and who lets go of it is the engine's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.memory import counted
from benchmarks.memory.families import HELD_OUT, KNOWN, family
from tests.test_engine_packed import Packed
from tests.test_memory_fitting import bound
from tests.test_memory_zero2 import installed
from trainerd.config.model import RunConfig
from trainerd.engine import lanes, optimizers, packed, streaming
from trainerd.engine.loop import Link
from trainerd.engine.trace import trace
from trainerd.engine.trainer import Trainer
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup
from trainerd.memory.zero2 import Buckets

CPU = torch.device("cpu")


class Pinned:
    """What is pinned: each piece with its bytes, until it is let go of."""

    def __init__(self) -> None:
        self.pieces: dict[int, int] = {}
        self.most = 0

    def pin(self, memory: Tensor) -> bool:
        assert memory.data_ptr() not in self.pieces, "pinned twice"
        self.pieces[memory.data_ptr()] = memory.numel() * memory.element_size()
        self.most = max(self.most, sum(self.pieces.values()))
        return True

    def unpin(self, memory: Tensor) -> None:
        del self.pieces[memory.data_ptr()]


class _Lane(lanes.QueuedLane):
    """As CudaLane, on a bus that takes no time."""

    pins = True

    def _copy(self, target: Tensor, source: Tensor) -> lanes.Wait:
        target.copy_(source)
        return lambda: None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Pinned:
    found = Pinned()
    for module in (lanes, streaming):
        monkeypatch.setattr(module, "pin", found.pin)
        monkeypatch.setattr(module, "unpin", found.unpin)
    monkeypatch.setattr(optimizers, "lane_of", lambda device, largest_bytes: _Lane(largest_bytes))
    return found


def _trained(name: str, home: Path, micro_batch: int, memory: dict[str, Any]) -> None:
    """Three steps of eight samples in the real engine."""
    asked = counted.configuration(8, micro_batch=micro_batch, attention=family(name).attention)
    asked.memory = RunConfig.model_validate({"memory": memory}).memory
    assert Trainer(counted.FamilyTask(family(name), 24), asked, home=home, link=Link()).train().outcome == "finished"


def _foretold(name: str, micro_batch: int, **how: Any) -> float:
    """What an estimate for a GPU says of it."""
    setup = Setup("cuda", "fp32", micro_batch, 8, attention=family(name).attention, **how)
    found = estimate(counted.FamilyTable(f"{name} {how}", family(name)), setup)
    assert found.pinned.point == found.pinned.upper < found.ram.point
    return found.pinned.point


QUICK = ("llama-lora", "convnet")
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in (*KNOWN, *HELD_OUT)]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_optimizer_on_the_host_pins_what_is_foretold(name: str, tmp_path: Path, seen: Pinned) -> None:
    """To the byte: its weights, its gradients, and where two of the largest land; and at the end nothing is pinned any more."""
    _trained(name, tmp_path, 4, {"offload": "optimizer"})
    assert seen.most == _foretold(name, 4, offload="optimizer") > 0
    assert not seen.pieces


@pytest.mark.slow
def test_a_streamed_base_in_four_bits_pins_what_is_foretold(tmp_path: Path, seen: Pinned) -> None:
    """To the byte: each packed weight of its blocks, and nothing of what is learned. A plain one: test_memory_offload.py."""
    task = Packed()
    model, mixed = bound(task, tmp_path)
    packed.pack(model, CPU)
    table = trace(task, model, task.train_samples, mixed, 8)
    stream = streaming.Stream(model, task.blocks(model), CPU)
    stream._pin()  # what it does by itself where the device is a GPU
    found = estimate(table, Setup("cuda", "fp32", 4, 8, offload="base", checkpointing="full"))
    assert stream.is_pinned and seen.most == found.pinned.point > 0
    stream.close()
    assert not seen.pieces


ZERO2 = [("convnet", 4), *(pytest.param(name, n, marks=pytest.mark.slow) for name in (*KNOWN, *HELD_OUT) for n in (4, 8))]


@installed
@pytest.mark.parametrize(("name", "micro_batch"), ZERO2)
def test_deepspeed_pins_what_is_foretold(name: str, micro_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, by DeepSpeed's own calls in a training with and without sums of gradients; each piece rounded up to a power of two, as
    torch's allocator of such memory does it by its source."""
    from deepspeed.accelerator import get_accelerator

    pieces: list[int] = []

    def pin_memory(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        pieces.append(1 << (tensor.nbytes - 1).bit_length())
        return tensor

    monkeypatch.setattr(get_accelerator(), "pin_memory", pin_memory)
    own = tmp_path / "mine.json"
    zero = {"stage": 2, "reduce_bucket_size": 50_000, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    own.write_text(json.dumps({"zero_optimization": zero}), "utf-8")
    _trained(name, tmp_path / "home", micro_batch, {"offload": "zero2", "deepspeed_config": str(own)})
    assert sum(pieces) == _foretold(name, micro_batch, offload="zero2", buckets=Buckets(50_000)) > 0
