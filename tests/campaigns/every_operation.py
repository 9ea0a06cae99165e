"""`python -m tests.campaigns.every_operation FOLDER EVERY [KIND…]`: SIGKILL at the file operations of a trainer's life. No tests here.

A program of its own because lives are forked from a process with one thread. Every point of every file is listed first,
by an undisturbed life: start, load, setting aside, commit, retention, metrics, export; or one that is asked to leave, while it
trains or in the middle of an evaluation (these are short, and died at three times as densely). Then each EVERYth is died at.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.disks import WatchedDisk
from trainerd.contract import files, phases, wire
from trainerd.contract.paths import Home, RunPaths
from trainerd.engine.selftest import damage, oracle, small_run
from trainerd.engine.selftest.life import ForkedLife
from trainerd.engine.selftest.oracle import Ledger

Point = tuple[str, str, int]
_SEED = 5


def named(path: Path) -> str:
    """A name that is the same in every life."""
    return re.sub(r"\.\d+-\d+\.tmp$", ".tmp", path.name)


class Watching(WatchedDisk):
    """Writes each operation down, and dies at one: before it, half way through a write, or after it."""

    def __init__(self, seen: Path | None, target: Point | None = None, when: str = "") -> None:
        self._seen, self._target, self._when = seen, target, when
        self._counts: Counter[tuple[str, str]] = Counter()

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        key = (kind, named(path))
        self._counts[key] += 1
        point = (*key, self._counts[key])
        if self._seen is not None:
            with open(self._seen, "a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")
        if point != self._target:
            return action()
        if self._when == "half":
            self._half(path, action, detail)
        elif self._when == "after":
            action()
        os.kill(os.getpid(), signal.SIGKILL)

    def _half(self, path: Path, action: Callable[[], Any], detail: Any) -> None:
        if detail is None:  # written by a library, all at once
            action()
            os.truncate(path, path.stat().st_size // 2)
        else:
            detail[0].write(detail[1][: len(detail[1]) // 2])
            detail[0].flush()


def watch(disk: Watching) -> None:
    """From here on this process's files are that disk's."""
    from trainerd.engine import export

    files.disk = disk
    save = export.save_file
    export.save_file = lambda stored, path, **more: disk.at("write", Path(path), lambda: save(stored, path, **more))  # type: ignore[assignment]


def leave_in(phase: str, times: int) -> None:
    """From here on this process is asked to leave when it looks for commands in that phase for the `times`th time."""
    from trainerd.engine.loop import Asked

    looks, to_leave = [0], Asked.to_leave

    def asked(self: Asked) -> bool:
        looks[0] += self._pulse.phase == phase
        if looks[0] == times and self.leave is None:
            self.leave = {"do": wire.LEAVE, "why": "stop", "save": True}
        return to_leave(self)

    Asked.to_leave = asked  # type: ignore[method-assign]


LEAVING = {
    "leaving": (phases.TRAINING, 33),  # between two micro-batches: there is a step to be given up
    "leaving-evaluation": (phases.EVALUATING, 3),  # its second: the step is saved with and without it
}


class Stage:
    """The home the lives live in, and how one of them is lived."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder)
        self.home.logs.mkdir(parents=True)
        self.log = self.home.logs / "lives.log"

    def live(
        self, paths: RunPaths, disk: Watching | None = None, until_step: int | None = None, leaves: tuple[str, int] | None = None
    ) -> tuple[int | None, set[int]]:
        """(how it ended, the steps it acknowledged); killed once it has acknowledged `until_step`, asked to leave in a phase."""
        acknowledged: set[int] = set()

        def hear(events: list[dict[str, Any]]) -> None:
            acknowledged.update(event["step"] for event in events if event["event"] == wire.CHECKPOINT)

        def first() -> None:
            if disk is not None:
                watch(disk)
            if leaves is not None:
                leave_in(*leaves)

        life = ForkedLife(paths, self.log, first)
        while not life.ended():
            hear(life.events(0.001))
            if until_step is not None and max(acknowledged, default=0) >= until_step:
                life.kill()
        hear(life.last_events())
        return life.code, acknowledged

    def begin(self, name: str) -> RunPaths:
        return small_run.begin(self.home, name, small_run.config(_SEED, epochs=4))

    def damaged(self, name: str) -> RunPaths:
        """A run that was killed at half its way, its newest two checkpoints damaged."""
        paths = self.begin(name)
        self.live(paths, until_step=16)
        for step in sorted(found(paths))[-2:]:
            damage.flip(found(paths)[step].with_suffix(".pt"), random.Random(step))
        return paths


