"""Kills, power cuts, full and failing disks at every single file operation of a commit. Nothing acknowledged may be lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.disks import DyingDisk, FailingDisk, RecordingDisk, commit, loaded_step, names, pair
from tests.power_cut import Trace, states_after_power_cuts
from trainerd.contract import files
from trainerd.contract.errors import NoGoodCheckpoint
from trainerd.engine import checkpoints
from trainerd.engine.checkpoints import CheckpointStore

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, SIGKILL, and folders that can be synced")
LAST_STEP = 4


def work(folder: Path, acknowledge: Callable[[int], None]) -> None:
    """A short life: load, commit four steps with metrics, keep two."""
    folder.mkdir(exist_ok=True)
    store = CheckpointStore(folder / "checkpoints", keep=2)
    found = store.load()
    metrics = folder / "metrics.jsonl"
    for step in range(1 if found is None else found[1].step + 1, LAST_STEP + 1):
        with open(metrics, "ab") as file:
            file.write(b"x" * 7)
        best = 0.5 if step == 1 else 0.6
        commit(store, step, best, metrics=metrics, acknowledge=lambda manifest: acknowledge(manifest.step))


def nothing(step: int) -> None:
    """Nobody listens."""


def operations(folder: Path) -> list[tuple[str, str]]:
    """Every operation of that life, in order."""
    disk = RecordingDisk()
    kept, files.disk = files.disk, disk
    try:
        work(folder, nothing)
    finally:
        files.disk = kept
    return disk.seen


def die_at(number: int, when: str, folder: Path) -> list[int]:
    """Live that life in a child that is killed at one operation; returns the steps it acknowledged."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child uses none of them
        child = os.fork()
    if child == 0:
        try:
            files.disk = DyingDisk(number, when)
            work(folder, lambda step: os.write(writing, bytes([step])) and None)
        finally:
            os._exit(7)
    os.close(writing)
    with open(reading, "rb") as pipe:
        acknowledged = list(pipe.read())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"operation {number} was never reached"
    return acknowledged


@posix
def test_a_kill_at_any_operation_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """kill -9 before and after every file operation, and in the middle of every write: the next start loads what was
    acknowledged, cleans up, goes on, and ends with the very same files."""
    points = operations(tmp_path / "undisturbed")
    expected = names(tmp_path / "undisturbed" / "checkpoints")
    assert expected == pair(1) | pair(3) | pair(4)
    cuts = [(n, "half" if kind == "write" else "before") for n, (kind, _) in enumerate(points, 1)]
    cuts += [(n, "after") for n, (kind, _) in enumerate(points, 1) if kind not in ("write", "sync", "sync_folder", "create")]
    assert len(cuts) > 150
    for number, when in cuts:
        folder = tmp_path / f"{number}-{when}"
        acknowledged = die_at(number, when, folder)
        store = CheckpointStore(folder / "checkpoints", keep=2)
        found = store.load()
        assert (found[1].step if found else 0) >= max(acknowledged, default=0), f"lost at operation {number} ({when})"
        work(folder, nothing)
        assert loaded_step(store) == LAST_STEP
        assert names(folder / "checkpoints") == expected, f"other files after a kill at operation {number} ({when})"
        shutil.rmtree(folder)


NONE_GOOD, WRONG = -1, -2


def step_found(store: CheckpointStore) -> int:
    """The step whose very state is loaded, 0 at a beginning, NONE_GOOD, or WRONG when what is loaded is no step's state."""
    try:
        return 0 if store.load() is None else loaded_step(store)
    except NoGoodCheckpoint:
        return NONE_GOOD
    except AssertionError:
        return WRONG


def bad_power_cuts(folder: Path) -> tuple[int, int, int]:
    """(states examined, states in which something acknowledged is lost or wrong, those where it is wrong) after a power cut anywhere."""
    trace = Trace(folder)
    kept, files.disk = files.disk, trace
    try:
        work(folder, trace.acknowledge)
    finally:
        files.disk = kept
    examined = bad = wrong = 0
    for acknowledged in states_after_power_cuts(trace, folder / "checkpoints"):
        found = step_found(CheckpointStore(folder / "checkpoints"))
        examined += 1
        bad += found < acknowledged
        wrong += found == WRONG
    return examined, bad, wrong


