"""Checkpoints on disk: commit, load, keep, set aside. Must not know what a state means, when to save, or whom to tell.

A checkpoint is `checkpoint_epoch_X_step_Y.pt` and its manifest `….json`, which is written last and commits it. The state
is written under a temporary name, hashed on the way, fsynced, renamed, its folder fsynced; then the metrics are fsynced;
then the manifest goes the same way. Only then commit() acknowledges. Nothing acknowledged is ever written over.
Loading goes from the newest to the oldest, and looks at size and sha256 before anything is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import stat
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trainerd.contract import clock, files
from trainerd.contract.errors import NoGoodCheckpoint, Unreadable
from trainerd.engine import manifest as manifests
from trainerd.engine.manifest import BadCheckpoint, Manifest

State = dict[str, Any]
_KINDS = ("bad", "superseded")
_SET_ASIDE = re.compile(r"checkpoint_epoch_\d+_step_(?P<step>\d+)\.(json|pt)\.(?P<kind>bad|superseded)-(?P<number>\d+)")
_KEEP_SET_ASIDE = 2
_FIRST_COMMIT = "first_commit.json"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.Tensor)
_CHUNK_BYTES = 4 << 20
# What a state takes on disk beyond its tensors, generously; only used to foresee a full disk.
_OVERHEAD_BYTES = 64 << 10


class CheckpointStore:
    """The checkpoints of one run, in one folder. One process at a time may use it: the holder of the trainer lock."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        keep_best: bool = True,
        mark: Path | None = None,
        reached_step: int | None = None,
        note: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """`note(kind, **facts)` hears of what is worth telling: quarantine, superseded, uncommitted, not_deleted, forgotten.

        That there has been a checkpoint is known from three places, so that losing the folder is no beginning: a file in it,
        the file `mark` outside of it, and `reached_step`, what was acknowledged according to the run's record.
        """
        self.folder = folder
        self.keep = keep
        self.keep_best = keep_best
        self._mark = mark
        self._reached_step = reached_step
        self._note = note

    # commit

    def commit(
        self,
        state: State,
        *,
        epoch: int,
        step: int,
        best: float | None,
        metrics: Path | None,
        metrics_bytes: int,
        about: dict[str, Any],
        metrics_sha256: str | None = None,
        spent_bytes: float = 0.0,
        acknowledge: Callable[[Manifest], None] = lambda manifest: None,
    ) -> Manifest:
        """Put the state on the disk, call `acknowledge` once it is durable, then delete what need not be kept.

        A step that is committed already is returned as it is. Raises OSError, leaving no torn final name behind, and
        TypeError for a state that could not be loaded back.
        """
        began = time.monotonic()
        path = self.folder / f"checkpoint_epoch_{epoch}_step_{step}.pt"
        committed = self._committed_as(path)
        if committed is None:
            need_bytes = size_of(state)
            files.make_folder(self.folder)
            self._foresee_space(need_bytes)
            size, digest = files.write_stream(path, lambda sink: torch.save(state, sink))  # type: ignore[arg-type]
            if metrics is not None:
                files.sync_file(metrics)
                files.sync_folder(metrics.parent)
                if metrics.stat().st_size < metrics_bytes:
                    raise OSError(errno.EIO, "its metrics are not on the disk yet", str(metrics))
            finite_best = best if best is not None and math.isfinite(best) else None
            seconds = round(time.monotonic() - began, 6)
            committed = Manifest(path, epoch, step, clock.wall(), size, digest, seconds, finite_best, metrics_bytes, about)
            committed = replace(committed, metrics_sha256=metrics_sha256, spent_bytes=spent_bytes + size)
            self._write_manifest(committed)
        acknowledge(committed)
        self.prune()
        self._forget_set_aside(step)
        return committed

    def _committed_as(self, path: Path) -> Manifest | None:
        manifest = path.with_suffix(".json")
        try:
            return manifests.read(manifest)
        except FileNotFoundError:
            return None
        except BadCheckpoint as error:
            self._set_aside(manifest, str(error))
            return None

    def _foresee_space(self, need_bytes: int) -> None:
        """Fail before filling the disk to the last byte, which would hurt everybody else on it."""
        if shutil.disk_usage(self.folder).free < need_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))

    def _write_manifest(self, manifest: Manifest) -> None:
        path = manifest.path.with_suffix(".json")
        try:
            files.write_atomic(path, manifests.encode(manifest), durable=True)
            # Before it is acknowledged: what lost every manifest must be told from what never had any.
            for mark in filter(None, (self.folder / _FIRST_COMMIT, self._mark)):
                if not mark.exists():
                    files.make_folder(mark.parent)
                    files.write_json(mark, {"schema": files.SCHEMA, "step": manifest.step}, durable=True)
        except OSError:
            # Not durable, so not committed: the next attempt must not find it and take it for acknowledged.
            _done(lambda: files.remove(path))
            raise

    # load

    def load(self, before_step: int | None = None) -> tuple[State, Manifest] | None:
        """The newest good checkpoint, only those before `before_step` if given; bad ones are set aside and noted.

        None when there has never been one. Going back renames newer ones *.superseded-<n>, so that the steps are made
        anew. Raises NoGoodCheckpoint when there are or were checkpoints and none is good, and Unreadable, with nothing touched,
        when a newer trainerd wrote the one to go on from.
        """
        self._tidy()
        for manifest_path in reversed(self._manifests()):
            if before_step is not None and manifests.order(manifest_path)[0] >= before_step:
                continue
            try:
                state, manifest = self._read(manifest_path)
            except BadCheckpoint as error:
                self._set_aside(manifest_path, str(error))
                continue
            if before_step is not None:
                self.supersede(manifest.step)
            self.prune()  # what the last life was killed in the middle of
            return state, manifest
        if not self._was_used():
            return None
        what_to_do = "Put back a copy of that folder, or begin a new run with --no-resume."
        if not any(path.name.startswith("checkpoint_") for path in self._entries()):
            reached = "" if self._reached_step is None else f" (step {self._reached_step} was saved)"
            raise NoGoodCheckpoint(f"The checkpoints of this run are gone{reached}: there is none in {self.folder}.", what_to_do)
        before = "" if before_step is None else f" before step {before_step}"
        raise NoGoodCheckpoint(f"None of the checkpoints{before} in {self.folder} can be loaded; nothing was deleted.", what_to_do)

    def read_step(self, step: int) -> State | None:
        """The state committed at `step`, None when there is no good one; nothing is renamed. For the best one's weights."""
        for manifest_path in reversed(self._manifests()):
            if manifests.order(manifest_path)[0] == step:
                try:
                    return self._read(manifest_path)[0]
                except BadCheckpoint as error:
                    self._set_aside(manifest_path, str(error))
                except Unreadable:
                    continue
        return None

    def _read(self, manifest_path: Path) -> tuple[State, Manifest]:
        try:
            manifest = manifests.read(manifest_path)
            if not stat.S_ISREG(manifest.path.lstat().st_mode):
                raise BadCheckpoint("it is not a plain file")
            with open(manifest.path, "rb") as file:
                _verify(file, manifest)
                return _unpickle(file), manifest
        except FileNotFoundError:
            raise BadCheckpoint("its .pt file is missing") from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise  # no rights, too many files open: says nothing about the checkpoint
            raise BadCheckpoint(f"it cannot be read: {error.strerror}") from None

    def _tidy(self) -> None:
        """Remove what a crash left half written; name what was never committed."""
        manifests = {path.stem for path in self._manifests()}
        for path in self._entries():
            if files.is_temporary(path):
                files.remove(path)
            elif path.name.startswith("checkpoint_") and path.suffix == ".pt" and path.stem not in manifests:
                self._note("uncommitted", file=path.name)
        if self._mark is not None:
            files.tidy(self._mark.parent, self._mark.name)

    def _was_used(self) -> bool:
        if self._reached_step is not None or (self._mark is not None and self._mark.exists()):
            return True
        return any(path.name == _FIRST_COMMIT or (path.name.startswith("checkpoint_") and path.suffix != ".pt") for path in self._entries())

    # keep

    def committed(self) -> list[Manifest]:
        """The committed checkpoints, oldest first, by their manifests; their content is looked at only by load()."""
        found = []
        for path in self._manifests():
            try:
                found.append(manifests.read(path))
            except (BadCheckpoint, FileNotFoundError, Unreadable):
                continue  # load() sets it aside, or refuses it
        return found

    def prune(self) -> None:
        """Delete all but the last `keep` and the best, manifests first. What cannot be deleted is noted, and no failure."""
        manifests = self.committed()
        kept = {manifest.path for manifest in manifests[-self.keep :]}
        rated = [manifest for manifest in manifests if manifest.best is not None]
        if self.keep_best and rated:
            kept.add(min(rated, key=lambda manifest: (manifest.best, manifest.step, manifest.epoch)).path)
        surplus = [manifest.path for manifest in manifests if manifest.path not in kept]
        for path in surplus:
            self._delete(path.with_suffix(".json"))
        if surplus and not _done(lambda: files.sync_folder(self.folder)):
            return  # a manifest that came back after a power cut must still find its state
        committed = {path.stem for path in self._manifests()}
        for path in self._entries():  # also those whose manifest an earlier crash, or a cut commit, took
            if path.name.startswith("checkpoint_") and path.suffix == ".pt" and path.stem not in committed:
                self._delete(path)

    def supersede(self, after_step: int) -> None:
        """Rename every checkpoint after `after_step` out of the way, newest first, manifest before state."""
        for path in reversed(self._manifests()):
            if manifests.order(path)[0] > after_step:
                self._rename_pair(path, "superseded")
                self._note("superseded", file=path.with_suffix(".pt").name, step=manifests.order(path)[0])

    def _forget_set_aside(self, step: int) -> None:
        """Of what was set aside keep the newest two of each kind. One of a step that no good checkpoint has reached again stays."""
        for kind in _KINDS:
            pairs: dict[tuple[int, int], list[Path]] = {}
            for path in self._entries():
                match = _SET_ASIDE.fullmatch(path.name)
                if match and match["kind"] == kind:
                    pairs.setdefault((int(match["step"]), int(match["number"])), []).append(path)
            for (of_step, _), paths in sorted(pairs.items())[:-_KEEP_SET_ASIDE]:
                if of_step <= step:
                    for path in sorted(paths):  # .json before .pt
                        self._delete(path)
                    self._note("forgotten", files=[path.name for path in sorted(paths)])

    def _delete(self, path: Path) -> None:
        try:
            files.remove(path)
        except OSError as error:
            self._note("not_deleted", file=path.name, why=error.strerror or str(error))

    def _set_aside(self, manifest_path: Path, why: str) -> None:
        self._rename_pair(manifest_path, "bad")
        self._note("quarantine", file=manifest_path.with_suffix(".pt").name, why=why)

    def _rename_pair(self, manifest_path: Path, suffix: str) -> None:
        state_path = manifest_path.with_suffix(".pt")
        number = 1
        while any(path.with_name(f"{path.name}.{suffix}-{number}").exists() for path in (manifest_path, state_path)):
            number += 1
        for path in (manifest_path, state_path):
            try:
                files.replace(path, path.with_name(f"{path.name}.{suffix}-{number}"))
            except FileNotFoundError:
                continue
        files.sync_folder(self.folder)

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.folder.iterdir())
        except FileNotFoundError:
            return []

    def _manifests(self) -> list[Path]:
        """The manifest files, oldest step first."""
        return sorted((path for path in self._entries() if manifests.NAME.fullmatch(path.name)), key=manifests.order)


