"""PYTORCH_CUDA_ALLOC_CONF: read as torch reads it, followed by the replay, shown, and never mixed with torch's own settings."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from client import registration
from tests.person import Person
from trainerd.config.model import RunConfig
from trainerd.contract.paths import Home
from trainerd.engine import fitting
from trainerd.memory import allocator_settings, forecast, receipts
from trainerd.memory.allocator import LARGE_SEGMENT, Allocator, replay
from trainerd.memory.allocator_settings import asked, settings
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup
from trainerd.tasks.cadence.blocks import table
from trainerd.tasks.cadence.settings import CadenceSettings

MIB = 1 << 20
NAME = "PYTORCH_CUDA_ALLOC_CONF"
TABLE = table(CadenceSettings())
ON_A_GPU = Setup("cuda", "fp32", 4, 4)
TAKEN = [
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "roundup_power2_divisions:[64:8, 128:2,256:4,512:2,1024:4,>:1]",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:[>:4]",
    "roundup_power2_divisions:[]",
    "roundup_power2_divisions:[131072:2]",
    "roundup_power2_divisions:[2:0,>:2]",
    "max_split_size_mb:20",
    "large_segment_size_mb:12,max_split_size_mb:12",
    "max_split_size_mb:12,large_segment_size_mb:12",
    "large_segment_size_mb:64",
    "max_split_size_mb:64,",
    " expandable_segments : True ",
    "garbage_collection_threshold:0.5",
    "max_split_size_mb:64,max_split_size_mb:80",
    "max_non_split_rounding_mb:30,pinned_use_background_threads:True",
    "",
]
REFUSED = [
    "roundup_power2_divisions:[0:2]",
    "roundup_power2_divisions:[256:1 512:2]",
    "roundup_power2_divisions:0",
    "roundup_power2_divisions:3",
    "max_split_size_mb:19",
    "max_split_size_mb:30,large_segment_size_mb:40",
    "large_segment_size_mb:10",
    "max_split_size_mb",
    "max_split_size_mb:",
    "max_split_size_mb:64 expandable_segments:True",
    "max_split_size_mb:[3,4]",
    "expandable_segments:true",
    "garbage_collection_threshold:1.0",
    ",",
]


_TORCHS_READER = """
import ctypes, json, os, sys
import torch
library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libc10.so")) if sys.platform == "linux" else None
name = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig"
divisions_of, instance = (getattr(library, name + end, None) for end in ("24roundup_power2_divisionsEm", "8instanceEv"))
is_open = divisions_of is not None and instance is not None
if is_open:
    divisions_of.restype, divisions_of.argtypes = ctypes.c_size_t, [ctypes.c_size_t]
    instance.restype = ctypes.POINTER(ctypes.c_uint64)  # large_segment_size_, max_split_size_, max_non_split_rounding_size_, ...
found = []
for text in json.loads(sys.argv[1]):
    torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")  # what was set before holds
    try:
        torch._C._accelerator_setAllocatorSettings(text)
    except (ValueError, RuntimeError):
        found.append(None)
    else:
        found.append([[divisions_of(1 << power) for power in range(20, 36)], instance()[:3]] if is_open else [])
