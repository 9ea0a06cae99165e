"""A base that is mapped from a file and larger than the RAM there is trains to the bit, and no count of ours takes its pages for RAM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.cgroups import memory_group
from tests.person import DOOR, Person
from tests.test_memory_container import MB, _bare_trainer_bytes
from tests.test_memory_fitting import bound
from tests.test_memory_offload import LoraToy
from tests.toy import Script, config, run
from trainerd.contract.paths import Home
from trainerd.engine.on_disk import on_disk
from trainerd.engine.trace import of_weights, trace
from trainerd.machine import mapped, memory
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what Linux tells of mapped files and of limits")
_TASK = '''
"""Adapters over a frozen base that is mapped from a file, or read into RAM."""
import os
import torch
from safetensors.torch import load_file
from torch import nn
from trainerd.engine.task import Task

WIDTH, BLOCKS = int(os.environ["BASE_WIDTH"]), int(os.environ["BASE_BLOCKS"])

def packed(numbers, scales):
    import bitsandbytes as bnb
    layer = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, device="meta", quant_type="nf4", compute_dtype=torch.float32)
    about = {"shape": torch.Size((WIDTH, WIDTH)), "blocksize": 256, "quant_type": "nf4", "dtype": torch.float32}
    layer.quant_state = bnb.functional.QuantState(scales, code=bnb.functional.get_4bit_type("nf4", device="cpu"), **about)
    layer.weight = bnb.nn.Params4bit(numbers, quant_type="nf4", quant_state=layer.quant_state, bnb_quantized=True, module=layer)
    return layer

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False, device="meta").requires_grad_(False)
        self.first, self.second = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.base(x)) + self.second(self.first(x)) / BLOCKS

class Mapped(Task):
    reads_data = False

    def model(self):
        model = nn.Sequential(*(Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, 1))
        for name, tensor in load_file(os.environ["BASE_FILE"]).items():
            tensor = tensor.clone() if os.environ.get("BASE_COPIED") else tensor
            if tensor.dtype == torch.uint8:
                model[int(name)].base = packed(tensor, torch.full((WIDTH * WIDTH // 256,), WIDTH**-0.5))
            else:
                model[int(name)].base.weight = nn.Parameter(tensor, requires_grad=False)
        return model

    def blocks(self, model):
        return list(model)[:-1]

    def dataset(self, split):
        x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))
        return torch.utils.data.TensorDataset(x, x[:, :1].clone()) if split == "train" else None

    def counts(self, batch):
        return {"loss": len(batch[1])}

    def loss(self, model, batch, ctx):
        x, y = batch
        return {"loss": (nn.functional.mse_loss(model(x), y, reduction="sum"), 1.0)}, {}
'''


def _base(folder: Path, width: int, blocks: int, bits: int = 32) -> dict[str, str]:
    """A file of so many matrices, written one after the other, and what tells the task of it."""
    file = folder / "base.safetensors"
    generator = torch.Generator().manual_seed(0)

    def matrix() -> torch.Tensor:
        if bits == 4:
            return torch.randint(0, 256, (width * width // 2, 1), dtype=torch.uint8, generator=generator)
        return torch.randn(width, width, generator=generator) / width**0.5

    save_file({str(n): matrix() for n in range(blocks)}, file)
    return {"BASE_FILE": str(file), "BASE_WIDTH": str(width), "BASE_BLOCKS": str(blocks)}


def _trains(home: Path, about: dict[str, str], limit_bytes: int | None, *sets: str) -> tuple[list[Any], bytes, Person]:
    """A real run by the real command, in a group of the kernel's with so much memory; its steps and its model."""
    source = home.parent / "mapped.py"
    source.write_text(_TASK, "utf-8")
    person = Person(home)
    person.environment.update(about)
    settings = {"train.batch_size": 4, "train.micro_batch": 4, "train.precision": "fp32", "train.threads": 1, "polite.priority": "normal"}
    settings["memory.ram_limit"] = "100%"
    asked = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    asked += [word for one in sets for word in ("--set", one)]
    words = ["--home", str(home), "start", "--task", f"{source}:Mapped", "--epochs", "1", "--name", "run", "--wait", *asked]
    command = [sys.executable, str(DOOR), *words]
    with memory_group() as group:
        if limit_bytes is not None:
            group.limit(limit_bytes)
        done = subprocess.run(group.command(*command), capture_output=True, text=True, timeout=900, env=person.environment, check=False)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{person.log()[-3000:]}\n{person.events()}"
        person.waits_until_gone()
    return person.steps(), (Home(home).run("run").model / "model.safetensors").read_bytes(), person


