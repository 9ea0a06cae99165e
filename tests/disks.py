"""Disks that record, fail, die or are full at any operation, and small states to keep on them. No tests here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from trainerd.contract import files
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.manifest import Manifest


class Notes(list[tuple[str, dict[str, Any]]]):
    """What a store told."""

    def __call__(self, kind: str, **facts: Any) -> None:
        self.append((kind, facts))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]


def state_at(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(300, generator=generator)
    return {"model": {"w": weights}, "optimizer": [{"step": step, "lr": 0.1}], "rng": (3, (1, 2), None), "name": "ünï", "raw": b"\0\1"}


def commit(store: CheckpointStore, step: int, best: float | None = None, **more: Any) -> Manifest:
    facts = {"epoch": 1, "best": best, "metrics": None, "metrics_bytes": 7 * step, "about": {"torch": torch.__version__}, **more}
    return store.commit(state_at(step), step=step, **facts)


def loaded_step(store: CheckpointStore, before_step: int | None = None) -> int:
    """The step a load gives, after a look that it is that step's state and nothing else."""
    found = store.load(before_step)
    assert found is not None
    state, manifest = found
    expected = state_at(manifest.step)
    assert torch.equal(state.pop("model")["w"], expected.pop("model")["w"])
    assert state == expected
    assert manifest.metrics_bytes == 7 * manifest.step
    return manifest.step


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "first_commit.json"}


def pair(step: int) -> set[str]:
    return {f"checkpoint_epoch_1_step_{step}.pt", f"checkpoint_epoch_1_step_{step}.json"}


def state_file(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_epoch_1_step_{step}.pt"


def on_a_small_disk(folder: Path, scenario: Callable[[Path], None], options: str) -> None:
    """Run a function of a test module in a mount namespace of its own, with `folder` a tmpfs of that size ("4m,nr_inodes=99")."""
    if not sys.platform.startswith("linux"):
        pytest.skip("needs tmpfs")
    folder.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={options} small {folder}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs unprivileged mounts (unshare -rm)")
    program = f"import pathlib; from {scenario.__module__} import {scenario.__name__} as go; go(pathlib.Path({str(folder)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec {sys.executable} -c "$0"', program]
    done = subprocess.run(command, capture_output=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()


class WatchedDisk(files.Disk):
    """A disk whose every operation goes through at()."""

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        """`detail` is what a write writes, what a rename renames."""
        return action()

    def create(self, path: Path) -> BinaryIO:
        found: BinaryIO = self.at("create", path, lambda: super(WatchedDisk, self).create(path))
        return found

    def write(self, file: BinaryIO, content: bytes | memoryview) -> None:
        self.at("write", Path(file.name), lambda: super(WatchedDisk, self).write(file, content), (file, content))

    def open_to_append(self, path: Path) -> BinaryIO:
        found: BinaryIO = self.at("open", path, lambda: super(WatchedDisk, self).open_to_append(path))
        return found

    def truncate(self, file: BinaryIO, size: int) -> None:
        self.at("truncate", Path(file.name), lambda: super(WatchedDisk, self).truncate(file, size))

    def sync(self, file: BinaryIO) -> None:
        self.at("sync", Path(file.name), lambda: super(WatchedDisk, self).sync(file))

    def rename(self, source: Path, target: Path) -> None:
        self.at("rename", target, lambda: super(WatchedDisk, self).rename(source, target), source)

    def unlink(self, path: Path) -> None:
        self.at("unlink", path, lambda: super(WatchedDisk, self).unlink(path))

    def make_folder(self, path: Path, mode: int = 0o777) -> None:
        self.at("make_folder", path, lambda: super(WatchedDisk, self).make_folder(path, mode))

    def sync_folder(self, path: Path) -> None:
        self.at("sync_folder", path, lambda: super(WatchedDisk, self).sync_folder(path))


class RecordingDisk(WatchedDisk):
    """Names every operation."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        self.seen.append((kind, path.name))
        return action()


class FailingDisk(WatchedDisk):
    """Fails at the operations `fails(number, kind, name)` names, with `code`; a write that fails has written half."""

    def __init__(self, fails: Callable[[int, str, str], bool], code: int) -> None:
        self.number = 0
        self._fails = fails
        self._code = code

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        self.number += 1
        if self._fails(self.number, kind, path.name):
            if kind == "write":
                detail[0].write(detail[1][: len(detail[1]) // 2])
            raise OSError(self._code, os.strerror(self._code), str(path))
        return action()


class DyingDisk(WatchedDisk):
    """Kills its own process at operation `number`: before it, after it, or, for a write, half way through."""

    def __init__(self, number: int, when: str) -> None:
        self._left = number
        self._when = when

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        self._left -= 1
        if self._left == 0 and self._when == "half" and kind == "write":
            detail[0].write(detail[1][: len(detail[1]) // 2])
            detail[0].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._left == 0 and self._when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = action()
        if self._left == 0 and self._when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
