"""A disk or a quota that is full at any single write of a supervisor: no run is lost by it, and none is begun by halves."""

from __future__ import annotations

import errno
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns.every_operation import named
from tests.disks import FailingDisk, RecordingDisk
from tests.supervised import RUN, supervise_here
from trainerd.contract import files, runs, status
from trainerd.contract.paths import Home
from trainerd.supervisor.opening import to_yaml

Place = tuple[str, str, int]
FAST = {"steps": 10, "every": 5, "pause": 0.001}
WRITES = ("write", "open", "create", "sync", "make_folder")
NAMES = {".run.json.tmp", ".config.yml.tmp", ".training_status.json.tmp", ".my_task.py.tmp", "..ballast.tmp", "events.jsonl", "control"}
_ALL = [pytest.param(False, id="one a file"), pytest.param(True, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]


def places(seen: list[tuple[str, str]], whole: bool, code: int) -> list[Place]:
    """Every write, or one for each file: of the full disk the first, of the quota the last of another kind."""
    counts: Counter[tuple[str, str]] = Counter()
    found: list[Place] = []
    for kind, name in seen:
        key = (kind, named(Path(name)))
        counts[key] += 1
        if kind in WRITES:
            found.append((*key, counts[key]))
    if whole:
        return found
    first = {name: (kind, name, number) for kind, name, number in reversed(found) if kind != "write"}
    last = {name: (kind, name, number) for kind, name, number in found if kind == "write"}
    return sorted((first if code == errno.ENOSPC else last).values())


def at(place: Place) -> Callable[[int, str, str], bool]:
    left = [place[2]]

    def fails(number: int, kind: str, name: str) -> bool:
        left[0] -= (kind, named(Path(name))) == place[:2]
        hit = left[0] == 0
        left[0] -= hit
        return hit

    return fails


def kinds_of(home: Home) -> list[str]:
    """The events, but for the one that was cut off by the full disk and written once more, and what comes when it comes."""
    found: list[dict[str, Any]] = []
    for line in home.run(RUN).events.read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [str(line["kind"]) for line in found if line["kind"] != "cannot be kept awake"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals; tests/windows has its own")
@pytest.mark.parametrize("whole", _ALL)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_full_once_at_any_write_of_a_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, whole: bool) -> None:
    """Its folders, run.json, the configuration, the task, status, events, the ballast: refused before anything is acknowledged, and the
    next start works; or the run completes, every file says so, and no event is lost."""
    task = tmp_path / "my_task.py"
    task.write_text("answer = 42\n", encoding="utf-8")
    recording = RecordingDisk()
    monkeypatch.setattr(files, "disk", recording)
    supervise_here(Home(tmp_path / "undisturbed"), FAST, task_file=str(task))
    kinds = kinds_of(Home(tmp_path / "undisturbed"))
    assert {named(Path(name)) for _, name in recording.seen} >= NAMES
    for number, place in enumerate(places(recording.seen, whole, code)):
        home = Home(tmp_path / f"full-{number}")
        monkeypatch.setattr(files, "disk", FailingDisk(at(place), code))
        refused = False
        try:
            supervise_here(home, FAST, task_file=str(task))
        except OSError as error:
            refused = True
            assert error.errno == code and not home.status.exists(), place
            supervise_here(home, FAST, task_file=str(task), resume=home.run(RUN).record.exists())
        found, record = status.read(home).status, runs.read(home, RUN)
        assert found is not None and (found.state, found.progress.step, record.outcome) == (status.COMPLETED, 10, "completed"), place
        assert home.run(RUN).config.read_text("utf-8") == to_yaml(record.config)
        assert (home.run(RUN).task / "my_task.py").read_text("utf-8") == "answer = 42\n"
        told = kinds_of(home)
        assert told[1:] == kinds[1:] and told[0] in ("started", "resumed"), (place, told)
        assert refused or told[0] == "started", place
        assert not [path for path in home.root.rglob("*") if files.is_temporary(path)], place
