"""What RAM, GPU memory and disk can be had back, and who holds the rest. Must not end or slow any process, of ours or of others.

Honest: pages of files that the system keeps count as available already; what helps is closing programs, and that is the person's.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainerd.contract import files, lock, status
from trainerd.contract.errors import Refused, remedy
from trainerd.contract.paths import Home
from trainerd.machine import page_cache, programs
from trainerd.machine.memory import process_tree_bytes, ram
from trainerd.machine.programs import Program

from . import console, gpu_driver

_SHOWN = 8
_WORTH_CLOSING_BYTES = 200_000_000
_OURS = ("-m trainerd.engine", "-m trainerd.supervisor")
_KEPT = ("profiles",)  # measured once per machine: half a minute to make anew


@dataclass(frozen=True)
class Level:
    """What is in use at one moment."""

    ram_used_bytes: int
    gpu_used_bytes: int | None
    """Of all GPUs together; None without one."""


@dataclass(frozen=True)
class Holder:
    """A process that holds GPU memory. `ours`: of the training in this home."""

    name: str
    pid: int
    used_bytes: int | None
    ours: bool


@dataclass(frozen=True)
class Elsewhere:
    """A training of another home of this person's: it is no program to close, for its own `pause` gives all back."""

    home: str
    own_bytes: int


@dataclass
class Freed:
    """What was done, and what was seen."""

    before: Level
    after: Level
    cached_bytes: int | None = None
    """Pages of our own files that the system let go of; None where that cannot be asked."""
    cache_bytes: int = 0
    """Disk given back: prepared data and traces, when that was asked for."""
    in_cache_bytes: int = 0
    """Disk that --cache would give back."""
    training_bytes: int | None = None
    """RAM of the training in this home, None when there is none."""
    state: str = ""
    gpu_holders: list[Holder] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    elsewhere: list[Elsewhere] = field(default_factory=list)

    @property
    def closable(self) -> list[Program]:
        """Programs of this person's that hold enough to be worth closing."""
        found = (program for program in self.programs if program.yours and not _is_training(program))
        return [program for program in found if program.own_bytes >= _WORTH_CLOSING_BYTES]

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {"schema": 1, **asdict(self), "could_close": [program.name for program in self.closable]}


def free(home: Home, with_cache: bool) -> Freed:
    """Give back what is ours and not needed, then look who holds what. Raises Refused for a cache in use."""
    reading = status.read(home)
    if with_cache and (reading.alive or lock.is_held(home.trainer_lock)):  # a trainer may outlive its supervisor for a while
        message = "The cache is in use: a training is live in this home."
        raise Refused(message, f"End it first ({console.program()} stop), or leave --cache away.")
    before = _level()
    cached = _let_go(home, reading.alive)
    removed = _remove(home.cache) if with_cache else 0
    after = _level()
    shown = reading.status
    pids = [p for p in (shown.trainer.pid, shown.supervisor.pid if shown.supervisor else None) if p] if shown and reading.alive else []
    ours = programs.tree(pids)
    heaviest = programs.heaviest(_SHOWN, {*ours, os.getpid()})
    return Freed(
        before,
        after,
        cached_bytes=cached,
        cache_bytes=removed,
        in_cache_bytes=_could_go(home.cache),
        training_bytes=process_tree_bytes(pids[0]) if pids else None,
        state=reading.state,
        gpu_holders=[Holder(programs.name_of(p.pid) or "n/a", p.pid, p.used_bytes, p.pid in ours) for p in gpu_driver.processes()],
        programs=heaviest,
        elsewhere=[one for program in heaviest if program.yours and _is_training(program) for one in _homes(program)],
    )


def _is_training(program: Program) -> bool:
    """Whether it is a trainer or its supervisor, or a process of theirs."""
    return any(module in program.name for module in _OURS)


def _homes(program: Program) -> Iterator[Elsewhere]:
    """The homes these processes are of, with what each holds; a supervisor holds next to nothing."""
    for pid in program.pids:
        words, held = programs.words_of(pid), process_tree_bytes(pid)
        if "--home" in words[:-1] and held is not None and held >= _WORTH_CLOSING_BYTES:
            yield Elsewhere(words[words.index("--home") + 1], held)


def _level() -> Level:
    used = [one.used_bytes for one in gpu_driver.devices() if one.used_bytes is not None]
    return Level(ram().used_bytes, sum(used) if used else None)


def _let_go(home: Home, alive: bool) -> int | None:
    """Pages of our files given back to the system. What a live training reads and writes now stays where it is."""
    folders = [home.models, home.logs] if alive else [home.checkpoints, home.models, home.runs, home.logs, home.cache]
    freed: int | None = None
    for path in _files(folders):
        kept = page_cache.kept_bytes(path)
        if not kept:
            freed = freed if kept is None else freed or 0
            continue
        try:
            page_cache.let_go(path)
        except OSError:
            continue  # pruned between two looks
        freed = (freed or 0) + max(0, kept - (page_cache.kept_bytes(path) or 0))
    return freed


def _files(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        for path in folder.rglob("*") if not files.is_link(folder) else ():
            if _file_size(path) and not files.is_link(path):
                yield path


def _removable(cache: Path) -> list[Path]:
    """Entries of the cache that are made anew when they are needed; never a link. Raises OSError."""
    if files.is_link(cache) or not cache.is_dir():
        return []
    return [path for path in sorted(cache.iterdir()) if path.name not in _KEPT and not files.is_link(path)]


def _remove(cache: Path) -> int:
    """Prepared data and traces; the next training that needs them makes them again. Raises Refused when it may not look there."""
    freed = 0
    try:
        found = _removable(cache)
    except OSError as error:
        raise Refused(f"The cache {cache} cannot be read: {error.strerror or error}.", remedy(error)) from None
    for path in found:
        there = _size(path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            files.remove(path)
        freed += there - (_size(path) if path.exists() else 0)
    return freed


def _could_go(cache: Path) -> int:
    try:
        return sum(_size(path) for path in _removable(cache))
    except OSError:
        return 0  # whoever may not look there can delete nothing


def _size(path: Path) -> int:
    """Of a file, or of all files below a folder that can be seen."""
    if not path.is_dir():
        return _file_size(path)
    return sum(_file_size(each) for each in path.rglob("*"))


def _file_size(path: Path) -> int:
    try:
        found = path.stat()
    except OSError:
        return 0  # gone between two looks, or not ours to see
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
