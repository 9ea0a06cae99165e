"""Which tasks and presets exist, and where their torch-free parts are. Must not import a task's model, nor run a user's file.

A built-in task is named ("cadence"); a person's own is FILE.py:Class, of which only file and class are looked for, with
`ast`: the rest is the trainer's to check, because it needs torch.
"""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from trainerd.config.nearest import nearest
from trainerd.contract.errors import UsageError, remedy

_PRESETS = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class Stated:
    """What a preset says it stays below with the default task: GPU memory as the driver sees it, and the trainer's RAM."""

    vram_bytes: int
    ram_bytes: int


STATED = {
    "quick": Stated(2_000_000_000, 4_000_000_000),
    "standard": Stated(3_000_000_000, 6_000_000_000),
    "extended": Stated(3_500_000_000, 8_000_000_000),
}
"""Held by tests: of the estimate on both devices, and of real trainings."""


@dataclass(frozen=True)
class TaskEntry:
    """A built-in task. `task` needs torch; `settings` (a pydantic model), `data` (the row reader) and `blocks` (the memory table)
    never do."""

    task: str
    settings: str
    data: str
    blocks: str
    size: str | None = None
    """How large its model will be, without torch."""

    @cached_property
    def settings_model(self) -> type[BaseModel]:
        module, _, name = self.settings.partition(":")
        model: type[BaseModel] = getattr(import_module(module), name)
        return model

    @property
    def data_module(self) -> ModuleType:
        return import_module(self.data)

    @property
    def size_module(self) -> ModuleType:
        return import_module(str(self.size))

    @property
    def blocks_module(self) -> ModuleType:
        """Its table(settings) is the model's memory table, before the data has been read."""
        return import_module(self.blocks)

    @property
    def defaults(self) -> dict[str, Any]:
        """The task's own defaults, in the form of a preset; everything else goes before them."""
        defaults: dict[str, Any] = getattr(import_module(self.settings.partition(":")[0]), "DEFAULTS", {})
        return defaults


BUILTIN = {
    "cadence": TaskEntry(
        task="trainerd.tasks.cadence.task:CadenceTask",
        settings="trainerd.tasks.cadence.settings:CadenceSettings",
        data="trainerd.tasks.cadence.data",
        size="trainerd.tasks.cadence.size",
        blocks="trainerd.tasks.cadence.blocks",
    ),
}


def is_file_task(task: str) -> bool:
    """Whether this names a person's own task, FILE.py:Class, rather than a built-in one."""
    return ".py" in task or ":" in task


def split_file_task(task: str) -> tuple[Path, str]:
    """File and class in FILE.py:Class; the last colon counts, for C:\\tasks\\my.py:MyTask has two. Raises UsageError."""
    file, colon, name = task.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"task {task!r} is not FILE.py:Class.", "Write it like --task my_task.py:MyTask.")
    return Path(os.path.expanduser(file)), name  # as a shell does: an unknown user's stays as it is


def find_file_task(task: str) -> tuple[Path, str]:
    """The absolute path and the class of FILE.py:Class, after a look that both exist. Runs nothing. Raises UsageError."""
    path, name = split_file_task(task)
    path = path.absolute()
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except FileNotFoundError:
        raise UsageError(f"The task file {path} does not exist.", "Name it as seen from this folder, or by its whole path.") from None
    except OSError as error:
        raise UsageError(f"The task file {path} cannot be read: {error.strerror}.", remedy(error)) from None
    except (SyntaxError, ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        message = f"The task file {path} is not Python{where}: {getattr(error, 'msg', error)}."
        raise UsageError(message, "Correct it, and start again.") from None
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if name not in classes and not _imported_names(tree) & {name, "*"}:
        raise UsageError(f"The task file {path} has no class {name!r}{_instead(name, classes)}", "Name it after a colon: FILE.py:Class.")
    return path, name


def find_task(task: str) -> TaskEntry:
    """The entry of a built-in task. Raises UsageError with the nearest name."""
    entry = BUILTIN.get(task)
    if entry is None:
        own = "Your own task is FILE.py:Class, like --task my_task.py:MyTask."
        raise UsageError(f"There is no task {task!r}{_instead(task, BUILTIN)}", own)
    return entry


def preset_names() -> list[str]:
    """The presets that come with trainerd."""
    return sorted(path.stem for path in _PRESETS.glob("*.yml"))


def preset_file(name: str) -> Path:
    """The file of a preset. Raises UsageError with the nearest name."""
    names = preset_names()
    if name not in names:
        raise UsageError(f"There is no preset {name!r}{_instead(name, names)}", "A file of your own goes to --config.")
    return _PRESETS / f"{name}.yml"


def _imported_names(tree: ast.Module) -> set[str]:
    """Names a file takes from elsewhere: a task class may come from a module beside it, which only the trainer can tell."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _instead(name: str, known: Any) -> str:
    close = nearest(name, known)
    if close:
        return f"; did you mean {close!r}?"
    return f"; there is {', '.join(known)}." if known else "."
