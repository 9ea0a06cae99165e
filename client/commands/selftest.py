"""`selftest`: proves on this machine that kills and damage lose nothing. The trial runs in a child with torch, in a temporary home.

Must not import torch, nor touch the person's own home.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import click

from trainerd.contract import interpreter
from trainerd.contract.errors import EXIT_DONE, EXIT_FAILED, Refused, RunFailed

from .. import console, gpu_driver, packages, verdict
from ..seconds import Seconds

_GONE_SECONDS = 10.0
_ATTEMPTS = 3
_LINE_SECONDS = 5.0
_LAST_WORDS_BYTES = 2000
Event = dict[str, Any]


class Shown(Protocol):
    """Whoever shows how it goes."""

    def update(self, event: Event) -> None: ...


@click.command("selftest")
@click.option("--kills", type=click.IntRange(1, 1_000_000), metavar="N", help="Kill that often (50; 12 where every life is a new process).")
@click.option("--seconds", type=Seconds(1, 86_400), metavar="S", help="Kill no more after S seconds, and finish.")
@click.option("--seed", type=click.IntRange(0, 2**31), metavar="N", help="Repeat a trial: the same aims, the same damage.")
@click.option("--keep", is_flag=True, help="Keep the temporary home, for a bug report. A failed trial is kept anyway.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def command(kills: int | None, seconds: float | None, seed: int | None, keep: bool, as_json: bool) -> int:
    """Kill and damage a small training again and again, and compare it bit for bit with an undisturbed one. Exit code 0 or 4; 5 when this
    machine has no room for it just now."""
    seed = seed if seed is not None else time.time_ns() % 1_000_000
    words = ["--seed", str(seed)]
    for name, value in (("--kills", kills), ("--seconds", seconds)):
        words += [name, str(value)] if value is not None else []
    home = _make_home()
    found: Event | None = None
    try:
        with _shown(as_json) as shown:
            found = _try(home, words, shown)
        keep = keep or not found["passed"]
    finally:
        if not keep:
            _remove(home)
    kept = str(home) if keep else None
    if as_json:
        console.say(json.dumps({**found, "home": kept}, indent=1))
    else:
        for line in verdict.lines(found, kept):
            console.say(line)
    return EXIT_DONE if found["passed"] else EXIT_FAILED


def _make_home() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="trainerd-selftest-"))
    except OSError as error:
        hint = "Name a folder with space in TMPDIR (Windows: TEMP)."
        raise Refused(f"No temporary folder can be made: {error.strerror}.", hint) from None


def _remove(home: Path) -> None:
    """All of it; a scanner on Windows may hold a file for a moment."""
    deadline = time.monotonic() + 5
    while True:
        shutil.rmtree(home, ignore_errors=True)
        if not home.exists() or time.monotonic() > deadline:
            return
        time.sleep(0.1)


def _try(home: Path, words: list[str], shown: Shown) -> Event:
    """Run the trial; returns its verdict. Raises RunFailed when it ended without one, Refused when there is no room for it."""
    errors = home / "selftest-errors.log"
    child = interpreter.command("trainerd.engine.selftest", "--home", str(home), *words, *_gpu())
    with open(errors, "wb") as log:
        process = subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=interpreter.environment())
    try:
        assert process.stdout is not None
        for line in process.stdout:
            event: Event = json.loads(line)
            kind = event.pop("event")
            if kind == "verdict":
                return event
            if kind == "refused":
                raise Refused(f"The selftest cannot run just now. {event['why']}", "Close some programs, and try again.")
            shown.update(event)
    finally:
        _end(process)
    text = errors.read_bytes()[-_LAST_WORDS_BYTES:].decode("utf-8", "replace").strip()
    raise RunFailed(f"The trial ended with exit code {process.returncode} and without a verdict.", text)


def _gpu() -> list[str]:
    """The first GPU; whether torch can use it is the child's to see."""
    devices = gpu_driver.devices()
    torch = packages.torch_facts()
    return ["--gpu", devices[0].uuid, devices[0].name] if devices and torch is not None else []


def _end(process: subprocess.Popen[bytes]) -> None:
    """The end of its stdin makes it leave, with whatever it has started."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    for _ in range(_ATTEMPTS):
        try:
            process.wait(_GONE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            process.kill()
        except KeyboardInterrupt:
            continue  # it is leaving already
    console.complain(f"The trial (process {process.pid}) cannot be ended: it is stuck in a driver or on a disk; a reboot ends it.")


@contextmanager
def _shown(as_json: bool) -> Iterator[Shown]:
    with nullcontext(_Nothing()) if as_json else _Bar() if console.is_terminal(sys.stdout) else nullcontext(_Lines()) as shown:
        yield shown


class _Nothing:
    def update(self, event: Event) -> None:
        """For --json."""


class _Lines:
    """A line at the beginning and then every few seconds."""

    def __init__(self) -> None:
        console.say("Importing torch ...")
        self._last = 0.0
        self._phase = ""

    def update(self, event: Event) -> None:
        now = time.monotonic()
        if now - self._last >= _LINE_SECONDS or event["phase"] != self._phase:
            self._last, self._phase = now, event["phase"]
            console.say(f"{event['kills']} of {event['of']}: {verdict.progress(event)}")


class _Bar:
    """A bar over the kills, and what is going on beside it."""

    def __enter__(self) -> _Bar:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        counted, told = TextColumn("{task.completed:.0f} of {task.total:.0f}"), TextColumn("{task.description}")
        self._progress = Progress(BarColumn(30), counted, TimeElapsedColumn(), told, transient=True)
        self._task = self._progress.add_task("importing torch", total=1)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, event: Event) -> None:
        self._progress.update(self._task, total=event["of"], completed=event["kills"], description=verdict.progress(event))