@posix
def test_a_power_cut_anywhere_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Whatever part of what was not synced reaches the disk, in every state of the model the acknowledged checkpoint loads."""
    examined, bad, wrong = bad_power_cuts(tmp_path)
    assert examined > 40 and bad == wrong == 0


@posix
@pytest.mark.parametrize("mutant", ["no file sync", "no folder sync"])
def test_the_power_cut_model_notices_a_missing_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    """The same model finds the loss when a sync is taken out: it is able to fail."""
    taken_out = "sync" if mutant == "no file sync" else "sync_folder"
    monkeypatch.setattr(Trace, taken_out, lambda self, what: None)
    assert bad_power_cuts(tmp_path)[1] > 0


@posix
def test_without_the_hash_half_written_states_would_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that forgets what was synced of a state checkpoints are lost, but none that is wrong is ever loaded; it is the
    hash that stands between: with it taken out, too, wrong ones are."""
    sync = Trace.sync
    monkeypatch.setattr(Trace, "sync", lambda self, file: None if ".pt." in file.name else sync(self, file))
    _, lost, wrong = bad_power_cuts(tmp_path / "with")
    assert lost > 0 and wrong == 0
    monkeypatch.setattr(checkpoints, "_verify", lambda file, manifest: None)
    assert bad_power_cuts(tmp_path / "without")[2] > 0


FAILURES = {
    errno.ENOSPC: ("write", "create", "sync"),
    errno.EDQUOT: ("write", "create", "sync"),
    errno.EIO: ("sync", "sync_folder", "rename"),
    errno.EFBIG: ("write",),
}


@pytest.mark.parametrize("code", FAILURES, ids=errno.errorcode.get)
def test_a_failing_disk_leaves_no_torn_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """ENOSPC, EDQUOT, EIO or EFBIG at each operation of a commit: the error is told with its errno, only our own temporary is gone,
    what was there is there, and the next commit succeeds."""
    store = CheckpointStore(tmp_path, keep=2)
    commit(store, 1)
    recording = RecordingDisk()
    monkeypatch.setattr(files, "disk", recording)
    acknowledged_at = 0

    def reached(_: object) -> None:
        nonlocal acknowledged_at
        acknowledged_at = len(recording.seen)

    commit(store, 2, acknowledge=reached)
    places = [n for n, (kind, _) in enumerate(recording.seen[:acknowledged_at], 1) if kind in FAILURES[code]]
    assert places
    for place in places:
        step = 2 + place
        failing = FailingDisk(lambda number, kind, name, place=place: number == place, code)
        monkeypatch.setattr(files, "disk", failing)
        with pytest.raises(OSError) as error:
            commit(store, step)
        assert error.value.errno == code
        monkeypatch.setattr(files, "disk", files.Disk())
        assert not [name for name in names(tmp_path) if name.startswith(".")], "a temporary file is left"
        assert f"checkpoint_epoch_1_step_{step}.json" not in names(tmp_path)
        commit(store, step)
        assert loaded_step(store) == step


def test_a_disk_known_to_be_full_is_not_filled_to_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the state cannot fit, nothing is written at all."""
    recording = RecordingDisk()
    monkeypatch.setattr(files, "disk", recording)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 999, 999))  # type: ignore[attr-defined]
    with pytest.raises(OSError) as error:
        commit(CheckpointStore(tmp_path), 1)
    assert error.value.errno == errno.ENOSPC and recording.seen == []


_ON_A_SMALL_DISK = """
import errno, pathlib, sys
from tests.disks import commit, loaded_step, names
from trainerd.engine import checkpoints
from trainerd.engine.checkpoints import CheckpointStore

folder = pathlib.Path(sys.argv[1])
checkpoints.CheckpointStore._foresee_space = lambda self, need_bytes: None   # meet the full disk in the middle of a write
ballast = folder / "ballast"
store = CheckpointStore(folder / "c", keep=2)
commit(store, 1)
failed = 0
for free in range(0, 16384, 1024):
    ballast.write_bytes(b"")
    try:
        with open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
    except OSError:
        pass
    with open(ballast, "r+b") as file:
        file.truncate(ballast.stat().st_size - free)
    try:
        commit(store, 2 + free)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        failed += 1
    assert not [name for name in names(folder / "c") if name.startswith(".")]
    loaded_step(store)
ballast.unlink()
commit(store, 99999)
assert loaded_step(store) == 99999 and failed >= 2, failed
print("fine", failed)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs tmpfs")
def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a file system of 256 KiB filled to every size around a commit: the error is ENOSPC, and space given back is used."""
    mount = f"mount -t tmpfs -o size=256k small {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs unprivileged mounts (unshare -rm)")
    command = ["unshare", "-rm", "sh", "-c", f"{mount} && exec {sys.executable} - {tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=_ON_A_SMALL_DISK.encode(), capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"fine" in done.stdout
