"""A person's own task file that is wrong: what is told leads to a run with the mended file, never round in a circle."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import ask, registration, view
from tests.logins import Account
from tests.person import Person
from tests.trainers import TASK
from trainerd.config.load import resolve
from trainerd.config.model import RunConfig
from trainerd.contract import interpreter, runs, status
from trainerd.contract.errors import BadTaskFile
from trainerd.contract.paths import Home
from trainerd.contract.status import Checkpoint, Reading, Status
from trainerd.engine import taskfile
from trainerd.supervisor.opening import to_yaml

RUN = "my_task-20261122-012921"
NO_MODULE = "BadTaskFile: The task file my_task.py imports 'layers', which is not there."
_SETTINGS = ("train.epochs=2", "train.batch_size=32", "train.threads=1", "train.precision=fp32")
on_a_desktop = pytest.mark.skipif(sys.platform == "win32", reason="looks at XDG's folders")


def told(home: Path, task: str, last_exit: str, run: str = RUN, saved: bool = False) -> list[str]:
    """What the status of a failed run says to type, without the look into the log."""
    shown = Status(run=run, task=task, home=str(home), config=f"runs/{run}/config.yml", state=status.FAILED)
    shown.trainer.last_exit = last_exit
    shown.checkpoint = Checkpoint("x.pt", 1, 7, 1.0, 1) if saved else None
    return view.what_next(Reading(status.FAILED, "It failed.", shown, False), "p")[1:]


def typed(line: str) -> list[str]:
    """The words of the command at the end of a line."""
    return shlex.split(line.partition(" with: ")[2])[1:]


def test_a_file_that_cannot_be_loaded_is_mended_and_started_again(tmp_path: Path) -> None:
    """`resume` would take the run's copy: the command that is told takes the person's file, and a new name where his own is taken."""
    file = tmp_path / "my task.py"
    file.write_text(TASK, "utf-8")
    (tmp_path / "runs" / RUN).mkdir(parents=True)
    config = RunConfig(task=f"{file}:Tiny", train={"batch_size": 16})
    (tmp_path / "runs" / RUN / "config.yml").write_text(to_yaml(config.model_dump(mode="json")), "utf-8")
    (mend,) = told(tmp_path, config.task, "BadTaskFile: The task file my task.py cannot be loaded: line 3: NameError: x.")
    verb, option, path, *more = typed(mend)
    assert mend.startswith("Mend my task.py, then begin a new run with: p start") and (verb, option, more) == ("start", "--config", [])
    asked = resolve(None, None, path, [], {})
    assert asked.task_file == file and asked.config.train.batch_size == 16
    assert typed(told(tmp_path, config.task, NO_MODULE, "mine")[0])[-2:] == ["--name", "mine-mended"]


def test_resume_is_told_where_it_may_help(tmp_path: Path) -> None:
    """A module may be installed; a step may fail on the data of the moment; an export may be tried again, or mended without a new run."""
    own = f"{tmp_path}/my_task.py:Tiny"
    assert told(tmp_path, own, NO_MODULE)[1:] == ["Or, when Python finds 'layers', go on with: p resume"]
    mend, again = told(tmp_path, own, "TypeError: a wrong shape")
    assert "p start --config" in mend and again == "Try again with the run's own copy of the task: p resume"
    again, mend = told(tmp_path, own, "KeyError: 'x'", saved=True)
    assert again.startswith("Try again from the last checkpoint with") and again.endswith("p resume") and "if it is wrong" in mend
    mend, again = told(tmp_path, own, "The task's own export() failed: line 3: KeyError: 'x'.", "mine", saved=True)
    assert mend.startswith("Mend my_task.py, then write the result with") and "--name" not in mend and again.endswith("p resume")
    assert told(tmp_path, own, "ConfigError: settings.x is unknown.") == [f"Begin a new run with that put right: p start --task {own} ..."]
    assert told(tmp_path, "C:\\tasks\\my_task.py:Tiny", "KeyError: 'x'")[0].startswith("Mend my_task.py if")
    for task in ("cadence", "/x/\x1b]0;.py:Tiny"):
        assert told(tmp_path, task, "KeyError: 'x'") == ["Try again with: p resume"]


def test_a_module_beside_the_file_is_named_with_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or a package there is not looked for, and that is said with the folder to put on PYTHONPATH; one that is nowhere is not."""
    copy, original = tmp_path / "run" / "own_mended.py", tmp_path / "code"
    for folder in (copy.parent, original / "own_layers"):
        folder.mkdir(parents=True)
    (original / "own_blocks.py").touch()
    for name, there in (("own_blocks", "own_blocks.py"), ("own_layers.deep", "own_layers"), ("own_nowhere", "")):
        copy.write_text(f"import {name}\n", "utf-8")
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        sys.modules.pop("own_mended", None)
        with pytest.raises(BadTaskFile) as raised:
            taskfile._import(copy, original)
        said = str(raised.value)
        assert said.startswith("The task file own_mended.py imports 'own_") and "put it into the file and start again" in said
        assert (f"in {original}, where {there} is." in said and f"PYTHONPATH={original}" in said) is bool(there), said