print(json.dumps(found))
"""


def test_it_is_read_as_torch_reads_it() -> None:
    """What torch takes is taken, what it refuses is refused, and powers of two are divided as torch divides them. Its reader is in
    its CPU build, too; in a process of its own, for it cannot be told to forget."""
    if not hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        pytest.skip("this torch has no settings common to all accelerators")
    command = [sys.executable, "-c", _TORCHS_READER, json.dumps([*TAKEN, *REFUSED])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for text, theirs in zip([*TAKEN, *REFUSED], json.loads(done.stdout), strict=True):
        ours = asked({NAME: text}, "linux")
        assert (theirs is not None) == (text in TAKEN) == (not ours.startswith("?")), text
        if theirs:
            found = settings(ours)
            assert [*found.divisions] == (theirs[0] if "roundup" in text else []), text
            assert [found.large_segment, min(found.max_split, 2**64 - 1), found.rounding] == theirs[1], text


def test_of_two_variables_torchs_first_one_counts() -> None:
    """Even when it is empty; without either it is torch's own allocator."""
    both = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", NAME: "max_split_size_mb:128"}
    assert asked(both, "linux") == "max_split_size_mb:128"
    assert asked({**both, NAME: ""}, "linux") == "" == asked({}, "linux")
    assert asked({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "linux") == "max_split_size_mb:64"


def test_what_changes_nothing_is_torchs_own_allocator() -> None:
    """A receipt and a remembered replay stay valid for it; under Windows torch has no expandable segments."""
    for text in ("backend:native", "expandable_segments:False", "release_lock_on_cudamalloc:True"):
        assert asked({NAME: text}, "linux") == ""
    assert asked({NAME: "expandable_segments:True"}, "linux") == "expandable_segments:True"
    assert asked({NAME: "expandable_segments:True,max_split_size_mb:64"}, "win32") == "max_split_size_mb:64"
    assert settings("").is_native and settings("garbage_collection_threshold:0.8").is_native
    assert not settings("max_split_size_mb:64").is_native


def test_blocks_above_the_largest_split_go_to_requests_of_their_size() -> None:
    """max_split_size: neither cut for a smaller request nor given to one, and to a larger one only within the rounding."""
    a = Allocator(max_split=32 * MIB)
    a.free(a.malloc(60 * MIB))
    a.malloc(20 * MIB)
    assert a.reserved == 80 * MIB
    a.malloc(40 * MIB)  # within 20 MiB of 60: given whole
    assert (a.reserved, a.allocated) == (120 * MIB, 60 * MIB)
    a.malloc(41 * MIB)
    assert (a.reserved, a.allocated) == (120 * MIB, 120 * MIB)
    b = Allocator(max_split=32 * MIB, rounding=30 * MIB)
    b.free(b.malloc(60 * MIB))
    b.malloc(40 * MIB)
    assert (b.reserved, b.allocated) == (60 * MIB, 60 * MIB)


def test_at_the_limit_a_block_above_the_largest_split_goes_back_alone() -> None:
    """The smallest that is enough, else the largest ones together; what is cached below stays."""
    a = Allocator(max_split=32 * MIB, limit=200 * MIB)
    for block in [a.malloc(size * MIB) for size in (16, 40, 60, 80)]:
        a.free(block)
    a.malloc(100 * MIB)  # 80, then 60
    assert (a.reserved, a.retries) == ((16 + 40 + 100) * MIB, 0)
    a.malloc(33 * MIB)
    assert a.reserved == (16 + 40 + 100) * MIB, "40 is near enough"
    a.malloc(50 * MIB)  # nothing of that kind is left: all that is cached goes
    assert (a.reserved, a.retries) == ((40 + 100 + 50) * MIB, 1)


def test_powers_of_two_are_divided() -> None:
    """torch's own example, 1,200 in four parts between 1,024 and 2,048 is 1,280, a thousand times as large."""
    a = Allocator(divisions=(4,) * 16)
    for size, held in ((1200 << 10, 1280 << 10), (1 << 20, 1 << 20), (1100, 1536), (5000, 5120)):
        before = a.allocated
        a.malloc(size)
        assert a.allocated - before == held, size
    assert Allocator(divisions=settings("roundup_power2_divisions:[2:2,>:0]").divisions)._rounded(5 * MIB) == 5 * MIB


def test_segments_of_another_size() -> None:
    """large_segment_size_mb: what is below 10 MiB shares them, and an expandable segment grows by them."""
    a = Allocator(large_segment=64 * MIB)
    a.malloc(2 * MIB)
    assert a.reserved == 64 * MIB
    b = Allocator(large_segment=64 * MIB, expandable=True)
    b.malloc(65 * MIB)
    assert b.reserved == 128 * MIB


def test_an_estimate_follows_the_variable_and_says_so() -> None:
    """Each setting has a replay of its own that is remembered apart; without one the figures are those of before."""
    plain = estimate(TABLE, ON_A_GPU)
    assert plain.reserved is not None and not any(NAME in text for text in (*plain.assumed, *plain.not_modelled))
    for text, kwargs in (
        ("expandable_segments:True", {"expandable": True}),
        ("max_split_size_mb:20", {"max_split": 20 * MIB}),
        ("roundup_power2_divisions:1", {"divisions": (1,) * 16}),
        ("roundup_power2_divisions:2", {"divisions": (2,) * 16}),
    ):
        found = estimate(TABLE, Setup("cuda", "fp32", 4, 4, allocator=text))
        timeline = TABLE.timeline(ON_A_GPU)
        at = next(at for at, phase in timeline.marks if phase == "training")
        events = [*timeline.events[:at], len(timeline.sizes), *timeline.events[at:]]
        expected = replay([*timeline.sizes, 8_519_680], events, Allocator(**kwargs))  # type: ignore[arg-type]
        assert found.raw["reserved_bytes"] == expected.reserved and found.raw["allocated_bytes"] == expected.allocated, text
        assert any(f"asks for it: {text}" in said for said in found.assumed)
    assert estimate(TABLE, ON_A_GPU) == plain
    assert estimate(TABLE, Setup("cuda", "fp32", 4, 4, allocator="expandable_segments:True")).reserved != plain.reserved


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backend:cudaMallocAsync,max_split_size_mb:64", "has backend:cudaMallocAsync: which is not modelled"),
        ("garbage_collection_threshold:0.8", "garbage_collection_threshold:0.8: what it collects near the limit is not replayed"),
        ("pinned_reserve_segment_size_mb:64", "pinned_reserve_segment_size_mb:64: what it changes of the pinned RAM"),
        ("max_split_size_mb:3", "has max_split_size_mb:3: trainerd cannot read it"),
    ],
)
def test_what_the_replay_cannot_follow_is_named(text: str, words: str) -> None:
    """In what is not in the estimate, whose figures are torch's own allocator's."""
    found = estimate(TABLE, Setup("cuda", "fp32", 4, 4, allocator=asked({NAME: text}, "linux")))
    assert any(words in said for said in found.not_modelled), found.not_modelled
    assert found.raw["reserved_bytes"] == estimate(TABLE, ON_A_GPU).raw["reserved_bytes"]