def _compared(tmp_path: Path, about: dict[str, str], limit_bytes: int, *sets: str) -> None:
    """`sets`: of the run within the limit alone."""
    base_bytes = os.path.getsize(about["BASE_FILE"])
    assert limit_bytes < base_bytes + _bare_trainer_bytes()
    within = _trains(tmp_path / "within", about, limit_bytes, *sets)
    without = _trains(tmp_path / "without", {**about, "BASE_COPIED": "1"}, None)
    assert within[:2] == without[:2] and len(within[0]) == 4
    kinds = {event["kind"] for event in within[2].events()}
    assert not kinds & {"smaller", "death", "made room", "stepped_aside", "halved"}, kinds


@linux
def test_a_base_larger_than_the_room_for_it_trains_to_the_bit(tmp_path: Path) -> None:
    """A real trainer in a group of the kernel's: 400 MB of weights mapped from a file, and 480 MB for everything. Every loss and the result
    are those of a run that has them in RAM, without a limit; nothing was refused, halved or left for want of memory."""
    _compared(tmp_path, _base(tmp_path, 4096, 6), 480 * MB)


@linux
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_base_larger_than_all_the_ram_trains_to_the_bit(tmp_path: Path) -> None:
    """1.2 GB of weights, and 0.9 GB for everything: the same."""
    _compared(tmp_path, _base(tmp_path, 4096, 18), 900 * MB)


@linux
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_base_in_4_bits_larger_than_the_room_for_it_is_streamed_to_the_bit(tmp_path: Path) -> None:
    """906 MB of packed weights mapped from a file, their blocks' copies streamed in 900 MB for everything: the losses and the result of
    bitsandbytes' own functions with all of it in RAM."""
    pytest.importorskip("bitsandbytes")
    _compared(tmp_path, _base(tmp_path, 4096, 108, bits=4), 900 * MB, "memory.offload=base")


class _MappedToy(LoraToy):
    """Its blocks' frozen weights lie in a file."""

    file: Path

    def model(self) -> nn.Module:
        model = super().model()
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        if not self.file.exists():
            save_file({name: p.data for name, p in frozen.items()}, self.file)
        for name, tensor in load_file(self.file).items():
            frozen[name].data = tensor
        return model


@linux
def test_what_lies_in_a_file_is_told_from_what_lies_in_ram(tmp_path: Path) -> None:
    """Every frozen weight of a mapped base, and none of one that was copied; what was written into since counts as RAM."""
    task = _MappedToy()
    task.file = tmp_path / "base.safetensors"
    model, _ = bound(task, tmp_path)
    blocks = sum(p.numel() * 4 for p in model.blocks.parameters() if not p.requires_grad)
    beside = sum(p.numel() * 4 for p in model.embed.parameters())
    assert on_disk(task, model) == (beside, blocks)
    assert on_disk(LoraToy(), LoraToy().model()) == (0, 0)
    with torch.no_grad():
        model.blocks[0].up.weight[:16] += 1
    left = sum(on_disk(task, model))
    assert 0.85 * (beside + blocks) < left <= beside + blocks - 16 * 96 * 4


@linux
def test_the_estimate_tells_them_as_on_the_disk(tmp_path: Path) -> None:
    """On a CPU they are left out of the RAM, traced or only weighed; streamed to a GPU, out of RAM and pinned; resident there they stay on
    it."""
    task = _MappedToy()
    task.file = tmp_path / "base.safetensors"
    model, mixed = bound(task, tmp_path)
    traced = trace(task, model, task.train_samples, mixed, 32)
    weighed = of_weights(task, model, mixed)
    beside, blocks = on_disk(task, model)
    for table, found in ((traced, (beside, blocks)), (weighed, (beside + blocks, 0))):
        setup = Setup("cpu", "fp32", 2, 2)
        told = estimate(_with(table, found), setup)
        plain = estimate(table, setup)
        assert plain.ram.point - told.ram.point == told.on_disk_bytes == beside + blocks
        assert any("stay in the file" in one for one in told.assumed) and plain.on_disk_bytes == 0
        assert plain.num_parameters == told.num_parameters
    streamed = Setup("cuda", "fp32", 2, 2, offload="base", checkpointing="full")
    told, plain = (estimate(one, streamed) for one in (_with(traced, (beside, blocks)), traced))
    assert plain.ram.point - told.ram.point == plain.pinned.point - told.pinned.point == told.on_disk_bytes == blocks
    assert told.driver == plain.driver
    resident = Setup("cuda", "fp32", 2, 2)
    assert estimate(_with(traced, (beside, blocks)), resident).driver == estimate(traced, resident).driver


