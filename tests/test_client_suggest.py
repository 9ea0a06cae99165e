"""`suggest` before torch is there: which model is asked, and what to do where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.commands import suggest
from tests.person import Person
from tests.supervised import Daemon
from trainerd.contract import files, runs
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord


def finished(home: Home, run: str, task: str, at: float) -> Path:
    """A finished model of some task."""
    folder = home.run(run).model
    folder.mkdir(parents=True)
    files.write_json(home.run(run).result, {"schema": 1, "run": run, "task": task, "finished_at": at})
    os.utime(home.run(run).result, (at, at))
    return folder


def test_only_cadences_models_are_asked_the_newest_first(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among models of several tasks, one without a record and a damaged one; a name is looked for here, then in the home."""
    finished(home, "older", "cadence", 100.0)
    newest = finished(home, "newer", "cadence", 200.0)
    finished(home, "vision", "my_task.py:Vision", 300.0)
    finished(home, "torn", "cadence", 400.0)
    home.run("torn").result.write_bytes(b"{")
    home.run("under-way").model.mkdir()
    assert suggest._with_model(home, ["app"]) == ["--model", str(newest), "app"]
    monkeypatch.chdir(tmp_path)
    for name in ("older", "models/older"):
        assert suggest._with_model(home, ["--model", name, "app"])[1] == str(home.root / "models" / "older")
        assert suggest._with_model(home, [f"--model={name}", "app"])[1] == str(home.root / "models" / "older")
    (tmp_path / "older").mkdir()
    assert suggest._with_model(home, ["--model", "older"]) == ["--model", "older"]


def test_without_a_model_it_says_what_brings_one(home: Home, tmp_path: Path) -> None:
    """Nothing trained: start; under way: how far it is; stopped: resume. Exit 2, without waiting for torch."""
    person = Person(home.root, tmp_path / "state")
    nothing = person.types("suggest", "app")
    assert nothing.returncode == 2 and "no finished CADENCE model" in nothing.stderr and "start --preset quick" in nothing.stderr
    assert nothing.stderr.startswith("Error: ")
    with Daemon(home, {"steps": 5000, "pause": 0.02}) as daemon:
        daemon.until_step(1)
        assert "See how far it is:" in person.types("suggest", "app").stderr
    assert " resume" in person.types("suggest", "app").stderr
    runs.write(home, RunRecord("fake-1", "fake", 1.0, {}, {}, outcome="completed"))
    assert "start --preset quick" in person.types("suggest", "app").stderr