def size_of(state: Any, where: str = "state") -> int:
    """About how many bytes a state takes. Raises TypeError at the first thing weights_only loading would refuse."""
    return _OVERHEAD_BYTES + _size_of(state, where)


def _size_of(value: Any, where: str) -> int:
    kind = type(value)
    if kind is torch.Tensor:
        return int(value.numel()) * int(value.element_size()) + 512
    if kind in _PLAIN:
        return len(value) + 16 if kind in (str, bytes) else 16
    if kind in (dict, OrderedDict):
        return sum(_size_of(key, f"a key of {where}") + _size_of(item, f"{where}[{key!r}]") for key, item in value.items())
    if kind in (list, tuple):
        return sum(_size_of(item, f"{where}[{index}]") for index, item in enumerate(value))
    raise TypeError(f"{where} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds only tensors and plain Python values")


def _verify(file: BinaryIO, manifest: Manifest) -> None:
    """Size, then hash, then that it would not unpack to more than itself; all on the one open file that is then read."""
    size = os.fstat(file.fileno()).st_size
    if size != manifest.bytes:
        raise BadCheckpoint(f"it has {size:,} bytes instead of {manifest.bytes:,}")
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    if digest.hexdigest() != manifest.sha256:
        raise BadCheckpoint("its content has changed since it was written (sha256)")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise BadCheckpoint(f"it is not a checkpoint: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > size:
        raise BadCheckpoint("it is packed, which ours never are")


def _unpickle(file: BinaryIO) -> State:
    file.seek(0)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise MemoryError(str(error).splitlines()[0]) from None  # the file is fine, the machine is full
        raise BadCheckpoint(f"it cannot be unpickled: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None
    if not isinstance(state, dict):
        raise BadCheckpoint("it holds no state")
    return state


def _done(action: Callable[[], None]) -> bool:
    """Whether an operation went through whose failure is not the one to report."""
    try:
        action()
    except OSError:
        return False
    return True
