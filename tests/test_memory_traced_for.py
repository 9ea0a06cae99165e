"""What a trace is kept under: everything that may change what it says, from the data's content to the weights' types."""

from __future__ import annotations

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
from trainerd.engine import taskfile, traced_for
from trainerd.engine.precision import Precision


class Narrow(Toy):
    """A toy of one's own."""


def made(task: Toy, model: nn.Module, asked: RunConfig) -> str:
    return traced_for.key(task, model, task.train_samples, asked, Precision("fp32", CPU))


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
