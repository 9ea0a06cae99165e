"""The house rules that hold everything else up: who may import whom, and that torch stays out of client and supervisor."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "accelerate", "bitsandbytes", "transformers", "peft", "diffusers", "numpy"}
TORCH_FREE_TASK_FILES = ("settings", "data", "blocks")
BASE = {"trainerd.contract"}
MAY_IMPORT = {
    "trainerd.contract": BASE,
    "trainerd.config": BASE | {"trainerd.config"},
    "trainerd.machine": BASE | {"trainerd.machine"},
    "trainerd.memory": BASE | {"trainerd.config", "trainerd.memory"},
    "trainerd.supervisor": BASE | {"trainerd.config", "trainerd.machine", "trainerd.memory", "trainerd.supervisor"},
    "trainerd.engine": BASE | {"trainerd.config", "trainerd.machine", "trainerd.memory", "trainerd.engine"},
    "trainerd.tasks": BASE | {"trainerd.config", "trainerd.memory", "trainerd.engine", "trainerd.tasks"},
    "client": BASE | {"trainerd.config", "trainerd.machine", "trainerd.memory", "client"},
}
MAY_USE_TORCH = ("trainerd.engine", "trainerd.tasks")
MAY_READ_TASK_FILES = ("client", "trainerd.config", "trainerd.memory")
FILES = sorted(path for top in ("trainerd", "client") for path in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    return next((room for room in MAY_IMPORT if module == room or module.startswith(f"{room}.")), None)


def imported(path: Path) -> Iterator[str]:
    """The full names a file imports, anywhere in it."""
    module = module_of(path)
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*stem, *([node.module] if node.module else [])])
            # `from trainerd import engine` names a module, `from trainerd.contract import status` as well.
            yield from (f"{name}.{alias.name}" for alias in node.names)


def allowed(module: str, name: str) -> bool:
    room, other = room_of(module), room_of(name)
    if other is None or room is None:
        return True
    if other in MAY_IMPORT[room]:
        return True
    parts = name.split(".")
    task_file = len(parts) > 3 and parts[:2] == ["trainerd", "tasks"] and parts[3] in TORCH_FREE_TASK_FILES
    return task_file and room.startswith(MAY_READ_TASK_FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_one_the_table_allows(path: Path) -> None:
    """DESIGN section 4: a package imports only the packages below it; torch only in the engine and in tasks."""
    module = module_of(path)
    wrong = [name for name in imported(path) if not allowed(module, name)]
    if not module.startswith(MAY_USE_TORCH):
        wrong += [name for name in imported(path) if name.partition(".")[0] in HEAVY]
    if room_of(module) == "trainerd.contract":
        wrong += [n for n in imported(path) if n.partition(".")[0] not in {*sys.stdlib_module_names, "trainerd", "_winapi"}]
    assert wrong == []


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_hold_a_docstring_and_nothing_else(path: Path) -> None:
    """Importing a package costs nothing."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{path} holds more than its docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_with_what_it_does(path: Path) -> None:
    """A newcomer reads the first sentence of a file and knows whether to read on."""
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def loaded_after(modules: list[str]) -> set[str]:
    """The top-level packages in a fresh interpreter after importing `modules`."""
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("room", [room for room in MAY_IMPORT if room not in MAY_USE_TORCH])
def test_no_package_without_torch_loads_it(room: str) -> None:
    """Torch never reaches client or supervisor, by any path: every module of the package, in one fresh interpreter."""
    here = "_windows" if sys.platform != "win32" else "_linux"
    modules = [module_of(path) for path in FILES if room_of(module_of(path)) == room and not path.stem.endswith(here)]
    assert not loaded_after([m for m in modules if not m.endswith("__main__")]) & HEAVY


def test_the_torch_free_files_of_tasks_are_so() -> None:
    """settings.py and data.py of every task can be imported by the client."""
    files = [p for p in FILES if p.parts[-3] == "tasks" and p.stem in TORCH_FREE_TASK_FILES]
    assert files
    assert not loaded_after([module_of(path) for path in files]) & HEAVY


def test_status_imports_next_to_nothing() -> None:
    """The short way of `status` has a tenth of a second: no click, rich, psutil, pydantic, platformdirs."""
    too_much = {"click", "rich", "psutil", "pydantic", "platformdirs", "ruamel", "asyncio", "watchdog", "subprocess", "logging"}
    assert not loaded_after(["client.main", "client.glance"]) & (too_much | HEAVY)


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    """The checks above can fail."""
    assert not allowed("client.main", "trainerd.engine.loop")
    assert not allowed("trainerd.supervisor.loop", "client.console")
    assert not allowed("trainerd.supervisor.loop", "trainerd.tasks.cadence.settings.CadenceSettings")
    assert not allowed("trainerd.config.load", "trainerd.tasks.cadence.task.CadenceTask")
    assert allowed("trainerd.config.load", "trainerd.tasks.cadence.settings.CadenceSettings")
