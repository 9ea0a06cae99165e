"""What is refused or asked for before anything starts: no room on the disk, an end that lies behind; and what it ends in."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from client import choose, room, view
from client.view import Reading
from tests.disks import FailingDisk
from trainerd.config.load import Resolved
from trainerd.config.model import DataConfig, RunConfig
from trainerd.contract import files, runs, status
from trainerd.contract.errors import Refused, UsageError
from trainerd.contract.paths import Home
from trainerd.engine import entry
from trainerd.memory import disk
from trainerd.supervisor import opening
from trainerd.tasks.cadence import size
from trainerd.tasks.cadence.settings import CadenceSettings


def test_what_is_expected_before_preparing_is_no_more_than_there_may_be(tmp_path: Path) -> None:
    """Few rows hold few words; a file's rows are not known, so the vocabulary asked for counts."""
    settings = CadenceSettings()
    few = size.expected_parameters(settings, DataConfig(size=10))
    assert few < size.expected_parameters(settings, DataConfig(path=str(tmp_path))) < 4_300_000


def test_a_start_without_room_is_refused_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 5 with the bytes that are missing, before anything is written; with room, and for a person's own task, nothing is said."""
    config = RunConfig(settings={"model": "gru-mn"})
    monkeypatch.setattr(room, "free_bytes", lambda path: 300_000_000)
    with pytest.raises(Refused, match="bytes are missing") as error:
        room.refuse_without_room(home, config)
    assert error.value.exit_code == 5 and "another --home" in error.value.hint
    room.refuse_without_room(home, RunConfig(task="my_task.py:Mine"))
    room.refuse_without_room(home, RunConfig())
    monkeypatch.setattr(room, "free_bytes", lambda path: 3_000_000_000)
    room.refuse_without_room(home, config)


def test_a_disk_that_metrics_would_fill_is_told_so() -> None:
    """12 million steps of a small model: what is missing is for their metrics, and fewer steps are the remedy, not a smaller model."""
    metrics = disk.metrics_bytes(12_000_000)
    found = disk.room(230_000_000, 5_000_000, 4_000_000 + metrics, 3, True)
    message, hint = disk.too_little("/home", found, 5_000_000, metrics)
    assert "2,400,000,000 bytes of metrics (200 for each of 12,000,000 steps)" in message
    assert "fewer steps (train.epochs, train.max_steps)" in hint and "smaller" not in hint
    message, hint = disk.too_little("/home", disk.room(1, 5_000_000, 4_000_000, 3, True), 5_000_000, disk.metrics_bytes(100))
    assert "make the model smaller" in hint and "the result and the metrics;" in message


@pytest.mark.parametrize(("asked", "words"), [({"max_steps": 29}, "behind step 30"), ({"epochs": 1}, "behind epoch 2")])
def test_an_end_that_lies_behind_is_refused_at_once(home: Home, asked: dict[str, int], words: str) -> None:
    """`start` with fewer steps or epochs than the unfinished run has done says where it is; as many are its end."""
    config = RunConfig(name="run", train={"epochs": 5})
    identity = choose.identity(config, {"kind": "x"}, None)
    runs.write(home, runs.RunRecord("run", "cadence", 1.0, config.model_dump(mode="json"), identity, step=30))
    checkpoints = home.run("run").checkpoints
    checkpoints.mkdir(parents=True)
    (checkpoints / "checkpoint_epoch_2_step_30.json").write_text("{}", encoding="utf-8")

    def go_on(**train: int) -> choose.Choice:
        resolved = Resolved(RunConfig(name="run", train={"epochs": 5, **train}), frozenset(f"train.{name}" for name in train))
        return choose._go_on(home, runs.read(home, "run"), resolved)

    with pytest.raises(Refused, match=words):
        go_on(**asked)
    assert go_on(max_steps=30).config.train.max_steps == 30
    assert go_on(epochs=2).config.train.epochs == 2


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("UsageError: The data x is not what this run began with", 2),
        ("Refused: The disk is too full to begin", 5),
        ("KeyError: 'x'", 4),
        (None, 4),
    ],
)
def test_what_waiting_for_a_failure_ends_in(last: str | None, code: int) -> None:
    """`start --wait`: 2 for data or settings that cannot be used, 5 for what is not possible now, 4 for the rest; `status` says 4."""
    failed = status.Status(state=status.FAILED)
    failed.trainer.last_exit = last
    reading = Reading(status.FAILED, "", failed, False)
    assert view.result_code(reading) == code and view.exit_code(reading) == 4
    assert view.result_code(Reading(status.COMPLETED, "", failed, False)) == 0


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 12, 1),
        (AssertionError(), 12, 1),
        (UsageError("no"), 12, 12),
        (Refused("too full"), 12, 12),
        (RuntimeError("CUDA error: unknown error"), 1, 1),
        (MemoryError(), 1, 1),
        (ConnectionError("the base model could not be fetched"), 1, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_only_errors_of_the_moment_are_tried_again_before_a_step_went_well(error: Exception, before: int, after: int) -> None:
    """A wrong shape in the first step would come again; a device, a network or memory may be back. After a good step all are tried."""
    assert entry.verdict(error, retry_helps=False)[0] == before
    assert entry.verdict(error, retry_helps=True)[0] == after


@pytest.mark.parametrize("place", ["runs/run", "runs/run/run.json", "runs/run/events.jsonl", "runs/run/task", "training_logs", "control"])
def test_a_supervisor_writes_through_no_link(home: Home, tmp_path: Path, place: str) -> None:
    """A link in the home, in place of what it writes, is refused by name."""
    outside = tmp_path / "outside"
    outside.mkdir()
    link = home.root / place
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(outside / "file" if link.suffix else outside)
    except OSError:
        pytest.skip("needs symbolic links")
    arguments: dict[str, Any] = {"run": "run", "config": RunConfig().model_dump(mode="json"), "identity": {}}
    with pytest.raises(Refused, match=f"{link.name} is a link"):
        opening.open_run(home, arguments)
    assert list(outside.iterdir()) == []


def test_a_file_that_only_grows_keeps_whole_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins where it is told to, takes back what was written half at once, and takes neither a link nor a folder."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"one\ntwo\ntorn")
    growing = files.Growing(path, 8)
    monkeypatch.setattr(files, "disk", FailingDisk(lambda number, kind, name: kind == "write", errno.ENOSPC))
    with pytest.raises(OSError):
        growing.append(b"a longer line\n")
    assert path.read_bytes() == b"one\ntwo\n"
    monkeypatch.undo()
    growing.append(b"three\n")
    growing.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n" and growing.bytes == 14
    path.with_name("folder").mkdir()
    with pytest.raises(OSError):
        files.Growing(path.with_name("folder"), 0)
