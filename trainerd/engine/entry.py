"""What the trainer and its preparing child have in common: their pipes, their run, and what an error means. Must not import torch."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from trainerd.contract import runs, wire
from trainerd.contract.errors import (
    ConfigError,
    ExportFailed,
    NoGoodCheckpoint,
    NotExported,
    NotFinite,
    Refused,
    TrainerdError,
    Unreadable,
    UsageError,
)
from trainerd.contract.paths import Home, RunPaths
from trainerd.contract.runs import RunRecord

if TYPE_CHECKING:
    from trainerd.config.model import RunConfig

_EXIT_CRASHED = 1
EXIT_DISK_FULL = 28
"""Of the preparing child: it can be tried again when there is space."""
# Errors of the moment rather than of the program: another try may go better. torch says in words what is the device's.
_OF_THE_MOMENT = (OSError, MemoryError, TrainerdError, EOFError)
_OF_THE_DEVICE = re.compile(r"CUDA|cuDNN|CUBLAS|out of memory|allocate memory|DataLoader worker|driver", re.IGNORECASE)


def parse(program: str, arguments: list[str] | None) -> argparse.Namespace:
    """--home, --run, --before-step."""
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--before-step", type=int, default=None)
    return parser.parse_args(arguments)


class _Patient:
    """A stream that forgives the disk: what a task prints must not end a training because the log cannot take it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def take_pipes() -> tuple[int, int]:
    """(commands, events): descriptors of what were stdin and stdout. From here on prints land in the log, and no child
    process inherits the pipes."""
    commands, events = os.dup(0), os.dup(1)
    sys.stdout, sys.stderr = cast(TextIO, _Patient(sys.stdout)), cast(TextIO, _Patient(sys.stderr))
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return commands, events


@dataclass
class Run:
    """The run this process is for."""

    home: Home
    paths: RunPaths
    record: RunRecord

    @cached_property
    def config(self) -> RunConfig:
        """Raises ConfigError: the record was written by another version, or by hand."""
        from pydantic import ValidationError  # not before HELLO: it takes a while

        from trainerd.config.model import RunConfig
        from trainerd.config.problems import in_words

        try:
            return RunConfig.model_validate(self.record.config)
        except ValidationError as error:
            raise ConfigError(in_words(error, RunConfig, "", {})) from None


def read_run(root: Path, name: str) -> Run:
    """The run and its record. Raises UsageError when there is no such run, Unreadable when its record is damaged."""
    if not runs.valid_name(name):
        raise UsageError(f"{name!r} is not the name of a run.")
    home = Home(root.absolute())
    try:
        record = runs.read(home, name)
    except FileNotFoundError:
        raise UsageError(f"There is no run {name!r} in {home.root}.") from None
    return Run(home, home.run(name), record)


class PreparingFoundNoRoom(Exception):
    """The preparing process ended because the disk is full."""


class PreparingFailed(TrainerdError):
    """The preparing process ended badly; `code` is what the trainer should end with."""

    def __init__(self, code: int, told: bool) -> None:
        ending = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        super().__init__(f"Preparing the data ended {ending}.", "The log has the details.")
        self.code = wire.EXIT_PERMANENT if code == wire.EXIT_PERMANENT else _EXIT_CRASHED
        self.told = told
        """Whether its own EXCEPTION event was passed on."""


def of_the_moment(error: BaseException) -> bool:
    """Whether another try may go better: it was the disk, the memory or the device, and not the program."""
    if isinstance(error, _OF_THE_MOMENT) or not isinstance(error, Exception):
        return True
    return _OF_THE_DEVICE.search(f"{type(error).__name__}: {error}") is not None


def verdict(error: BaseException, *, retry_helps: bool) -> tuple[int, dict[str, Any]]:
    """The exit code an error ends in, and the fields of its EXCEPTION event.

    `retry_helps` is False while nothing was ever trained: then an error of the program, a wrong shape in its first step, would
    only come again.
    """
    if isinstance(error, NoGoodCheckpoint):
        code = wire.EXIT_NO_CHECKPOINT
    elif isinstance(error, NotFinite):
        code = wire.EXIT_PERMANENT if error.for_good else _EXIT_CRASHED
    elif isinstance(error, (UsageError, Unreadable, Refused, NotExported, ExportFailed)) or not (retry_helps or of_the_moment(error)):
        code = wire.EXIT_PERMANENT
    else:
        code = _EXIT_CRASHED
    text = str(error).strip() or traceback.format_exception_only(type(error), error)[-1].strip()
    return code, {"type": type(error).__name__, "text": text[-2000:], "permanent": code != _EXIT_CRASHED}
