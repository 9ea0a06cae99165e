"""What must hold after every death, and at a run's end, looked at from outside. Must not use the engine's own loading code:
it is what is judged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainerd.contract import lock
from trainerd.contract.paths import RunPaths
from trainerd.engine.selftest.small_run import BATCH_SIZE, KEEP
from trainerd.engine.selftest.small_task import NUM_SAMPLES

_MANIFEST = re.compile(r"checkpoint_epoch_(?P<epoch>\d+)_step_(?P<step>\d+)\.json")
_STATE = re.compile(r"checkpoint_epoch_\d+_step_(?P<step>\d+)\.pt")


class Broken(Exception):
    """A promise that does not hold, in words."""


@dataclass
class Outcome:
    """What a finished run must have in common with an undisturbed one, whatever happened on the way."""

    lines: list[dict[str, Any]]
    weights: bytes
    files: set[str]

    def compare(self, undisturbed: Outcome) -> None:
        """Raises Broken at the first difference."""
        for mine, other in zip(self.lines, undisturbed.lines, strict=False):
            if mine != other:
                raise Broken(f"metrics.jsonl differs at step {other['step']}: {mine} instead of {other}")
        if len(self.lines) != len(undisturbed.lines):
            raise Broken(f"metrics.jsonl has {len(self.lines)} lines instead of {len(undisturbed.lines)}")
        if self.weights != undisturbed.weights:
            raise Broken("model.safetensors differs")
        for name in sorted(self.files ^ undisturbed.files):
            raise Broken(f"{name} is {'left over' if name in self.files else 'missing'}")


def outcome(paths: RunPaths) -> Outcome:
    """What a finished run has left; what was set aside as bad is not counted. Raises Broken when a sample was doubled or skipped."""
    lines = [json.loads(line) for line in paths.metrics.read_bytes().splitlines()]
    for line in lines:
        line.pop("t", None)
    each_sample_once(lines)
    found = {
        path.relative_to(folder).as_posix() for folder in (paths.folder, paths.checkpoints, paths.model) for path in folder.rglob("*")
    }
    kept = {name for name in found if ".bad-" not in name and "__pycache__" not in name}
    return Outcome(lines, (paths.model / "model.safetensors").read_bytes(), kept)


def each_sample_once(lines: Iterable[dict[str, Any]]) -> None:
    """Every step names the samples it was fed: in each epoch every sample is there, once. Raises Broken."""
    epochs: dict[int, int] = {}
    steps: list[int] = []
    for line in lines:
        if "loss" not in line:
            continue
        steps.append(line["step"])
        fed = int(line["metrics"]["fed"] * BATCH_SIZE)
        before = epochs.get(line["epoch"], 0)
        if before & fed or fed.bit_count() != BATCH_SIZE:
            raise Broken(f"step {line['step']} was fed a sample that epoch {line['epoch']} had had before")
        epochs[line["epoch"]] = before | fed
    if steps != list(range(1, len(steps) + 1)):
        raise Broken("metrics.jsonl does not hold every step once, in order")
    for epoch, fed in epochs.items():
        if fed != (1 << NUM_SAMPLES) - 1:
            raise Broken(f"epoch {epoch} skipped {NUM_SAMPLES - fed.bit_count()} samples")


@dataclass
class Found:
    """The checkpoints of a run as they lie there: step -> its newest manifest; and what a commit that was cut off has left."""

    manifests: dict[int, Path] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    """Of every manifest, in order: a step that was left in the middle of its evaluation, and then evaluated, has two."""
    torn: set[str] = field(default_factory=set)


class Ledger:
    """What one run has acknowledged so far, held against what lies on the disk."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self.acknowledged: set[int] = set()
        self._best: tuple[float, int] | None = None

    @property
    def newest(self) -> int:
        return max(self.acknowledged, default=0)

    def spoiled(self, found: Found, steps: Iterable[int]) -> None:
        """These were damaged on purpose: only the others that lie there are still to be found."""
        self.acknowledged = set(found.manifests) - set(steps)
        self._best = None

    def look(self) -> Found:
        """After a death: every acknowledged checkpoint that must be kept is there and whole. Raises Broken."""
        found = find(self._paths.checkpoints)
        best: dict[int, float] = {}
        for step, path in found.manifests.items():
            value = _whole(path, step)
            if value is not None:
                best[step] = value
        newest = max(found.manifests, default=0)
        if newest < self.newest:
            raise Broken(f"the checkpoint of step {self.newest} was acknowledged, and the newest there is step {newest}")
        kept = found.steps[-KEEP:]
        lost = [step for step in self.acknowledged if kept and step >= kept[0] and step not in found.manifests]
        if lost:
            raise Broken(f"the acknowledged checkpoint of step {lost[0]} is gone")
        self._best_is_kept(best)
        return found

    def _best_is_kept(self, best: dict[int, float]) -> None:
        """Of equal values the oldest: later ones only carry it on."""
        here = min(((value, step) for step, value in best.items()), default=None)
        if self._best is not None and (here is None or here > self._best):
            raise Broken(f"the best checkpoint, of step {self._best[1]}, is gone")
        self._best = here


def find(folder: Path) -> Found:
    """What lies in a run's folder of checkpoints."""
    found = Found()
    states: dict[int, str] = {}
    for path in sorted(folder.iterdir(), key=_by_epoch) if folder.is_dir() else ():
        if match := _MANIFEST.fullmatch(path.name):
            found.manifests[int(match["step"])] = path
            found.steps.append(int(match["step"]))
        elif match := _STATE.fullmatch(path.name):
            states[int(match["step"])] = path.name
        elif path.name.endswith(".tmp"):
            found.torn.add(path.name)
    found.steps.sort()
    found.torn |= {name for step, name in states.items() if step not in found.manifests}
    return found


def _by_epoch(path: Path) -> int:
    match = _MANIFEST.fullmatch(path.name)
    return int(match["epoch"]) if match else 0


def _whole(manifest: Path, step: int) -> float | None:
    """The best value its manifest carries. Raises Broken when state and manifest are not one whole checkpoint."""
    document = json.loads(manifest.read_bytes())
    state_path = manifest.with_suffix(".pt")
    try:
        content = state_path.read_bytes()
    except FileNotFoundError:
        raise Broken(f"{manifest.name} has lost its .pt file") from None
    if len(content) != document["bytes"] or hashlib.sha256(content).hexdigest() != document["sha256"]:
        raise Broken(f"{state_path.name} is not what its manifest says")
    if torch.load(state_path, weights_only=True)["step"] != step:
        raise Broken(f"{state_path.name} holds another step")
    best: float | None = document["best"]
    return best


def nobody_left(paths: RunPaths) -> None:
    """No lock is held, and no temporary file lies in the home. Raises Broken."""
    if lock.is_held(paths.home.trainer_lock):
        raise Broken("a trainer still holds its lock")
    for path in paths.home.root.rglob("*.tmp"):
        raise Broken(f"{path.relative_to(paths.home.root)} is left over")
