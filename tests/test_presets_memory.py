"""What a preset says it needs is what it needs: by the estimate on both devices, and in real trainings of its own model and batch."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.person import Person
from trainerd.config import catalogue
from trainerd.config.load import resolve
from trainerd.contract import status
from trainerd.machine.memory import process_tree_bytes
from trainerd.memory import forecast
from trainerd.memory.receipts import FILE

GENEROUS = 10**12
PLAIN = ("--set", "polite.priority=normal", "--set", "checkpoint.every_minutes=60")


def test_every_preset_states_what_it_needs() -> None:
    """A preset without a figure cannot ship; a larger one never states less."""
    assert set(catalogue.STATED) == set(catalogue.preset_names())
    stated = list(catalogue.STATED.values())
    assert stated == sorted(stated, key=lambda one: (one.vram_bytes, one.ram_bytes))
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
    assert "`quick` 2 GB of GPU memory and 4 GB of RAM, `standard` 3 and 6, `extended` 3.5 and 8" in readme


@pytest.mark.parametrize("preset", list(catalogue.STATED))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_stays_below_what_is_stated(preset: str, precision: str) -> None:
    """The upper bound: RAM on a CPU, the driver's view and the host's RAM on a GPU, with the batch whole."""
    asked = resolve(None, preset)
    entry = catalogue.find_task(asked.config.task)
    table = entry.blocks_module.table(entry.settings_model.model_validate(asked.config.settings), asked.config.data)
    stated = catalogue.STATED[preset]
    for device in ("cpu", "cuda"):
        place = forecast.Place(device, GENEROUS, precision)
        found = forecast.answer(asked.config, place, table).estimate
        assert found.setup.accumulation == 1
        assert found.ram.upper + found.pinned.upper < stated.ram_bytes
        if device == "cuda":
            assert found.driver is not None and found.driver.upper < stated.vram_bytes
    small = replace(place, budget_bytes=stated.vram_bytes)
    assert forecast.answer(asked.config, small, table).verdict == "fits"


def trained(person: Person, *words: str) -> int:
    """Train to the end; the most RAM the trainer and all it started had at any look."""
    person.starts(*words, *PLAIN)
    most = 0
    deadline = time.monotonic() + 1500
    while (reading := person.sees()).state not in status.END_STATES:
        assert time.monotonic() < deadline
        shown = reading.status
        if shown is not None and shown.trainer.pid:
            most = max(most, process_tree_bytes(shown.trainer.pid) or 0)
        time.sleep(0.05)
    assert reading.state == status.COMPLETED, reading.reason
    return most


def receipt_bytes(person: Person, measure: str) -> int:
    receipt = json.loads((person.home.run(person.run()).folder / FILE).read_text("utf-8"))
    found = receipt["real"][measure]
    assert isinstance(found, int)
    return found


def stays_below(person: Person, preset: str, *words: str) -> None:
    stated = catalogue.STATED[preset].ram_bytes
    most = trained(person, "--preset", preset, *words)
    assert 100_000_000 < most < stated and receipt_bytes(person, "ram_bytes") < stated


def test_a_few_steps_of_the_largest_preset_stay_below_its_ram(tmp_path: Path) -> None:
    """extended's model, batch and data, prepared and trained for six steps: the whole tree, at every look, and the system's own peak."""
    person = Person(tmp_path / "home")
    try:
        stays_below(person, "extended", "--set", "train.max_steps=6", "--set", "settings.eval_prefixes=4")
    finally:
        person.leaves()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", list(catalogue.STATED))
def test_a_whole_training_stays_below_its_ram(preset: str, tmp_path: Path) -> None:
    """Every preset as a person starts it, from the first row to the result."""
    person = Person(tmp_path / "home")
    try:
        stays_below(person, preset)
    finally:
        person.leaves()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("preset", list(catalogue.STATED))
def test_a_training_on_a_gpu_stays_below_its_vram(preset: str, tmp_path: Path) -> None:
    """What torch reserved and the measured context together, and RAM; the machine is measured first, so that the context is known."""
    person = Person(tmp_path / "home")
    try:
        measured = person.types("plan", "--measure", "--json")
        assert measured.returncode == 0, measured.stderr
        stays_below(person, preset, "--set", "train.max_steps=40")
        assert receipt_bytes(person, "driver_bytes") < catalogue.STATED[preset].vram_bytes
    finally:
        person.leaves()
