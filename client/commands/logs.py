"""`logs`: what the trainer printed, and with -f what it prints next. Must not keep a log from being rotated."""

from __future__ import annotations

import time
from pathlib import Path

import click

from trainerd.contract import lock
from trainerd.contract.errors import NothingRunning
from trainerd.contract.paths import Home

from .. import console, tail, words
from ..cli import pass_home

_LOOK_SECONDS = 0.2
_MOST_BYTES = 1 << 20


@click.command("logs")
@click.option("-n", "--lines", "num_lines", type=click.IntRange(min=0), default=50, metavar="N", show_default=True, help="Last N lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows, until the training ends.")
@pass_home
def command(home: Home, num_lines: int, follow: bool) -> None:
    """Show the end of the newest log in training_logs."""
    path = tail.newest_log(home)
    if path is None:
        raise NothingRunning(f"There is no log in {home.logs}.", f"Start with: {console.program()} start")
    begin = path.stat().st_size
    lines = tail.last_lines(path, num_lines)
    if len(lines) < num_lines:  # it may have been cut just now
        lines = [*tail.last_lines(path.with_name(f"{path.name}.1"), num_lines - len(lines)), *lines]
    for line in lines:
        _print(line)
    if follow:
        try:
            _follow(home, path, begin)
        except KeyboardInterrupt:
            pass


def _follow(home: Home, path: Path, offset: int) -> None:
    """Print what is added; a restarted trainer has a new log, which is followed next."""
    while True:
        alive = lock.is_held(home.supervisor_lock)
        offset = _print_from(path, offset)
        newest = tail.newest_log(home)
        if newest is not None and newest != path:
            _print_from(path, offset)
            console.pour(f"--- {newest.name}")
            path, offset = newest, 0
        elif not alive:
            return
        else:
            time.sleep(_LOOK_SECONDS)


def _print_from(path: Path, offset: int) -> int:
    """Print the whole lines after `offset`; returns where they end."""
    try:
        with open(path, "rb") as file:
            offset = offset if offset <= file.seek(0, 2) else 0  # it was cut
            file.seek(offset)
            content = file.read(_MOST_BYTES)
    except OSError:
        return offset
    whole = content[: content.rfind(b"\n") + 1] or (content if len(content) == _MOST_BYTES else b"")
    for line in whole.decode("utf-8", "replace").splitlines():
        _print(line)
    return offset + len(whole)


def _print(line: str) -> None:
    """A log may hold anything a program printed: what would move the cursor or name the window stays out."""
    console.pour(words.clean(line.expandtabs(), _MOST_BYTES))
