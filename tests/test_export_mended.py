"""A person's export() that raises: the training is over and saved, so nothing is tried again, and mending the file writes the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.person import Person
from tests.trainers import PREPARING, TASK, newest_step
from trainerd.contract import runs, status

_BROKEN = """
    def export(self, model, folder):
        (folder / "classes.txt").write_text(self.names["classes"])
"""
_MENDED = """
    def export(self, model, folder):
        (folder / "classes.txt").write_text("one")
"""
_SETTINGS = ("train.epochs=3", "train.batch_size=8", "train.threads=1", "train.precision=fp32", "checkpoint.every_steps=5")


@pytest.fixture
def person(tmp_path: Path) -> Person:
    return Person(tmp_path / "home")


def _started(person: Person, source: Path, *more: str, task: str = "Tiny") -> tuple[int, str]:
    """(exit code, everything said) of a start that is waited for."""
    settings = [word for setting in _SETTINGS for word in ("--set", setting)]
    done = person.types("start", "--task", f"{source}:{task}", "--wait", *settings, *more, timeout=240)
    return done.returncode, done.stdout + done.stderr


def _kinds(person: Person) -> list[str]:
    return [event["kind"] for event in person.events() if event["kind"] in ("trainer started", "death", "fallback", "completed", "failed")]


def test_an_export_that_raises_is_mended_without_training_again(tmp_path: Path, person: Person) -> None:
    """One death and no second try: the reason names error, line and what to do. The edited file then writes the result of that very
    run: no step is trained, nothing prepared again, and the code that trained it is kept."""
    source = tmp_path / "my_task.py"
    source.write_text(PREPARING + _BROKEN, encoding="utf-8")
    code, said = _started(person, source, task="Prepares")
    run = person.run()
    reading, paths = person.sees(), person.home.run(run)
    assert code == 4 and reading.state == status.FAILED
    line = next(n for n, text in enumerate((PREPARING + _BROKEN).splitlines(), 1) if "self.names" in text)
    for words in (
        f"export() failed: line {line}: AttributeError",
        "All that was trained is saved (step 36)",
        "Mend export() in the task file",
    ):
        assert words in reading.reason and words in said, said
    assert _kinds(person) == ["trainer started", "death", "failed"] and "The trainer died" not in reading.reason
    assert "Traceback" in person.log() and "self.names" in person.log()
    assert newest_step(paths) == 36 and not paths.result.exists()
    before = paths.metrics.read_bytes()

    code, said = _started(person, source, task="Prepares")  # as it is: the same end at once, nothing lost
    assert code == 4 and _kinds(person).count("death") == 2 and person.run() == run

    source.write_text(PREPARING + _MENDED, encoding="utf-8")
    code, said = _started(person, source, task="Prepares")
    assert code == 0 and f"{run} is trained: the edited task file only writes its result" in said, said
    assert person.run() == run and len(runs.names(person.home)) == 1 and person.sees().state == status.COMPLETED
    assert (paths.model / "classes.txt").read_text() == "one" and paths.metrics.read_bytes() == before
    assert "preparing" not in person.log(10**6) and "a stray print" not in person.log(10**6)
    assert (paths.trained_task / "my_task.py").read_text("utf-8") == PREPARING + _BROKEN
    assert (paths.model / "my_task.py").read_text("utf-8") == PREPARING + _MENDED


def test_edited_code_trains_no_step_of_a_run(tmp_path: Path, person: Person) -> None:
    """More epochs for a run that other code has trained are refused, and so are steps that a lost checkpoint leaves to do; with the
    file as it was, it trains them."""
    source = tmp_path / "my_task.py"
    source.write_text(TASK + _BROKEN, encoding="utf-8")
    assert _started(person, source)[0] == 4
    source.write_text(TASK + _MENDED, encoding="utf-8")
    code, said = _started(person, source, "--set", "train.epochs=4")
    assert code == 5 and "would train it on" in said, said

    paths = person.home.run(person.run())
    newest = max(paths.checkpoints.glob("*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
    newest.write_bytes(newest.read_bytes()[:-1])
    code, said = _started(person, source)
    assert code == 2 and "they would be trained by other code" in said and str(paths.trained_task) in said, said

    source.write_text(TASK + _BROKEN, encoding="utf-8")
    assert _started(person, source)[0] == 4 and newest_step(paths) == 36
    assert "export() failed" in person.sees().reason and not paths.trained_task.exists()
    source.write_text(TASK + _MENDED, encoding="utf-8")
    assert _started(person, source)[0] == 0 and len(runs.names(person.home)) == 1
