"""Flipped bits, holes, truncations and missing files, in every kind of file a resume reads: each is noticed, by name."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.campaigns import size
from tests.disks import Notes
from trainerd.contract.errors import NoGoodCheckpoint
from trainerd.contract.paths import Home, RunPaths
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.loop import Link
from trainerd.engine.selftest import damage, oracle, small_run
from trainerd.engine.selftest.small_task import Small
from trainerd.engine.trainer import Trainer


def trained(folder: Path) -> RunPaths:
    """A finished run: its checkpoints, its metrics, its model."""
    Trainer(Small(), small_run.config(3, epochs=6), home=folder, run="small", link=Link()).train()
    return Home(folder).run("small")


def states(folder: Path) -> dict[int, Any]:
    return {step: torch.load(path.with_suffix(".pt"), weights_only=True) for step, path in oracle.find(folder).manifests.items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def spoil_and_load(origin: Path, folder: Path, expected: dict[int, Any], chance: random.Random) -> Counter[str]:
    """Damage the newest, the newest two, or all checkpoints; every one must be named, and the newest whole one loaded, whole."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(origin, folder)
    steps = sorted(expected)
    number = chance.choices([1, 2, len(steps)], [6, 3, 1])[0]
    done: Counter[str] = Counter()
    damaged = set()
    for step in steps[-number:]:
        way, path = damage.spoil(oracle.find(folder).manifests[step], chance)
        done[f"{way} {path.suffix}"] += 1
        damaged.add(path.with_suffix(".pt").name)
    notes = Notes()
    store = CheckpointStore(folder, keep=small_run.KEEP, note=notes)
    if number == len(steps):
        with pytest.raises(NoGoodCheckpoint):
            store.load()
    else:
        found = store.load()
        assert found is not None and found[1].step == steps[-number - 1] and same(found[0], expected[found[1].step]), done
    named = {facts["file"] for kind, facts in notes if kind in ("quarantine", "uncommitted")}
    assert named == damaged, f"damaged {damaged}, named {named}: {done}"
    return done


def damage_checkpoints(tmp_path: Path, times: int) -> Counter[str]:
    origin = trained(tmp_path / "home").checkpoints
    expected = states(origin)
    assert len(expected) >= small_run.KEEP
    chance, done = random.Random(times), Counter[str]()
    while done.total() < times:
        done += spoil_and_load(origin, tmp_path / "spoiled", expected, chance)
    return done


def test_damage_is_noticed(tmp_path: Path) -> None:
    """A hundred at random: named, set aside, and the one before is used; with all damaged it stops and never begins again."""
    assert damage_checkpoints(tmp_path, 100).total() >= 100


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_thousand_damages_are_noticed(tmp_path: Path) -> None:
    """The same, a thousand times over states and manifests."""
    done = damage_checkpoints(tmp_path, size.of("DAMAGES", 1000))
    size.tell(f"damage: {done.total()} of {done.total()} noticed and named: " + ", ".join(f"{n} {way}" for way, n in sorted(done.items())))


class Listening(Link):
    """Remembers what a person would be told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def send(self, event: str, **fields: Any) -> None:
        self.told.append(str(fields.get("text")))


@pytest.mark.parametrize("way", damage.WAYS)
def test_damaged_metrics_are_named(tmp_path: Path, way: str) -> None:
    """metrics.jsonl is the record of the run, not what it is resumed from: what is wrong with it is said, and training goes on."""
    home = tmp_path / "home"
    paths = trained(home)
    shutil.rmtree(paths.model)
    damage.WAYS[way](paths.metrics, random.Random(1))
    listening = Listening()
    result = Trainer(Small(), small_run.config(3, epochs=6), home=home, run="small", link=listening).train()
    told = "changed or damaged" if way in ("flip", "hole") else "bytes shorter than the checkpoint says"
    assert result.outcome == "finished" and any(told in text for text in listening.told)
