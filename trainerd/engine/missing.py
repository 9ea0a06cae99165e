"""Which file a task's failed import is about, and what to do. Must not import torch, nor anything of the task's.

What was there when a step was saved, or when the model was traced, is known by its path: so a module that was moved away is named by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from trainerd.contract.errors import MissingModule, Unreadable, UsageError
from trainerd.contract.paths import RunPaths
from trainerd.engine import manifest

_NAME = re.compile(r"No module named '([\w.]+)'")  # of a loader's worker only the words come back


def in_words(error: BaseException, paths: RunPaths) -> BaseException:
    """The error as one that a person can act on, where it is of an import and a module that the run had is not to be found; any other
    as it is."""
    failed = error.__context__ if isinstance(error, UsageError) else error  # taskfile.py has its own words
    if not isinstance(failed, ImportError):
        return error
    said = _NAME.search(str(failed))
    name = failed.name or (said[1] if said else "")
    folders = {path: folder for path in _recorded(paths) if (folder := _found_in(path, name)) is not None}
    gone = [str(path) for path in folders if not path.exists()]
    if gone:
        are, them = ("is", "it") if len(gone) == 1 else ("are", "them")
        return MissingModule(f"{', '.join(gone[:3])} {are} gone, and the task imports {them}.", f"Put {them} back, then `resume`.")
    is_nowhere = isinstance(failed, ModuleNotFoundError)
    if is_nowhere and folders:
        path, folder = next(iter(folders.items()))
        hint = f"Put {folder} on PYTHONPATH, as it was, then `resume`."
        return MissingModule(f"Python does not find {path}, which is there, and the task imports it.", hint)
    if is_nowhere and name and failed is error:
        return MissingModule(f"The module {name!r} is not there, and the task imports it.", "Install it, or put it back; then `resume`.")
    return error


def _recorded(paths: RunPaths) -> list[Path]:
    """The person's own files that the newest checkpoint names, else those of the trace."""
    manifests = [path for path in paths.checkpoints.glob("checkpoint_*.json") if manifest.NAME.fullmatch(path.name)]
    files: object = None
    for path in sorted(manifests, key=manifest.order, reverse=True)[:1]:
        try:
            files = manifest.read(path).about.get("code")
        except (OSError, Unreadable, manifest.BadCheckpoint):
            pass
    if not isinstance(files, Mapping):
        from trainerd.memory import receipts  # a trainer that begins has no use for it

        files = receipts.trace_of(paths).get("sources")
    return [Path(str(path)) for path, digest in files.items() if digest] if isinstance(files, Mapping) else []


def _found_in(path: Path, name: str) -> Path | None:
    """The folder that such a module is looked for in, where this is its file or one of the package of that name; else None."""
    parts, wanted = path.with_suffix("").parts, tuple(name.split("."))
    places = [place for place in range(1, len(parts)) if parts[place : place + len(wanted)] == wanted]
    return Path(*parts[: places[-1]]) if places else None
