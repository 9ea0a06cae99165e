"""Modules of a person's own that a task imports: edited, added or moved away while its run rests, and what is said of it."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import view
from tests.person import Person
from tests.toy import Script, config, run
from tests.trainers import TASK, newest_step
from trainerd.contract import status
from trainerd.contract.errors import MissingModule
from trainerd.contract.paths import Home, RunPaths
from trainerd.contract.status import Reading, Status
from trainerd.engine import missing, taskfile

_TASK = """
import own_plain
from own_space import deep
from tests.toy import Toy
try:
    import own_wanted
except ImportError:
    pass

class Own(Toy):
    def loss(self, model, batch, ctx):
        if ctx.step >= 13:
            import own_late
        return super().loss(model, batch, ctx)
"""
_FILES = ("own_plain.py", "own_space/deep.py", "own_late.py", "own_apart.py")


class Kept:
    """A folder of a person's modules, and a run of a task there; each life imports them anew."""

    def __init__(self, root: Path) -> None:
        self.folder, self.paths = root / "code", Home(root / "home").run("toy")
        (self.folder / "own_space").mkdir(parents=True)  # without an __init__.py
        for name in _FILES:
            self.write(name, "x = 1\n")
        self.write("own_task.py", _TASK)

    def write(self, name: str, content: str) -> None:
        (self.folder / name).write_text(content, "utf-8")

    def forget(self) -> None:
        for name in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def trains(self, steps: int, link: Script | None = None) -> tuple[list[str], dict[str, Any]]:
        """The files that are told to have changed, and the record of exactness."""
        self.forget()
        link, kind = link or Script(), importlib.import_module("own_task").Own
        run(self.paths.home.root, config({"max_steps": steps, "epochs": 20}), link=link, task=kind())
        changed = [str(file) for note in link.of("note") if note["kind"] == "code_changed" for file in note["files"]]
        warned = " ".join(str(told["text"]) for told in link.of("warning"))
        assert all(file in warned for file in changed) and bool(changed) is ("changed since" in warned)
        return [file.replace(f"{self.folder}/", "") for file in changed], link.of("exact")[-1]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    found = Kept(tmp_path)
    monkeypatch.syspath_prepend(str(found.folder))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits of one size within one second are others all the same
    yield found
    found.forget()


def test_a_module_that_is_another_since_a_step_was_saved_is_told_once(kept: Kept) -> None:
    """Edited, imported later, in a package without __init__, gone, looked for and now there: each is named, with the step from which the
    run is not exact; what is as it was, or imported by nobody, is not, nor is it said again of code that a checkpoint has."""
    assert kept.trains(4) == ([], {"event": "exact", "now": True, "since_step": None, "because": None})
    kept.write("own_apart.py", "x = 2\n")
    assert kept.trains(5)[0] == []
    kept.write("own_space/deep.py", "x = 2\n")
    changed, exact = kept.trains(6)
    assert changed == ["own_space/deep.py (edited)"] and (exact["now"], exact["since_step"]) == (False, 6)
    assert "since step 5 was saved" in exact["because"] and "own_space/deep.py" in exact["because"]
    assert kept.trains(7)[0] == []
    kept.write("own_plain.py", "x = 2\n")
    kept.write("own_late.py", "x = 2\n")  # not loaded yet
    kept.write("own_wanted.py", "x = 2\n")
    assert kept.trains(8)[0] == ["own_late.py (edited)", "own_plain.py (edited)", "own_wanted.py (new)"]
    (kept.folder / "own_wanted.py").unlink()
    (kept.folder / "own_late.py").unlink()
    assert kept.trains(9)[0] == ["own_late.py (gone)", "own_wanted.py (gone)"]


def test_a_module_that_is_edited_before_it_is_loaded_is_told_when_it_is(kept: Kept) -> None:
    """What a trainer has read at its beginning is not what a late import has read."""

    class Editing(Script):
        def send(self, event: str, **fields: Any) -> None:
            super().send(event, **fields)
            if event == "progress" and fields["step"] == 0:
                kept.write("own_late.py", "x = 2\n")

    changed, exact = kept.trains(16, Editing())
    assert changed == ["own_late.py (edited)"] and not exact["now"] and 13 <= exact["since_step"] <= 17
    assert kept.trains(17)[0] == []