@on_a_desktop
def test_a_folder_on_pythonpath_is_found_by_every_process(account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was typed as seen from the current folder: our processes run elsewhere, and a log-in knows no such variable."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["code", str(tmp_path / "more")]))
    monkeypatch.chdir(tmp_path)
    wanted = [str(tmp_path / "code"), str(tmp_path / "more")]
    assert interpreter.environment()["PYTHONPATH"].split(os.pathsep)[-2:] == wanted
    home = Home(tmp_path / "home")
    home.root.mkdir()
    registration.begun(home, RUN)
    assert registration.read(home).environment["PYTHONPATH"].split(os.pathsep) == wanted


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Account:
    """An account without a systemd user manager."""
    found = Account(tmp_path / "account")
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A task that imports a module beside it."""
    found = tmp_path / "code" / "my_task.py"
    found.parent.mkdir()
    found.write_text(f"import own_rows\n{TASK}", "utf-8")
    found.with_name("own_rows.py").write_text("x = 1\n", "utf-8")
    return found


@pytest.fixture
def person(account: Account, file: Path, tmp_path: Path) -> Iterator[Person]:
    """Who has started it with --no-autostart, which ended with 2."""
    found = Person(tmp_path / "home")
    settings = [word for setting in _SETTINGS for word in ("--set", setting)]
    failed = found.starts("--task", f"{file}:Tiny", "--no-autostart", *settings, expect=2)
    assert f"in {file.parent}, where own_rows.py is" in failed.stderr
    found.waits_until_gone()
    yield found
    found.leaves()


@on_a_desktop
def test_what_was_declined_of_a_run_that_failed_at_once_stays_declined(account: Account, person: Person) -> None:
    """Its `resume`, which fails again, registers nothing for the log-in; who asks it to save is told how it stands, and what works."""
    resumed = person.types("resume")
    assert resumed.returncode == 0 and "log in" not in resumed.stdout and not account.desktop_entries, resumed.stdout
    reading = person.waits_for_state(status.FAILED)
    person.waits_until_gone()
    said = str(ask.nothing_running(person.home, reading))
    assert f"Nothing is running in {person.home.root}. The run {person.run()} has failed. Look into the log" in said
    assert "Mend my_task.py, then begin a new run with: " in said and "Or, when Python finds 'own_rows'" in said, said


@on_a_desktop
@pytest.mark.slow
def test_the_command_that_is_told_trains_the_mended_file(file: Path, person: Person) -> None:
    """As the status shows it, typed once the file is mended: a run of its own, to its end. `resume` works once the module is found."""
    mend = next(line for line in person.types("status").stdout.splitlines() if "Mend my_task.py" in line)
    person.environment["PYTHONPATH"] = os.path.relpath(file.parent)
    assert person.types("resume").returncode == 0
    person.waits_for_state(status.COMPLETED)
    person.waits_until_gone()
    file.write_text(TASK, "utf-8")
    words = typed(mend)
    done = person.types(*words[words.index("start") :], "--wait")
    assert done.returncode == 0 and "This window waits" in done.stdout and len(runs.names(person.home)) == 2, done
