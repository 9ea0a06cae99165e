"""Which run `resume` means, and that a hint leads to the home it speaks of."""

from __future__ import annotations

from typing import Any

import pytest

from client import choose, console
from trainerd.config.model import RunConfig
from trainerd.contract import runs, status
from trainerd.contract.paths import Home


def record(home: Home, name: str, created_at: float, **facts: Any) -> None:
    runs.write(home, runs.RunRecord(name, "cadence", created_at, RunConfig().model_dump(mode="json"), {}, **facts))


def test_resume_means_the_run_that_status_shows(home: Home) -> None:
    """Not the newest by name: the one a person was just looking at; without a status, the one last worked on."""
    record(home, "older", 1.0, outcome="stopped", ended_at=50.0, step=5)
    record(home, "newer", 2.0, outcome="stopped", ended_at=9.0, step=5)
    assert choose.unfinished(home, None).run == "older"
    status.write(home, status.Status(run="newer", state=status.STOPPED))
    assert choose.unfinished(home, None).run == "newer"


def test_a_run_that_failed_before_it_began_comes_last(home: Home) -> None:
    """resume does not go on with what would only fail again while there is another one."""
    record(home, "good", 1.0, outcome="stopped", ended_at=2.0, step=5)
    record(home, "broken", 3.0, outcome="failed", ended_at=4.0)
    status.write(home, status.Status(run="broken", state=status.FAILED))
    assert choose.unfinished(home, None).run == "good"


@pytest.mark.parametrize("typed", [["--home", "/somewhere else", "status"], ["status", "--home=/somewhere else"]])
def test_a_hint_keeps_the_home_that_was_typed(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person pastes speaks to the same home, spaces and all."""
    monkeypatch.setattr("sys.argv", ["run_optimized_training.py", *typed])
    assert "--home" in console.program() and "/somewhere else" in console.program().replace("'", "").replace('"', "")