def test_the_same_code_in_another_folder_is_the_same(kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and its code may be moved; a library user's own file counts as well, and so does what is put in the place of a module."""
    kept.trains(4)
    kept.folder = Path(shutil.move(kept.folder, tmp_path / "elsewhere"))
    monkeypatch.syspath_prepend(str(kept.folder))
    assert kept.trains(5)[0] == []
    kept.write("own_task.py", _TASK + "\n")
    assert kept.trains(6)[0] == ["own_task.py (edited)"]
    kept.folder = tmp_path / "before"  # another of the same name is found first
    kept.folder.mkdir()
    monkeypatch.syspath_prepend(str(kept.folder))
    kept.write("own_plain.py", "x = 2\n")
    assert kept.trains(7)[0] == ["own_plain.py (new)"]


def _in_words(paths: RunPaths, folder: Path, name: str) -> str:
    """As a trainer tells it whose task file cannot be loaded, or whose step has failed."""
    (folder / "own_door.py").write_text(f"import {name}\n", "utf-8")
    said = set()
    for load in (lambda: taskfile._import(folder / "own_door.py", paths.folder), lambda: importlib.import_module("own_door")):
        sys.modules.pop("own_door", None)
        importlib.invalidate_caches()
        with pytest.raises(Exception) as raised:
            load()
        told = missing.in_words(raised.value, paths)
        assert type(told).__name__ in ("MissingModule", "BadTaskFile")
        said.add(str(told))
    return said.pop() if len(said) == 1 else " | ".join(sorted(said))


def test_a_module_that_was_moved_away_is_named_by_its_file(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of a package, and one that is there and is not found any more; what the run never had, by its name alone."""
    kept.trains(4)
    for name in ("own_plain", "own_space.deep"):
        path = kept.folder / f"{name.replace('.', '/')}.py"
        content = path.read_text("utf-8")
        path.unlink()
        kept.forget()
        assert _in_words(kept.paths, kept.folder, name) == f"{path} is gone, and the task imports it. Put it back, then `resume`."
        path.write_text(content, "utf-8")
    never = _in_words(kept.paths, kept.folder, "own_never")
    assert "imports 'own_never', which is not there." in never and "The module 'own_never' is not there" in never
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(kept.folder)])
    kept.forget()
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module("own_plain")
    hint = f"Put {kept.folder} on PYTHONPATH, as it was, then `resume`."
    assert str(missing.in_words(raised.value, kept.paths)).endswith(hint)
    other = KeyError("own_plain")
    assert missing.in_words(other, kept.paths) is other


def test_the_status_says_what_to_do_first(tmp_path: Path) -> None:
    """`resume` alone would fail again."""
    shown = Status(run="r", home=str(tmp_path), state=status.FAILED)
    shown.trainer.last_exit = f"{MissingModule.__name__}: /x/own.py is gone, and the task imports it. Put it back, then `resume`."
    reading = Reading(status.FAILED, "/x/own.py is gone.", shown, False)
    assert view.what_next(reading, "p")[0] == "When it is there again, go on with: p resume" and view.result_code(reading) == 2


@pytest.mark.slow
def test_a_person_edits_moves_and_puts_back_a_module(tmp_path: Path) -> None:
    """The real daemon: the warning is in status, monitor and log, once; a module that was moved away is named before `resume`, and when it
    is back the run goes on to its end. One that only importlib knows is seen as well."""
    code = tmp_path / "code"
    code.mkdir()
    for name in ("own_parts", "own_unnamed", "own_step"):
        (code / f"{name}.py").write_text("x = 1\n", "utf-8")
    late = "        import own_step\n        x, y = batch\n"
    source = TASK.replace("import torch\n", "import torch, own_parts, importlib\nimportlib.import_module('own_unnamed')\n", 1)
    task = tmp_path / "my_task.py"
    task.write_text(source.replace("        x, y = batch\n", late), "utf-8")
    person = Person(tmp_path / "home")
    person.environment |= {"PYTHONPATH": str(code), "TINY_PAUSE": "0.05"}
    settings = ("train.epochs=30", "train.batch_size=8", "train.threads=1", "checkpoint.every_steps=5", "checkpoint.exact=true")
    person.starts("--task", f"{task}:Tiny", *(word for setting in settings for word in ("--set", setting)))

    def rests() -> None:
        """After some steps more."""
        person.waits_for_step((newest_step(person.home.run(person.run())) or 0) + 8)
        assert person.types("stop").returncode == 0
        person.waits_until_gone()

    rests()
    for name in ("own_parts", "own_unnamed"):
        (code / f"{name}.py").write_text("x = 2\n", "utf-8")
    assert person.types("resume").returncode == 0
    rests()
    said = [event for event in person.events() if event["kind"] == "code_changed"]
    assert [set(event["files"]) for event in said] == [{f"{code / name}.py (edited)" for name in ("own_parts", "own_unnamed")}]
    reading = person.sees()
    assert reading.status and reading.status.exact.now is False and reading.status.exact.since_step == said[0]["step"] + 1
    for shown in (person.types("status").stdout, person.types("monitor", "--once").stdout, person.log(10**6)):
        assert "own_parts.py" in " ".join(shown.split()), shown

    for name in ("own_parts", "own_step"):  # while the task file is loaded, and in the midst of a step
        moved = shutil.move(code / f"{name}.py", tmp_path / "away.py")
        person.types("resume")
        reading = person.waits_for_state(status.FAILED)
        person.waits_until_gone()
        words = f"{code / name}.py is gone, and the task imports it. Put it back, then `resume`"
        assert words in reading.reason and view.what_next(reading, "p")[0].endswith("p resume"), reading.reason
        shutil.move(moved, code / f"{name}.py")
    assert person.types("resume").returncode == 0
    rests()
    said = [event["files"] for event in person.events() if event["kind"] == "code_changed"]
    assert said[1:] == [[f"{code / 'own_step'}.py (gone)"]], said  # by the life that could not go on without it
