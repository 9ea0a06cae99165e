"""What a person may type or find by mistake: homes, sizes, paths and files that cannot be. Each is told in words, with what to do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from client.main import main
from tests.person import DOOR, Person
from trainerd.contract import files, status
from trainerd.contract.paths import Home
from trainerd.contract.status import Status

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="paths of POSIX")


@pytest.fixture
def person(home: Home, tmp_path: Path) -> Person:
    return Person(home.root, tmp_path / "state")


def test_a_home_that_is_no_place_is_refused_in_words(person: Person, tmp_path: Path) -> None:
    """Nothing at all, as of a variable that is not set; below a file; a name no disk takes: 2 and what to do. An unknown person's folder is
    one of that name, as in a shell."""
    (tmp_path / "file").write_text("", "utf-8")
    file = str(tmp_path / "file")
    for place, words in (("", "is empty"), (file, "is not a folder"), (f"{file}/x", "cannot be used"), ("a" * 300, "cannot be used")):
        for command in (["status"], ["plan"], ["start", "--dataset-size", "100"]):
            done = asked_of(place, *command, folder=tmp_path)
            assert done.returncode == 2 and words in done.stderr and "--home" in done.stderr and "itself" not in done.stderr, (place, done)
    done = asked_of("~nobody-of-this-name/h", "status", folder=tmp_path)
    assert done.returncode == 3 and not done.stderr, done


def asked_of(place: str, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command about this home, typed in `folder`."""
    command = [sys.executable, str(DOOR), "--home", place, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60, check=False)


def test_a_home_of_somebody_else_is_said_to_be_one(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that may not be looked into: 4 and the file, from every command that reads; never an error in trainerd, nor "no runs"."""

    def closed(path: object, *_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr("client.tail.newest_log", lambda home: closed(home.logs))
    for words in (["runs"], ["logs"], ["monitor", "--once"]):
        said = io.StringIO()
        with redirect_stderr(said):
            assert main(["--home", str(home.root), *words]) == 4, words
        assert "Permission denied" in said.getvalue() and "itself" not in said.getvalue() and str(home.root) in said.getvalue()


def test_odd_words_are_refused_in_words(person: Person, tmp_path: Path) -> None:
    """Sizes beyond any machine, paths that no file can have, none at all, a device, a person nobody knows: 2, the key and the value."""
    (tmp_path / "zero.json").write_text('{"data": {"path": "a\\u0000b"}}', "utf-8")
    (tmp_path / "half.json").write_text('{"data": {"path": "\\ud800"}}', "utf-8")
    for words, says in (
        (["--budget", f"{'9' * 400}GB"], "more than any machine has"),
        (["--set", f"memory.ram_limit={'9' * 400}GB"], "memory.ram_limit"),
        (["--data", ""], "data.path = '': is empty"),
        (["--data", "/dev/zero"], "/dev/zero is a pipe or a device"),
        (["--config", str(tmp_path / "zero.json")], "no file's name can have"),
        (["--config", str(tmp_path / "half.json")], "no file's name can have"),
        (["--config", "~nobody-of-this-name/c.yml"], "cannot be read"),
        (["--task", "~nobody-of-this-name/t.py:Mine"], "does not exist"),
    ):
        done = person.types("plan", *words)
        said = " ".join(done.stderr.split()).replace("data.path = '' (from the command line)", "data.path = ''")
        assert done.returncode == 2 and says in said and "itself" not in said, (words, said)


def test_a_folder_in_the_place_of_the_status_is_named(person: Person, home: Home) -> None:
    """Before a supervisor is started that could write none: 5, and what to do."""
    home.status.mkdir()
    done = person.types("start", "--dataset-size", "100")
    assert done.returncode == 5 and f"{home.status} is a folder" in done.stderr and "Move it away." in done.stderr, done
    assert not home.runs.exists()


def test_a_status_of_no_run_that_there_can_be_is_damaged(person: Person, home: Home) -> None:
    """A name that leads out of the home, or that no file can have: unreadable, in `status` and in the monitor."""
    for run in ("../../elsewhere", "a\0b", "a\\b"):
        files.write_json(home.status, Status(run=run, state=status.COMPLETED).to_dict())
        for words in (["status"], ["monitor", "--once"]):
            done = person.types(*words)
            assert done.returncode == 4 and "is damaged" in done.stdout + done.stderr and "itself" not in done.stderr, (run, done)
