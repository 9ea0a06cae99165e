"""Writes the result of a run: models/<run>/, its finished record last. Must not train, and puts no time or path into the weights.

Everything else is durable before result.json is: with it the run is finished, without it it is not.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from trainerd.config.model import RunConfig
from trainerd.contract import clock, files
from trainerd.contract.errors import ExportFailed, TrainerdError
from trainerd.contract.paths import RunPaths
from trainerd.engine import entry, space, taskfile
from trainerd.engine.state import learned
from trainerd.engine.task import Task

WEIGHTS = "model.safetensors"
_SMALL_FILES_BYTES = 1 << 20
_MISNAMED = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_MEND = "Mend export() in the task file and `start` as before: that writes the result and trains nothing again."


def export(task: Task, model: nn.Module, config: RunConfig, paths: RunPaths, *, frozen: dict[str, str], facts: dict[str, Any]) -> None:
    """Write the model, its configuration and metrics, the task's own files and the user's task file; then result.json.

    `facts` (step, metrics, best, …) go into metrics.json and result.json. Frozen weights are not written: `frozen` names
    them with their sha256 in config.json.
    """
    folder = paths.model
    files.make_folder(folder)
    files.tidy(folder)  # an earlier life may have been killed right here
    files.remove(paths.result)
    tied = _write_weights(model, folder / WEIGHTS)
    described = config.model_dump(mode="json", include={"task", "seed", "settings", "train"})
    described["settings"] = task.settings.model_dump(mode="json")
    origin = {"frozen_source": task.frozen_source, "frozen_sha256": frozen} if frozen else {}
    files.write_json(folder / "config.json", {"schema": files.SCHEMA, **described, "tied": tied, **origin}, durable=True)
    files.write_json(folder / "metrics.json", {"schema": files.SCHEMA, **facts}, durable=True)
    if paths.task.is_dir():
        for source in sorted(paths.task.glob("*.py")):
            files.write_atomic(folder / source.name, source.read_bytes(), durable=True)
    _by_task(task, model, folder, facts["exported_step"])
    written = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".tmp"))
    digests = {p.relative_to(folder).as_posix(): _durable_sha256(p) for p in written}
    record = {"schema": files.SCHEMA, "run": paths.name, "task": config.task, "outcome": "completed", "finished_at": clock.wall()}
    files.write_json(paths.result, {**record, **facts, "files": digests}, durable=True)


def _by_task(task: Task, model: nn.Module, folder: Path, step: int) -> None:
    """The task's own part. Raises ExportFailed for an error of its program; what the disk, the memory or the device says, as it is."""
    try:
        task.export(model, folder)
    except (Exception, SystemExit) as error:
        # With the result's folder in its place, a file that is looked for in vain is looked for in the wrong place.
        own = isinstance(error, (SystemExit, TrainerdError)) or (isinstance(error, _MISNAMED) and folder.is_dir())
        if not own and (space.is_of_the_disk(error) or entry.of_the_moment(error)):
            raise
        said = f"The task's own export() failed: {taskfile.last_line(error, _file_of(task))}."
        raise ExportFailed(f"{said} All that was trained is saved (step {step:,}).", _MEND) from error
    said = _left_wrong(folder)
    if said:
        raise ExportFailed(f"The task's own export() {said}. All that was trained is saved (step {step:,}).", _MEND)


def _left_wrong(folder: Path) -> str:
    """What of the result's folder is not as it must be, "" when all is. Links are removed, so that a mended export() finds none."""
    if not folder.is_dir():
        return f"has removed {folder}, where the result is written"
    links = [path for path in sorted(folder.rglob("*")) if path.is_symlink()]
    for link in links:
        files.remove(link)
    return f"has left {links[0]}, which is a link: it might lead anywhere" if links else ""


def _file_of(task: Task) -> Path | None:
    try:
        return Path(inspect.getfile(type(task)))
    except (TypeError, OSError):  # typed into an interpreter
        return None


def _write_weights(model: nn.Module, path: Path) -> dict[str, str]:
    """model.safetensors: names sorted, what is shared stored once; returns {other name: stored name}."""
    trainable_only = any(not p.requires_grad for p in model.parameters())
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    own = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]}
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    known: dict[tuple[Any, ...], str] = {}
    for name, value in sorted(model.state_dict().items()):
        # With a frozen base only what was learned is ours to write; a quantised base adds entries of its own.
        if not isinstance(value, Tensor) or (trainable_only and (name in frozen or name not in own)):
            continue
        key = (value.device, value.data_ptr(), tuple(value.shape), value.stride()) if value.numel() else (name,)
        if key in known:
            tied[name] = known[key]
            continue
        known[key] = name
        stored[name] = value.detach().cpu().contiguous()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        files.remove(temporary)  # a link left there would be followed
        # One metadata key at most: several are written in an order that differs between processes.
        save_file(stored, str(temporary), metadata={"format": "pt"})
        files.sync_file(temporary)
        files.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            files.remove(temporary)
        raise
    files.sync_folder(path.parent)
    return tied


def weights_bytes(model: nn.Module) -> int:
    """About what the result takes on the disk, its small files included: what was learned, for a frozen base is not ours to write."""
    return _SMALL_FILES_BYTES + sum(value.numel() * value.element_size() for _, value in learned(model))


def _durable_sha256(path: Path) -> str:
    files.sync_file(path)
    return files.sha256_of(path)