def _with(table: Any, of_files: tuple[int, int]) -> Any:
    from dataclasses import replace

    return replace(table, on_disk=of_files)


@linux
def test_a_run_foretells_it_and_its_receipt_does_not_count_pages_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forecast and in the kept trace; the receipt has no RAM, for the system's count of the most has those pages in it."""
    monkeypatch.setattr(memory, "own_bytes", lambda: 0)  # the tests' own process, which grows, is not asked about
    task = _MappedToy()
    task.file = tmp_path / "base.safetensors"
    documents = []
    for name, one in (("mapped", task), ("plain", LoraToy())):
        link = Script()
        run(tmp_path / name, config({"max_steps": 3}), link, one, traces=True)
        documents.append(json.loads((Home(tmp_path / name).run("toy").folder / "receipt.json").read_text("utf-8")))
    told, plain = documents
    assert plain["predicted"]["ram_bytes"] - told["predicted"]["ram_bytes"] > 1_700_000
    assert told["real"]["ram_bytes"] is None and plain["real"]["ram_bytes"] > 0
    kept = next((tmp_path / "mapped" / "cache" / "traces").glob("*.json"))
    assert sum(json.loads(kept.read_text("utf-8"))["on_disk"]) > 1_700_000


_ASK = """
import sys
import torch
from trainerd.machine import memory, mapped
before = memory.own_bytes()
whole = torch.from_file(sys.argv[1], size=25_000_000)
float(whole.sum())
seen = memory.own_bytes() - before
rss = {name: int(value) for name, value in __import__("re").findall(r"(RssFile|VmRSS):\\s+(\\d+) kB", open("/proc/self/status").read())}
ours = bytearray(50_000_000)
print(seen, rss["RssFile"] * 1024, memory.own_bytes() - before)
"""


@linux
def test_pages_of_a_mapped_file_are_not_our_own(tmp_path: Path) -> None:
    """100 MB are read through a mapping: they are in the process's resident pages, and not in what guard and estimate take for its own;
    50 MB of its own are."""
    file = tmp_path / "data"
    file.write_bytes(os.urandom(1_000_000) * 100)
    done = subprocess.run([sys.executable, "-c", _ASK, str(file)], capture_output=True, text=True, check=True)
    seen, of_files, ours = map(int, done.stdout.split())
    assert of_files > 100_000_000 and seen < 30_000_000 and 50_000_000 <= ours < 80_000_000


_HOLD = """
import mmap, sys
from multiprocessing import shared_memory
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sum(mapped[:: mmap.PAGESIZE])
ours = bytearray(40_000_000)
shared = shared_memory.SharedMemory(create=True, size=20_000_000)
shared.buf[:] = bytes(20_000_000)
print("held", flush=True)
sys.stdin.read()
shared.close()
shared.unlink()
"""


@linux
def test_what_a_tree_keeps_from_others_is_not_what_it_has_mapped(tmp_path: Path) -> None:
    """100 MB of a file, 40 of its own, 20 in shared memory: the status and the rule for stepping aside count 60, and the interpreter."""
    file = tmp_path / "data"
    file.write_bytes(os.urandom(1_000_000) * 100)
    command = [sys.executable, "-c", _HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        resident, counted = psutil.Process(child.pid).memory_info().rss, memory.process_tree_bytes(child.pid)
        child.communicate("")
    assert resident > 160_000_000
    assert counted is not None and 60_000_000 <= counted < 90_000_000


@linux
def test_a_file_in_ram_is_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mapped from a tmpfs takes RAM, wherever it is."""
    file = tmp_path / "data"
    file.write_bytes(b"x" * 8192)
    seen = torch.from_file(str(file), size=2048)
    assert mapped.in_files([(seen.data_ptr(), 8192)], mapped.parts()) == ([True], 0)
    monkeypatch.setattr(mapped, "mount", lambda path: ("tmpfs", "tmpfs"))
    assert mapped.in_files([(seen.data_ptr(), 8192)], mapped.parts()) == ([False], 0)
    assert memory.own_bytes() <= psutil.Process().memory_info().rss and re.match(r"\d", str(memory.own_bytes()))
