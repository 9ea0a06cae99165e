"""Which files of a person's own the code of a task comes from, beside the task's own file. Must not import or run any of them.

A person's own are those that are neither Python's, nor installed, nor ours: what lies beside the task file, on PYTHONPATH, or in a folder
that was installed to be edited. Counted are the modules that are loaded, and those that they name in any import, wherever it stands: one
inside a function may not have been reached yet.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import trainerd
from trainerd.engine.task import Task

_INSTALLED = frozenset({"site-packages", "dist-packages"})
_MOST = 1000  # files; more than that are no task's


def imported(kind: type[Task], *, whole_process: bool = True) -> dict[str, str]:
    """sha256 by path of each file but the task's, for whoever asks later whether one was edited; "" of one that is named and is nowhere,
    and would be found beside the task. `whole_process`: also of modules that are loaded and that nobody names, for whatever is loaded is
    the task's there."""
    own = file_of(kind)
    loaded = {path: name for name, module in list(sys.modules.items()) if (path := own_file(module)) is not None}
    waiting = [*(loaded if whole_process else ()), *([own] if own is not None else [])]
    found: dict[Path, str] = {}
    missing: set[Path] = set()
    while waiting and len(found) < _MOST:
        path = waiting.pop()
        if path in found:
            continue
        try:
            content = path.read_bytes()
        except OSError:
            continue  # of a zip, or deleted since
        found[path] = hashlib.sha256(content).hexdigest()
        for name in _names(content, _package(path, loaded.get(path, ""))):
            other = _found(name)
            if other is not None:
                loaded.setdefault(other, name)
                waiting.append(other)
            elif own is not None and "." not in name and _is_nowhere(name):
                missing |= {own.parent / f"{name}.py", own.parent / name / "__init__.py"}
    named = {path: "" for path in missing} | found
    return {str(path): digest for path, digest in sorted(named.items()) if path != own}


def file_of(kind: type[Task]) -> Path | None:
    """The task's own file; None for one that was typed into an interpreter."""
    try:
        return Path(inspect.getfile(kind)).resolve()
    except (TypeError, OSError):
        return None


def own_file(module: object) -> Path | None:
    """The file of a module, where it is a person's own."""
    return _own(getattr(module, "__file__", None))


def _own(file: object) -> Path | None:
    if not isinstance(file, str) or not file.endswith(".py") or file.startswith(_NOT_OWN):
        return None
    path = Path(file)
    if not _INSTALLED.isdisjoint(path.parts):
        return None
    path = path.resolve()
    return None if str(path).startswith(_NOT_OWN) or not _INSTALLED.isdisjoint(path.parts) else path


def _folders() -> tuple[str, ...]:
    """Python's own, and ours: as they are called, and as they are."""
    found = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")] + [Path(folder) for folder in trainerd.__path__]
    return tuple({f"{path}{os.sep}" for one in found for path in (one, one.resolve())})


_NOT_OWN = _folders()


def _package(path: Path, name: str) -> tuple[str, ...]:
    """The package that a relative import of this file is from, of a module that is loaded by this name."""
    parts = tuple(name.split(".")) if name else ()
    return parts if path.name == "__init__.py" else parts[:-1]


@functools.lru_cache(maxsize=256)  # a training asks twice, and a library user's process may train often
def _names(content: bytes, package: tuple[str, ...]) -> tuple[str, ...]:
    """What a file imports, as absolute names; of `from a import b` both a and a.b, for b may be a module."""
    return tuple(dict.fromkeys(_named(content, package)))


def _named(content: bytes, package: tuple[str, ...]) -> Iterator[str]:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            within = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*within, *([node.module] if node.module else [])])
            if base and bool(within) == bool(node.level):
                yield base
                yield from (f"{base}.{name.name}" for name in node.names)


def _is_nowhere(name: str) -> bool:
    if name in sys.modules or name in sys.stdlib_module_names:
        return False
    try:
        return importlib.util.find_spec(name) is None
    except (ImportError, ValueError, AttributeError):
        return False


def _found(name: str) -> Path | None:
    """Where a module lies, if it is a person's own. Packages above it are looked into, not imported."""
    top, *rest = name.split(".")
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return None
    try:
        spec: ModuleSpec | None = importlib.util.find_spec(top)
        if spec is not None and spec.has_location and _own(spec.origin) is None:
            return None  # nothing in an installed package is a person's own
        for depth in range(len(rest)):
            if spec is None or spec.submodule_search_locations is None:
                return None
            spec = PathFinder.find_spec(".".join([top, *rest[: depth + 1]]), list(spec.submodule_search_locations))
    except (ImportError, ValueError, AttributeError):
        return None
    return None if spec is None else _own(spec.origin)
