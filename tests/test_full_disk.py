"""A full disk never kills a run: real small file systems, and a disk that fails at every single operation of a whole run."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tests.disks import FailingDisk, RecordingDisk, commit, loaded_step, names, on_a_small_disk
from tests.toy import LEAVE, Script, Toy, config, lines, run, same, weights
from tests.trainers import PREPARED, PREPARING, RunningTrainer, new_run
from trainerd.contract import files, wire
from trainerd.contract.errors import Refused
from trainerd.engine import space
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.memory import disk

OFTEN = {"every_steps": 4, "exact": True}


class Ballast:
    """Takes all but `free` bytes of a small file system, and gives them back."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ballast"

    def fill(self, free: int = 0) -> None:
        with open(self.path, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
            file.truncate(max(0, os.fstat(file.fileno()).st_size - free))

    def give_back(self) -> None:
        self.path.unlink(missing_ok=True)


class Fills(Toy):
    """The disk is full from step `full_at` on, and has room again at `free_at`."""

    full_at, free_at = 9, 10**9  # after the save at 8 has begun, so that the one at 4 is there
    ballast: Ballast

    def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
        if ctx.training and ctx.step == self.full_at:
            self.ballast.fill()
        if ctx.training and ctx.step == self.free_at:
            self.ballast.give_back()
        return super().loss(model, batch, ctx)


class Helps(Script):
    """Makes room, or asks to leave, once the training says that it waits."""

    def __init__(self, ballast: Ballast, leave: bool = False) -> None:
        super().__init__()
        self._ballast, self._leave = ballast, leave

    def send(self, event: str, **fields: Any) -> None:
        super().send(event, **fields)
        if event == wire.WAITING and not self._leave:
            self._ballast.give_back()  # so not by the one that is asked to leave: it leaves at its first look

    def command(self) -> dict[str, Any] | None:
        if not self._leave or not self.of(wire.WAITING):
            return None
        self._leave = False
        return LEAVE


def full_in_the_middle(folder: Path) -> None:
    """What happens in test_a_disk_that_fills_during_training."""
    asked = config(checkpoint=OFTEN)
    run(folder.parent / "whole", asked)
    link, task = Script(), Fills()
    task.ballast, task.free_at = Ballast(folder), 15
    assert run(folder / "home", asked, link, task).outcome == "finished"
    told = link.of(wire.UNSAVED)
    assert told[0]["since"] is not None and told[0]["missing_bytes"] >= 1, told
    assert told[-1]["since"] is None and not link.of(wire.WAITING), told
    assert same(folder.parent / "whole", folder / "home")


def full_at_the_end(folder: Path) -> None:
    """What happens in test_a_disk_that_is_full_at_the_end."""
    asked = config(checkpoint=OFTEN)
    run(folder.parent / "whole", asked)
    task = Fills()
    task.ballast = Ballast(folder)
    link = Helps(task.ballast, leave=True)
    assert run(folder / "home", asked, link, task).outcome == "left"
    reason = link.of(wire.WAITING)[0]["reason"]
    assert "The disk is full" in reason and "bytes are missing" in reason and "finished model" in reason, reason
    assert not (folder / "home" / "models" / "toy" / "result.json").exists()
    assert not [path for path in (folder / "home" / "models" / "toy").rglob("*") if path.stat().st_size and path.suffix == ".tmp"]
    link = Helps(task.ballast)
    assert run(folder / "home", asked, link, task).outcome == "finished"
    assert link.of(wire.WAITING) and link.of(wire.CHECKPOINT)
    assert same(folder.parent / "whole", folder / "home")


def full_while_preparing(folder: Path) -> None:
    """What happens in test_a_disk_that_fills_while_data_is_prepared."""
    source = PREPARING.replace("ctx.report_data(", '(ctx.cache_dir / "large").write_bytes(bytes(3 << 20)); ctx.report_data(')
    paths = new_run(folder / "home", **{**PREPARED, "source": source})
    ballast = Ballast(folder)
    ballast.fill(free=2 << 20)
    trainer = RunningTrainer(paths, TINY_PAUSE="0.02")
    reason = trainer.wait_for(wire.WAITING, lambda message: "full" in message["reason"])["reason"]
    assert "Preparing the data goes on" in reason, reason
    assert not list((folder / "home" / "cache").glob("*/large")), "what was half prepared fills the disk"
    ballast.give_back()
    trainer.wait_for_step(3)
    assert trainer.leave() == wire.EXIT_LEFT
    assert trainer.of(wire.EXCEPTION) == []


def read_only(folder: Path) -> None:
    """What happens in test_a_file_system_that_became_read_only."""
    store = CheckpointStore(folder / "checkpoints")
    commit(store, 1)
    assert os.system(f"mount -o remount,ro {folder}") == 0
    before = names(folder / "checkpoints")
    try:
        commit(store, 2)
    except OSError as error:
        assert error.errno == errno.EROFS, error
    else:
        raise AssertionError("it was written")
    assert names(folder / "checkpoints") == before
    assert os.system(f"mount -o remount,rw {folder}") == 0
    commit(store, 2)
    assert loaded_step(store) == 2


@pytest.mark.parametrize(
    ("scenario", "size"),
    [("full_in_the_middle", "4m"), ("full_at_the_end", "4m"), ("full_while_preparing", "8m"), ("read_only", "1m")],
)
def test_on_a_small_file_system(tmp_path: Path, scenario: str, size: str) -> None:
    """Full in the middle: training goes on, says since when it is unsaved and what is missing, and the next save succeeds. Full at
    the end: it waits, may be stopped, and the result is written when there is room; full while preparing: the same. Every number
    and the model are those of a run on a large disk. Read-only: an error, and nothing torn."""
    on_a_small_disk(tmp_path / "small", globals()[scenario], size)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_full_once_at_any_operation_of_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, code: int) -> None:
    """The disk, or the quota, is full at (each fifth, each single) write, creation and sync from a run's beginning to its result: it
    finishes, the same run."""
    asked = config({"epochs": 1}, checkpoint=OFTEN)
    recording = RecordingDisk()
    monkeypatch.setattr(files, "disk", recording)
    run(tmp_path / "whole", asked)
    monkeypatch.setattr(space.Wait, "until_room", lambda self, need, to_leave=None: True)
    places = [n for n, (kind, _) in enumerate(recording.seen, 1) if kind in ("open", "create", "write", "sync", "make_folder")]
    assert len(places) > 30
    for place in places[every // 2 if code == errno.EDQUOT else 0 :: every]:
        home = tmp_path / f"full-{place}"
        monkeypatch.setattr(files, "disk", FailingDisk(lambda number, kind, name, place=place: number == place, code))
        assert run(home, asked).outcome == "finished"
        assert lines(home) == lines(tmp_path / "whole"), f"operation {place}: {recording.seen[place - 1]}"
        assert all(torch.equal(value, weights(home)[name]) for name, value in weights(tmp_path / "whole").items())


@pytest.mark.parametrize("code", [errno.EIO, errno.EFBIG, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_whatever_the_metrics_meet_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Lines that cannot be written wait, half-written ones are taken back, no checkpoint is committed before they are there, and in
    the end each step is in the file once."""
    run(tmp_path / "whole", config())
    failed = []

    def fails(number: int, kind: str, name: str) -> bool:
        if kind == "write" and name == "metrics.jsonl" and len(failed) < 4:
            failed.append(number)
            return True
        return False

    monkeypatch.setattr(files, "disk", FailingDisk(fails, code))
    run(tmp_path / "failing", config())
    assert len(failed) == 4 and same(tmp_path / "whole", tmp_path / "failing")


@pytest.mark.skipif(sys.platform == "win32", reason="needs rlimits and users")
def test_a_limit_on_file_sizes_and_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """ulimit -f, and a folder without permission: an error with its errno, nothing torn, and a save that works afterwards."""
    program = """
import errno, os, pathlib, resource, sys
from tests.disks import commit, loaded_step, names
from trainerd.engine.checkpoints import CheckpointStore
folder = pathlib.Path(sys.argv[1])
store = CheckpointStore(folder / "c")
commit(store, 1)
before = names(folder / "c")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for expected in (errno.EFBIG, errno.EACCES):
    if expected == errno.EACCES:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.chmod(folder / "c", 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
    try:
        commit(store, 2)
    except OSError as error:
        assert error.errno == expected, error
    else:
        raise AssertionError(expected)
    if os.getuid() == 0:
        os.seteuid(0)
    assert names(folder / "c") == before, names(folder / "c")
os.chmod(folder / "c", 0o755)
commit(store, 2)
assert loaded_step(store) == 2
"""
    for parent in tmp_path.parents[:3]:
        os.chmod(parent, 0o755)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "das Kontingent"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"), False),
        (OSError("4096 requested and 12 written"), False),
        (OSError(errno.EIO, "Input/output error"), False),
    ],
    ids=["errno", "quota", "safetensors", "safetensors, quota", "torch, with room", "numpy, with room", "another error"],
)
def test_a_full_disk_is_known_in_every_disguise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, full: bool) -> None:
    """By its code, by what Rust says of it, and, when a library only says that it could not write, by the room there is."""
    assert space.is_full(error, tmp_path) is full
    try:
        raise ValueError("something else") from error
    except ValueError as wrapped:
        assert space.is_full(wrapped, tmp_path) is full
    monkeypatch.setattr(space, "free_bytes", lambda path: 5000)
    assert space.is_full(error, tmp_path) is (full or ("I/O" not in str(error) and "Input" not in str(error)))


def test_a_quota_is_not_told_as_missing_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room on the disk, and not for us: what is waited for is told as that, and not as "1 bytes are missing"."""
    monkeypatch.setattr(space, "free_bytes", lambda path: 10**12)
    told: list[str] = []
    space.Wait(tmp_path, "Writing the finished model", lambda event, reason: told.append(reason)).until_room(10**6, lambda: len(told) > 0)
    where = f"The disk has room, but your quota is used up where {tmp_path} is."
    assert told == [f"{where} Writing the finished model goes on when there is room for you."]


# before the start


def test_how_many_checkpoints_fit() -> None:
    """All, fewer, the best one last to be given up but one; below two and the result: not at all."""
    one, result = 100, 40

    def fits(checkpoints: int) -> disk.Room:
        return disk.room(int((checkpoints * one + result) * disk.MARGIN) + 1, one, result, keep=3, keep_best=True)

    assert [(fits(n).keep, fits(n).keep_best, fits(n).missing_bytes) for n in (5, 4, 3, 2)] == [
        (3, True, 0), (2, True, 0), (1, True, 0), (1, False, 0),
    ]  # fmt: skip
    assert 90 < fits(1).missing_bytes < 110
    assert disk.room(0, one, result, keep=3, keep_best=True, there=5).keep == 3 - 1, "what lies there makes room"


def test_a_run_that_cannot_be_saved_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the first step, with the bytes that are missing; a run that has begun goes on with fewer checkpoints."""
    from trainerd.engine import trainer

    monkeypatch.setattr(trainer, "free_bytes", lambda path: 1000)
    with pytest.raises(Refused, match="bytes are missing"):
        run(tmp_path, config())
    assert not list((tmp_path / "runs" / "toy").glob("committed.json"))
    monkeypatch.undo()
    run(tmp_path, config(), Script({9: LEAVE}))
    monkeypatch.setattr(trainer, "free_bytes", lambda path: 1000)
    link = Script()
    assert run(tmp_path, config(checkpoint=OFTEN), link).outcome == "finished"
    assert "the last 1 will be kept" in link.of(wire.WARNING)[0]["text"]
    assert len(list((tmp_path / "checkpoints" / "toy").glob("checkpoint_*.json"))) == 1
