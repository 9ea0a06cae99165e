"""Finds and loads the task of a run, built in or a person's own file. Must not train, and runs no file but the one named.

A person's file is imported from the run's copy, by its plain name from a folder on sys.path: so loader workers and spawned
processes can import it too. Whatever is wrong with it here is wrong for good: no restart can mend it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from trainerd.config import catalogue
from trainerd.config.model import RunConfig
from trainerd.config.problems import in_words
from trainerd.contract.errors import BadTaskFile, ConfigError, UsageError
from trainerd.engine.task import Task

_CORRECT = "The log has the traceback; correct the file, and start again."


def load_task(config: RunConfig, folder: Path) -> Task:
    """The task of a run with its settings; `folder` holds the run's copy of a person's file. Raises UsageError."""
    if catalogue.is_file_task(config.task):
        kind = _class_in_file(config.task, folder)
    else:
        module, _, name = catalogue.find_task(config.task).task.partition(":")
        kind = getattr(importlib.import_module(module), name)
    check_settings(kind, config.settings)
    try:
        return kind(config.settings)
    except UsageError:
        raise
    except Exception as error:
        traceback.print_exception(error)
        raise BadTaskFile(f"{kind.__name__} cannot be made: {last_line(error, None)}.", _CORRECT) from None


def check_settings(kind: type[Task], settings: Mapping[str, Any]) -> None:
    """Raises ConfigError with every problem; unknown keys are problems even for a model that would ignore them."""
    model = kind.Settings
    if model.model_config.get("extra") is None:
        model = _strict(model)
    try:
        model.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError(in_words(error, model, "settings.", {})) from None


def _strict(model: type[BaseModel]) -> type[BaseModel]:
    class Strict(model):  # type: ignore[misc, valid-type]
        model_config = ConfigDict(extra="forbid")

    return Strict


def source_hash(kind: type[Task], trained: Path | None = None) -> str:
    """sha256 of the code a task is made of: its package's modules, or its file; of the file's copy in the folder `trained` if there."""
    digest = hashlib.sha256(f"{kind.__module__}:{kind.__qualname__}".encode())
    try:
        file = Path(inspect.getfile(kind))
    except (TypeError, OSError):  # typed into an interpreter
        return digest.hexdigest()
    in_package = bool(getattr(sys.modules.get(kind.__module__), "__package__", ""))
    if trained is not None and not in_package and (trained / file.name).is_file():
        file = trained / file.name
    for path in sorted(file.parent.glob("*.py")) if in_package else [file]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _class_in_file(task: str, folder: Path) -> type[Task]:
    named, class_name = catalogue.split_file_task(task)
    path = (folder / named.name).resolve()
    if not path.is_file():
        raise UsageError(f"The run's copy of the task file, {path}, is missing.", "Begin a new run with --no-resume.")
    found = getattr(_import(path, named.parent), class_name, None)
    if found is None:
        raise BadTaskFile(f"The task file {named.name} has no class {class_name!r}.", "Name one of its classes: --task FILE.py:Class.")
    if not (isinstance(found, type) and issubclass(found, Task)):
        hint = f"Write `class {class_name}(trainerd.engine.task.Task)`."
        raise BadTaskFile(f"{class_name} in {named.name} is not a task.", hint)
    return found


def _import(path: Path, original: Path) -> Any:
    """The module of the run's copy; `original` is the folder that the person's file lies in, which is not searched."""
    name = path.stem
    if _is_taken(name, path):
        raise BadTaskFile(f"The task file cannot be called {path.name}: Python has another module {name!r}.", "Rename it, like my_task.py.")
    # In front: the file the person edits may be found too (PYTHONPATH, the current folder), and the copy is what counts.
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        traceback.print_exception(error)
        raise _not_found(path.name, error.name or "", original) from None
    except Exception as error:
        traceback.print_exception(error)
        raise BadTaskFile(f"The task file {path.name} cannot be loaded: {last_line(error, path)}.", _CORRECT) from None


def _not_found(file: str, name: str, original: Path) -> BadTaskFile:
    """That a module is not found, and what to do: one beside the person's file is there, but is not looked for there."""
    top = name.partition(".")[0]
    beside = next((path for path in (original / f"{top}.py", original / top) if top and path.exists()), None)
    if beside is None:
        hint = "A task is one file: put it into the file and start again, or install it."
        return BadTaskFile(f"The task file {file} imports {name!r}, which is not there.", hint)
    message = f"The task file {file} imports {name!r}, and Python does not look for it in {original}, where {beside.name} is."
    return BadTaskFile(message, f"A task is one file: put it into the file and start again, or start with PYTHONPATH={original} set.")


def _is_taken(name: str, path: Path) -> bool:
    """Whether a module of that name belongs to Python, to an installed package or to us: it must not be shadowed."""
    loaded = sys.modules.get(name)
    if loaded is not None:
        return getattr(loaded, "__file__", None) != str(path)
    if name in sys.stdlib_module_names:
        return True
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(spec.origin or "").parts)


def last_line(error: BaseException, path: Path | None) -> str:
    """Type and message, and the line of the person's file it happened in."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if path is not None and Path(frame.filename) == path:
            line = frame.lineno
    return f"line {line}: {text}" if line else text
