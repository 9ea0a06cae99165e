"""Sleep and session end as Windows tells them: messages to the supervisor's hidden window. Battery and real sleep are not here."""

from __future__ import annotations

import ctypes
import sys
import time
from ctypes import wintypes
from pathlib import Path
from typing import Any

import pytest

from tests.supervised import RUN, Daemon, journal, wait_for
from trainerd.contract import runs, status
from trainerd.contract.paths import Home
from trainerd.supervisor.opening import committed_steps

assert sys.platform == "win32"

QUERYENDSESSION, ENDSESSION, POWERBROADCAST = 0x11, 0x16, 0x218
SUSPEND, RESUMED = 0x4, 0x12
LONG = {"steps": 100_000, "every": 10**6, "pause": 0.05}
_user32 = ctypes.WinDLL("user32", use_last_error=True)
_Enumerate = ctypes.WINFUNCTYPE(wintypes.BOOL, wintypes.HWND, wintypes.LPARAM)
_user32.SendMessageTimeoutW.restype = ctypes.c_ssize_t
_user32.SendMessageTimeoutW.argtypes = [
    *(wintypes.HWND, wintypes.UINT, wintypes.WPARAM, wintypes.LPARAM, wintypes.UINT, wintypes.UINT, ctypes.POINTER(ctypes.c_size_t))
]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    root = tmp_path / "ein höme with spaces"
    root.mkdir()
    return Home(root)


def window_of(pid: int) -> int | None:
    """The top-level window of ours in a process: a broadcast would reach it."""
    found: list[int] = []

    def look(window: int, _: int) -> bool:
        name, owner = ctypes.create_unicode_buffer(200), wintypes.DWORD()
        _user32.GetClassNameW(wintypes.HWND(window), name, 200)
        _user32.GetWindowThreadProcessId(wintypes.HWND(window), ctypes.byref(owner))
        if owner.value == pid and name.value.startswith("trainerd."):
            found.append(window)
        return True

    _user32.EnumWindows(_Enumerate(look), 0)
    return found[0] if found else None


def tells(window: int, message: int, first: int) -> tuple[int, float]:
    """Send a message as the system does; its answer, and how long that took."""
    answer, began = ctypes.c_size_t(), time.monotonic()
    assert _user32.SendMessageTimeoutW(window, message, first, 0, 0, 20_000, ctypes.byref(answer)), "no answer"
    return answer.value, time.monotonic() - began


def window(daemon: Daemon) -> int:
    daemon.until_step(3)
    found: list[int | None] = []
    wait_for(lambda: found.append(window_of(daemon.process.pid)) or found[-1], 10, "the hidden window")
    assert found[-1] is not None
    assert not _user32.IsWindowVisible(wintypes.HWND(found[-1]))
    return found[-1]


def events(home: Home, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal(home) if line["kind"] == kind]


def test_before_sleep_a_checkpoint_is_written(home: Home) -> None:
    """The message is answered when the checkpoint is acknowledged, well within the two seconds there are."""
    with Daemon(home, LONG) as daemon:
        hidden = window(daemon)
        for times in (1, 2):
            answer, seconds = tells(hidden, POWERBROADCAST, SUSPEND)
            assert answer == 1 and seconds < 1.7 and len(committed_steps(home.run(RUN).checkpoints)) == times
            tells(hidden, POWERBROADCAST, RESUMED)
        wait_for(lambda: len(events(home, "woke")) == 2, 5, "the waking to be noted")
        assert [line["saved"] for line in events(home, "before sleep")] == [True, True]
        assert daemon.reading().state == status.RUNNING


def test_a_save_that_takes_too_long_does_not_hold_up_sleep(home: Home) -> None:
    """After two seconds Windows sleeps anyway: the message is answered before."""
    with Daemon(home, {**LONG, "save_seconds": 4}) as daemon:
        _, seconds = tells(window(daemon), POWERBROADCAST, SUSPEND)
        assert 1.5 < seconds < 2.5


def test_at_the_end_of_the_session_it_saves_before_it_agrees(home: Home) -> None:
    """Asked: yes, at once. Told: answered when the checkpoint is there; the run stays wanted. A shutdown called off changes nothing."""
    with Daemon(home, {**LONG, "save_seconds": 1}) as daemon:
        hidden = window(daemon)
        answer, seconds = tells(hidden, QUERYENDSESSION, 0)
        assert answer == 1 and seconds < 0.8
        assert tells(hidden, ENDSESSION, 0)[1] < 0.8  # called off
        wait_for(lambda: len(committed_steps(home.run(RUN).checkpoints)) == 1, 10, "what had begun to be saved")
        daemon.until_step(committed_steps(home.run(RUN).checkpoints)[0] + 1)  # or there would be nothing new to save
        assert tells(hidden, QUERYENDSESSION, 0)[0] == 1
        tells(hidden, ENDSESSION, 1)
        assert len(committed_steps(home.run(RUN).checkpoints)) == 2
        wait_for(lambda: len(events(home, "before shutdown")) == 2, 5, "the notes")
        assert all(line["saved"] for line in events(home, "before shutdown"))
    record = runs.read(home, RUN)
    assert (record.wanted, record.outcome) == (runs.WANTED_RUNNING, None)


def test_it_is_kept_awake_while_it_trains(home: Home) -> None:
    """Through SetThreadExecutionState, in a thread that lives as long; the daemon ends as quickly as ever."""
    pytest.importorskip("wakepy")
    with Daemon(home, LONG) as daemon:
        daemon.until_step(3)
        wait_for(lambda: events(home, "kept awake"), 10, "the note")
        assert events(home, "kept awake")[0]["by"] == "SetThreadExecutionState"
        daemon.ask("stop")
        assert daemon.process.wait(20) == 0
