"""What a trace is kept under: everything that may change what it says, from the data's content to the weights' types."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from tests.test_memory_fitting import CPU, bound
from tests.toy import Toy, config
from trainerd.config.identity import differences, model_of
from trainerd.config.model import RunConfig
from trainerd.engine import sources, taskfile, traced_for
from trainerd.engine.precision import Precision
from trainerd.memory import receipts


class Narrow(Toy):
    """A toy of one's own."""


def made(task: Toy, model: nn.Module, asked: RunConfig) -> str:
    return traced_for.key(task, model, task.train_samples, asked, Precision("fp32", CPU), traced_for.code_of(task))


def test_another_source_data_type_or_buffer_is_another_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone; and the same again is the same trace."""
    task = Narrow()
    model, _ = bound(task, tmp_path)
    data = tmp_path / "data.txt"
    data.write_text("one\n", encoding="utf-8")
    asked = config(data={"path": str(data)})
    first = made(task, model, asked)
    assert made(task, model, asked) == first
    found = {first}
    data.write_text("two, and longer\n", encoding="utf-8")
    found.add(made(task, model, asked))
    data.write_text("one\n", encoding="utf-8")
    assert made(task, model, asked) == first
    model.register_buffer("more", torch.zeros(100))
    found.add(made(task, model, asked))
    del model.more
    found.add(made(task, model.to(torch.bfloat16), asked))
    model.to(torch.float32)
    monkeypatch.setattr(taskfile, "source_hash", lambda kind, trained=None: "edited")
    found.add(made(task, model, asked))
    assert len(found) == 5


class Asked(BaseModel):
    depth: int = 6
    sizes: dict[str, int] = {"wide": 4, "high": 2}


@pytest.mark.parametrize(
    ("trained", "planned", "unlike"),
    [
        ({}, {"depth": 6}, ""),
        ({"depth": 6}, {}, ""),
        ({"depth": 6}, {"sizes": {"high": 2}}, ""),
        ({}, {"depth": 7}, "settings.depth 6 -> 7"),
        ({"depth": 8}, {}, "settings.depth 8 -> 6"),
        ({}, {"sizes": {"wide": 5}}, "settings.sizes.wide 4 -> 5"),
    ],
)
def test_a_setting_at_its_default_is_no_other(trained: dict[str, Any], planned: dict[str, Any], unlike: str) -> None:
    """Said or unsaid, in the run or in the question; another value is named with both."""
    ran = {"task": "a.py:A", "settings": trained, "seed": 1, "data": {"columns": {}}}
    asked = {"task": "a.py:A", "settings": planned, "seed": 2, "data": {"columns": {}, "size_bytes": 3}}
    then, now = (model_of(one, Asked().model_dump()) for one in (ran, asked))
    assert (then == now) is not bool(unlike) and "; ".join(differences(then, now)) == unlike


def test_the_defaults_are_known_but_for_what_must_be_said() -> None:
    """They are the task's own, whatever the run was given."""

    class Needed(Asked):
        width: int

    class Needing(Toy):
        Settings = Needed

    assert traced_for.defaults(Needing({"width": 3, "depth": 9})) == Asked().model_dump()


def test_the_files_a_tasks_code_comes_from_are_a_persons_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the task's: what it imports, however deep, relative or inside a function, and what those import; nothing of Python, of
    installed packages or of ours, and nothing of it is run. What is not there is missed when it comes; which file has what, counts."""
    names = {"own_a.py": "import json, torch, own_b\nfrom own_pack import deep\n", "own_b.py": "def f():\n    import own_late, own_none\n"}
    names |= {"own_late.py": "raise SystemExit('run')\n", "own_other.py": "", "own_pack/__init__.py": "", "own_pack/low.py": ""}
    names |= {"own_pack/deep.py": "from . import low\n"}
    names |= {"own_task.py": "import own_a\nfrom trainerd.engine.task import Task\nclass Own(Task): pass\n"}
    for name, content in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    kind = importlib.import_module("own_task").Own
    found = {Path(path).relative_to(tmp_path).as_posix() for path in sources.imported(kind) if Path(path).is_relative_to(tmp_path)}
    assert found == (set(names) - {"own_task.py", "own_other.py"}) | {"own_none.py", "own_none/__init__.py"}
    assert "own_late" not in sys.modules
    assert not [path for path in sources.imported(kind) if "site-packages" in path or f"trainerd{os.sep}engine" in path]
    first = traced_for.code_of(kind()).digest
    (tmp_path / "own_late.py").write_text("x = 1\n", "utf-8")
    second = traced_for.code_of(kind())
    assert second.digest != first and not receipts.edited({"sources": dict(second.files)})
    (tmp_path / "own_late.py").write_text("", "utf-8")
    (tmp_path / "own_pack" / "low.py").write_text("x = 1\n", "utf-8")
    assert traced_for.code_of(kind()).digest not in (first, second.digest)
    (tmp_path / "own_late.py").write_text("x = 1\n", "utf-8")
    (tmp_path / "own_pack" / "low.py").write_text("", "utf-8")
    (tmp_path / "own_none.py").write_text("", "utf-8")
    assert receipts.edited({"sources": dict(second.files)}) == str(tmp_path / "own_none.py")
    importlib.invalidate_caches()
    assert traced_for.code_of(kind()).digest != second.digest
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            monkeypatch.delitem(sys.modules, name)