def test_a_receipt_under_another_setting_corrects_nothing() -> None:
    """Nor does one without for one with; those of an earlier trainerd, which knows no settings, are torch's own."""
    asked_for = Setup("cuda", "fp32", 4, 4, allocator="expandable_segments:True")
    for setup, other in ((ON_A_GPU, asked_for), (asked_for, ON_A_GPU)):
        told = {"kind": "k", "device": "g", "setup": receipts.setup_kind(setup), "predicted": {"reserved_bytes": 10}}
        given = [{**told, "real": {"reserved_bytes": 12}}]
        assert receipts.trust(given, "k", "g", None, setup).of("reserved_bytes").num_runs == 1
        assert receipts.trust(given, "k", "g", None, other).of("reserved_bytes").num_runs == 0
    assert "allocator" not in receipts.setup_kind(ON_A_GPU)
    assert "allocator expandable_segments:True" in receipts.trust([], "k", "g", None, asked_for).of_setup


def test_plan_and_the_trainer_read_the_same_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` for a GPU shows it and counts by it; the trainer's own question has it on a GPU and not on a CPU."""
    said, person = [], Person(tmp_path / "home")
    for text in ("", "expandable_segments:True"):
        person.environment[NAME] = text
        done = person.types("plan", "--budget", "3.5GB", "--json")
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout)["estimate"])
    expected = "expandable_segments:True" if sys.platform == "linux" else ""
    assert [one["setup"]["allocator"] for one in said] == ["", expected]
    assert (said[0]["reserved"] != said[1]["reserved"]) is bool(expected)
    monkeypatch.setenv(NAME, "max_split_size_mb:64")
    plan = {"device": "cpu", "precision": "fp32", "micro_batch": 1, "effective_batch": 1}
    plan |= {"offload": "none", "activation_checkpointing": "none"}
    config = RunConfig(task="cadence")
    place = fitting._place(config, plan, Home(tmp_path))  # type: ignore[arg-type]
    assert place.allocator == "max_split_size_mb:64"
    for device, found in (("cpu", ""), ("cuda", "max_split_size_mb:64")):
        there = forecast.Place(device, 1, "fp32", allocator=place.allocator)
        assert fitting.Forecast(None, there).setup(plan, config).allocator == found  # type: ignore[arg-type]
        assert forecast.question(config, there).setup.allocator == found


def test_a_run_that_goes_on_after_a_log_in_has_the_same_allocator() -> None:
    """The variable is among those that `start` keeps for the log-in."""
    assert set(allocator_settings.VARIABLES) <= set(registration._KEPT_VARIABLES)
    assert settings("").max_split == math.inf and settings("").large_segment == LARGE_SEGMENT


_ON_THE_DEVICE = """
import torch
from tests.test_memory_gpu import random_trace
from trainerd.memory import allocator_settings
from trainerd.memory.allocator import Allocator
import os, sys
found = allocator_settings.settings(allocator_settings.asked(os.environ, sys.platform))
names = ("expandable", "max_split", "rounding", "large_segment", "divisions")
total = torch.cuda.get_device_properties(0).total_memory
sizes, events = random_trace(3)
replayed = Allocator(device_bytes=total, **{name: getattr(found, name) for name in names})
blocks, tensors = {}, {}
for event in events:
    if event >= 0:
        blocks[event] = replayed.malloc(sizes[event])
        tensors[event] = torch.empty(sizes[event], dtype=torch.uint8, device="cuda")
    else:
        replayed.free(blocks.pop(~event))
        del tensors[~event]
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (replayed.allocated, replayed.reserved), event
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize(
    "text", ["expandable_segments:True", "max_split_size_mb:24", "roundup_power2_divisions:4", "large_segment_size_mb:64"]
)
def test_the_replay_counts_what_torch_counts_under_it(text: str) -> None:
    """On a GPU, in a process that has the variable: allocated and reserved are equal after every event, to the byte."""
    command, environment = [sys.executable, "-c", _ON_THE_DEVICE], {**os.environ, NAME: text}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