def found(paths: RunPaths) -> dict[int, Path]:
    return oracle.find(paths.checkpoints).manifests


def points_of(seen: Path) -> list[tuple[Point, str]]:
    """Before and after every operation, and half way through every write."""
    listed = [json.loads(line) for line in seen.read_text("utf-8").splitlines()]
    points: list[tuple[Point, str]] = []
    for kind, name, number in listed:
        whens = ("half", "after") if kind == "write" else ("before", "after")
        points += [((kind, name, number), when) for when in whens]
    return points


def compare(found: oracle.Outcome, expected: oracle.Outcome, left: bool) -> None:
    """A step that was left in the middle of its evaluation is saved once more when it has been evaluated, under the next epoch's name."""
    if left:
        found, expected = replace(found, files=_without_epochs(found.files)), replace(expected, files=_without_epochs(expected.files))
    found.compare(expected)


def _without_epochs(names: set[str]) -> set[str]:
    return {re.sub(r"_epoch_\d+", "", name) for name in names}


def campaign(stage: Stage, name: str, make: Callable[[str], RunPaths], every: int, expected: oracle.Outcome) -> tuple[int, int]:
    """(points, points reached) of lives that begin as `make` leaves the run."""
    seen = stage.home.root / f"{name}.operations"
    origin = make(f"{name}-recorded")
    kept = stage.home.root.with_name(f"{stage.home.root.name}-{name}-origin")
    parts = (origin.folder, origin.checkpoints)
    for part in parts:
        if part.exists():
            shutil.copytree(part, kept / part.parent.name)
    leaves = LEAVING.get(name)
    code, _ = stage.live(origin, Watching(seen), leaves=leaves)
    assert code == (wire.EXIT_LEFT if leaves else wire.EXIT_FINISHED), code
    points = points_of(seen)[::every]
    reached = 0
    for point, when in points:
        small_run.remove(origin)
        for part in parts:
            if (kept / part.parent.name).exists():
                shutil.copytree(kept / part.parent.name, part)
        ledger = Ledger(origin)
        code, acknowledged = stage.live(origin, Watching(None, point, when), leaves=leaves)
        ledger.acknowledged |= acknowledged
        reached += code == -signal.SIGKILL
        try:
            if name != "damaged":
                ledger.look()
            code, _ = stage.live(origin)
            if code != wire.EXIT_FINISHED:
                raise oracle.Broken(f"the next life ended with {code}")
            oracle.nobody_left(origin)
            compare(oracle.outcome(origin), expected, leaves is not None)
        except oracle.Broken as broken:
            raise SystemExit(f"{name}, {when} {point}: {broken}") from None
    return len(points), reached


def main() -> None:
    from trainerd.engine.selftest import devices

    folder, every = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["TRAINERD_STATE"] = str(folder / "state")
    stage = Stage(folder)
    assert devices._warm_up(stage.home)
    whole = stage.begin("whole")
    assert stage.live(whole)[0] == wire.EXIT_FINISHED
    expected = oracle.outcome(whole)
    found = {}
    for name in sys.argv[3:] or ("fresh", "damaged", *LEAVING):
        make = stage.damaged if name == "damaged" else stage.begin
        found[name] = campaign(stage, name, make, max(1, every // 3) if name in LEAVING else every, expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
