"""A disk or a quota that is full at any single write of a supervisor: no run is lost by it, and none is begun by halves."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.disks import FailingDisk, RecordingDisk
from tests.supervised import RUN, journal, supervise_here
from trainerd.contract import files, runs, status
from trainerd.contract.paths import Home
from trainerd.supervisor.opening import to_yaml

FAST = {"steps": 10, "every": 5, "pause": 0.001}
WRITES = ("create", "open", "write", "sync", "make_folder")
_SOME = [pytest.param(9, id="some"), pytest.param(1, id="every", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


def lines_of(home: Home) -> list[dict[str, Any]]:
    """The events, but for the one that was cut off by the full disk and written once more."""
    found = []
    for line in home.run(RUN).events.read_text("utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="has no quota of this name")
@pytest.mark.parametrize("every", _SOME)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_full_once_at_any_write_of_a_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, every: int) -> None:
    """Its folders, run.json, the configuration, the task, status, events, the ballast: refused before anything is acknowledged, and the
    next start works; or the run completes, and every file says so."""
    task = tmp_path / "my_task.py"
    task.write_text("answer = 42\n", encoding="utf-8")
    recording = RecordingDisk()
    monkeypatch.setattr(files, "disk", recording)
    supervise_here(Home(tmp_path / "whole"), FAST, task_file=str(task))
    kinds = [line["kind"] for line in journal(Home(tmp_path / "whole"))]
    places = [number for number, (kind, _) in enumerate(recording.seen, 1) if kind in WRITES]
    assert {"run.json", "config.yml", "training_status.json", "events.jsonl", "my_task.py"} <= {
        name.strip(".").rpartition(".")[0].rpartition(".")[0] if name.endswith(".tmp") else name for _, name in recording.seen
    }
    refused = 0
    for place in places[every // 2 if code == errno.EDQUOT else 0 :: every]:
        home = Home(tmp_path / f"full-{place}")
        monkeypatch.setattr(files, "disk", FailingDisk(lambda number, kind, name, place=place: number == place, code))
        try:
            supervise_here(home, FAST, task_file=str(task))
        except OSError as error:
            assert error.errno == code and not home.status.exists(), recording.seen[place - 1]
            refused += 1
            supervise_here(home, FAST, task_file=str(task), resume=home.run(RUN).record.exists())
        found, record = status.read(home).status, runs.read(home, RUN)
        assert found is not None and (found.state, found.progress.step, record.outcome) == (status.COMPLETED, 10, "completed")
        assert home.run(RUN).config.read_text("utf-8") == to_yaml(record.config)
        assert (home.run(RUN).task / "my_task.py").read_text("utf-8") == "answer = 42\n"
        told = [line["kind"] for line in lines_of(home)]
        assert told[-len(kinds) :] == kinds or (told[0], told[-1]) == ("resumed", "completed"), (recording.seen[place - 1], told)
        assert not [path for path in home.root.rglob("*") if files.is_temporary(path)], recording.seen[place - 1]
    assert refused < len(places)
