"""A trainer that cannot be started because the machine lacks something for now is waited for: no death, however long it takes."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.disks import on_a_small_disk
from tests.supervised import RUN, journal, starts, supervise_here, wait_for
from trainerd.contract import runs, status
from trainerd.contract.paths import Home
from trainerd.supervisor import aftermath, logs
from trainerd.supervisor.restart import MAX_DEATHS

_MORE_THAN_ENOUGH = MAX_DEATHS + 4


@contextmanager
def supervised(home: Home, *scripts: dict[str, object]) -> Iterator[mock.Mock]:
    """A supervisor in a thread; what opens logs is given, to be counted. Waits for its end."""
    with mock.patch.object(logs, "open_new", wraps=logs.open_new) as opened:
        thread = threading.Thread(target=supervise_here, args=(home, *scripts), daemon=True)
        thread.start()
        yield opened
        thread.join(30)
        assert not thread.is_alive()


def until_tried(opened: mock.Mock) -> None:
    """More often than a trainer may die."""
    first = opened.call_count
    wait_for(lambda: opened.call_count > first + _MORE_THAN_ENOUGH, 20, "enough attempts")


def written(home: Home) -> tuple[str, str]:
    """State and reason as they stand in the file: this supervisor holds no lock."""
    found = status.read(home).status
    return (found.state, str(found.reason)) if found else ("", "")


def no_room_for_a_log(folder: Path) -> None:
    """What happens in test_a_log_that_has_no_room: the logs lie on a file system that takes one file."""
    home = Home(folder / "home")
    home.logs.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=2", "logs", str(home.logs)], check=True)
    with supervised(home, {"at": 7, "do": "exit:1"}, {}) as opened:
        wait_for(lambda: written(home)[0] == status.WAITING, 20, "waiting")
        until_tried(opened)
        state, reason = written(home)
        assert state == status.WAITING and "The disk is full" in reason, reason
        assert runs.read(home, RUN).outcome is None
        next(home.logs.glob("*.log")).unlink()
    assert status.read(home).state == status.COMPLETED
    assert len(starts(home)) == 2
    kinds = [line["kind"] for line in journal(home)]
    assert kinds.count("start waits") == 1 and kinds.count("death") == 1 and "cannot start" not in kinds, kinds


def no_room_for_anything(folder: Path) -> None:
    """What happens in test_a_home_without_any_room: not one more file can be made in the whole home, not even the status."""
    home = Home(folder / "home")
    home.root.mkdir()
    taken: list[Path] = []

    def fill() -> None:
        while True:
            taken.append(folder / f"taken-{len(taken)}")
            try:
                taken[-1].touch()
            except OSError as error:
                assert error.errno == errno.ENOSPC
                taken.pop()
                return

    with supervised(home, {"pause": 0.05, "steps": 30}) as opened:
        wait_for(lambda: len(starts(home)) == 1 and list(home.checkpoints.glob("*/*.json")), 20, "a checkpoint")
        wait_for(lambda: (fill(), not home.ballast.exists())[1], 20, "the reserve to be given up")  # its place is taken, too
        fill()
        until_tried(opened)
        assert len(starts(home)) == 1, "another trainer was started"
        for path in taken:
            path.unlink()
    assert status.read(home).state == status.COMPLETED
    assert not [line for line in journal(home) if line["kind"] == "cannot start"]


def test_a_log_that_has_no_room(tmp_path: Path) -> None:
    """On a full disk that takes no new log the run waits, says so, and goes on by itself when there is room."""
    on_a_small_disk(tmp_path / "small", no_room_for_a_log, "8m")


def test_a_home_without_any_room(tmp_path: Path) -> None:
    """The same when nothing at all can be created: the supervisor outlives it, and the run ends as it should."""
    on_a_small_disk(tmp_path / "small", no_room_for_anything, "8m,nr_inodes=64")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "The disk is full"),
        (OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no process left"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "no memory"),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT)), None),
        (ValueError("embedded null byte"), None),
    ],
    ids=["full", "no process", "no memory", "no program", "no words"],
)
def test_what_is_waited_for_and_what_is_not(tmp_path: Path, error: Exception, words: str | None) -> None:
    """A lack that passes by itself is waited for; a program that is not there will not be there the sixth time either."""
    found = aftermath._lacking(error, Home(tmp_path))
    assert found is None if words is None else words in str(found)
