"""What makes a run this run, how two differ in words, and what may change while one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainerd.config.identity import differences, fingerprint, identity, resumed
from trainerd.config.load import load, resolve
from trainerd.config.model import DataConfig
from trainerd.contract.errors import UsageError

DATA = {"kind": "file", "size_bytes": 10, "sha256": "aa"}


def of(**words: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(identity(load(**words), DATA)))
    return found


@pytest.mark.parametrize(("sets", "same"), [
    ([], True),
    (["train.epochs=9", "train.max_steps=5", "log.tensorboard=true", "polite.priority=normal"], True),
    (["memory.ram_limit=4GB", "checkpoint.keep=9"], True),
    (["train.lr=1e-5", "train.scheduler=linear", "train.threads=1", "train.weight_decay=0.5", "name=other"], True),
    (["settings.vocabulary=10000"], True),  # the default, said aloud
    (["seed=1"], False),
    (["train.batch_size=8"], False),
    (["train.optimizer=sgd"], False),
    (["data.size=5"], False),
    (["data.eval_fraction=0.5"], False),
    (["data.columns.text=q"], False),
    (["settings.vocabulary=500"], False),
])  # fmt: skip
def test_what_belongs_to_the_identity(sets: list[str], same: bool) -> None:
    """Task, its settings, the data and their size, seed, batch size, optimizer; nothing else."""
    assert (of(sets=sets) == of()) is same
    assert (differences(of(), of(sets=sets)) == []) is same


def test_differences_are_told_in_words() -> None:
    """Each key with both values; a hash as what it means."""
    other = {**of(sets=["seed=1", "train.batch_size=8"])}
    other["data"] = {**other["data"], "sha256": "bb"}
    assert differences(of(), other) == ["the data has other content", "seed 0 -> 1", "batch_size 32 -> 8"]


def test_an_edited_task_file_is_another_task_wherever_it_lies(tmp_path: Path) -> None:
    """A person's task counts by name and content, not by folder."""
    found = []
    for folder, text in (("a", "class T: pass"), ("b", "class T: pass"), ("c", "class T: x = 1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.py").write_text(text, encoding="utf-8")
        asked = resolve(task=f"{tmp_path / folder / 't.py'}:T")
        found.append(identity(asked.config, {}, asked.task_file))
    assert found[0] == found[1] and differences(found[1], found[2]) == ["the task file was edited"]


def test_without_words_a_run_goes_on_as_recorded() -> None:
    """`start` again changes nothing: not even what has another default now."""
    recorded = load(overrides={"train.epochs": 8, "train.lr": 0.5}).model_dump(mode="json")
    again = resolve()
    found = resumed(recorded, again.config, again.explicit)
    assert (found.config.train.epochs, found.config.train.lr, found.changes, found.forbidden) == (8, 0.5, [], [])


def test_what_may_change_changes_and_is_said() -> None:
    """epochs, max_steps, log, polite, memory, checkpoint, and lr and scheduler when set."""
    sets = ["train.lr=1e-5", "train.scheduler=linear", "checkpoint.keep=5", "memory.ram_limit=4GB", "train.max_steps=7"]
    again = resolve(sets=[*sets, "log.tensorboard=true", "polite.priority=normal"], overrides={"train.epochs": 9})
    found = resumed(load().model_dump(mode="json"), again.config, again.explicit)
    assert found.forbidden == [] and len(found.changes) == 8
    assert "train.epochs 3 -> 9" in found.changes and "train.max_steps none -> 7" in found.changes
    assert (found.config.train.epochs, found.config.checkpoint.keep, found.config.train.scheduler) == (9, 5, "linear")


@pytest.mark.parametrize(
    "key",
    [
        "train.weight_decay=0.5", "train.precision=fp32", "train.threads=3", "train.warmup_steps=9", "memory.logits=full",
        "train.activation_checkpointing=full", "train.attention=math", "train.compile=true",
    ],
)  # fmt: skip
def test_what_may_not_change_is_never_silently_ignored(key: str) -> None:
    """A value set that cannot take effect is told."""
    again = resolve(sets=[key])
    found = resumed(load().model_dump(mode="json"), again.config, again.explicit)
    assert len(found.forbidden) == 1 and key.partition("=")[0] in found.forbidden[0]


def test_data_are_known_by_what_they_hold(tmp_path: Path) -> None:
    """For a task without a reader of its own: a file by size, beginning and end; a folder by names and sizes."""
    assert fingerprint(DataConfig()) == {"kind": "own"}
    file = tmp_path / "a.bin"
    file.write_bytes(b"a" * (3 << 20))
    first = fingerprint(DataConfig(path=str(file)))
    assert first == fingerprint(DataConfig(path=str(file))) and first["size_bytes"] == 3 << 20
    with open(file, "r+b") as changed:
        changed.seek(-1, 2)
        changed.write(b"b")
    assert fingerprint(DataConfig(path=str(file))) != first
    before = fingerprint(DataConfig(path=str(tmp_path)))
    (tmp_path / "b.bin").write_bytes(b"")
    assert fingerprint(DataConfig(path=str(tmp_path))) != before
    empty = tmp_path / "empty"
    empty.mkdir()
    for wrong in (tmp_path / "none", tmp_path / "b.bin", empty):
        with pytest.raises(UsageError, match=r"does not exist|is empty"):
            fingerprint(DataConfig(path=str(wrong)))
