"""Sleep, shutdown and staying awake, against a logind on a bus of our own and a real supervisor over the fake trainer."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

if sys.platform == "win32":
    pytest.skip("tests/windows has its own", allow_module_level=True)

from tests import logind
from tests.logind import Bus, Logind
from tests.supervised import RUN, Daemon, journal, wait_for
from trainerd.contract import runs, status
from trainerd.contract.paths import Home
from trainerd.machine import awake, standby
from trainerd.supervisor.opening import committed_steps
from trainerd.supervisor.power import stays_awake

pytestmark = pytest.mark.skipif(bool(logind.missing()), reason=logind.missing())
LONG = {"steps": 100_000, "every": 10**6, "pause": 0.01}
DELAYS = "sleep:shutdown"


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    """A system bus of our own; the session has none."""
    found = Bus(tmp_path)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", found.address)
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS")
    yield found
    found.close()


def config(keep_awake: str) -> dict[str, Any]:
    return {"task": "fake", "seed": 1, "polite": {"keep_awake": keep_awake}}


def events(home: Home, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal(home) if line["kind"] == kind]


@pytest.mark.parametrize(("what", "kind"), [("PrepareForSleep", "before sleep"), ("PrepareForShutdown", "before shutdown")])
def test_before_sleep_and_shutdown_a_checkpoint_is_written(home: Home, bus: Bus, what: str, kind: str) -> None:
    """The machine waits until the checkpoint is acknowledged, and not longer; after waking the next sleep waits again."""
    system = Logind(bus)
    with Daemon(home, LONG, config=config("off")) as daemon:
        daemon.until_step(3)
        wait_for(lambda: system.held(DELAYS), 10, "the delay lock")
        for times in (1, 2):
            assert len(committed_steps(home.run(RUN).checkpoints)) == times - 1
            system.announces(what, True)
            wait_for(lambda: not system.held(DELAYS), 4, "the machine to be let go")
            assert len(committed_steps(home.run(RUN).checkpoints)) == times  # already there
            system.announces(what, False)
            wait_for(lambda: system.held(DELAYS), 5, "the next lock")
        wait_for(lambda: len(events(home, "woke")) == 2, 5, "the waking to be noted")
        assert [line["saved"] for line in events(home, kind)] == [True, True]
        assert all(line["seconds"] < 4 for line in events(home, kind)) and daemon.reading().state == status.RUNNING
        assert [lock.mode for lock in system.locks] == ["delay"] * 3


def test_a_save_that_takes_too_long_holds_nobody_up(home: Home, bus: Bus) -> None:
    """No time for it: after what logind allows the lock is let go, that is noted, and the training is not harmed."""
    system = Logind(bus, delay_seconds=0.5)
    with Daemon(home, {**LONG, "save_seconds": 1.5}, config=config("off")) as daemon:
        daemon.until_step(3)
        wait_for(lambda: system.held(DELAYS), 10, "the delay lock")
        system.announces("PrepareForSleep", True)
        wait_for(lambda: not system.held(DELAYS), 3, "the machine to be let go")
        wait_for(lambda: events(home, "before sleep"), 3, "the note")
        assert events(home, "before sleep")[0]["saved"] is False
        system.announces("PrepareForSleep", False)
        daemon.until(lambda r: r.status is not None and r.status.checkpoint is not None)
        assert daemon.reading().state == status.RUNNING


def test_with_nothing_to_save_the_machine_is_let_go_at_once(home: Home, bus: Bus) -> None:
    """Paused: no trainer, no waiting. A supervisor that ends holds nothing either."""
    system = Logind(bus)
    with Daemon(home, LONG, config=config("off")) as daemon:
        daemon.until_step(3)
        daemon.ask("pause")
        daemon.until_state(status.PAUSED)
        wait_for(lambda: system.held(DELAYS), 10, "the delay lock")
        system.announces("PrepareForSleep", True)
        wait_for(lambda: not system.held(DELAYS), 1, "the machine to be let go")
        system.announces("PrepareForSleep", False)
        wait_for(lambda: system.held(DELAYS), 5, "the next lock")
        daemon.ask("stop")
        assert daemon.process.wait(60) == 0
    assert not system.held(DELAYS)


def test_shutdown_from_announcement_to_sigterm_keeps_the_run_wanted(home: Home, bus: Bus) -> None:
    """First the announcement saves, then SIGTERM ends: the trainer commits once more and leaves, and the run is resumed at log-in."""
    system = Logind(bus)
    with Daemon(home, LONG, config=config("off")) as daemon:
        daemon.until_step(3)
        wait_for(lambda: system.held(DELAYS), 10, "the delay lock")
        system.announces("PrepareForShutdown", True)
        wait_for(lambda: not system.held(DELAYS), 4, "the machine to be let go")
        os.kill(daemon.process.pid, signal.SIGTERM)
        assert daemon.process.wait(60) == 0
    record = runs.read(home, RUN)
    assert (record.wanted, record.outcome) == (runs.WANTED_RUNNING, None)
    assert len(committed_steps(home.run(RUN).checkpoints)) == 2


def test_it_stays_awake_exactly_while_it_trains(home: Home, bus: Bus) -> None:
    """Held while training, let go by pause, taken again by resume, gone with the supervisor; `off` never takes it."""
    system = Logind(bus)
    with Daemon(home, LONG, config=config("on")) as daemon:
        daemon.until_step(3)
        wait_for(lambda: system.held("idle"), 10, "the idle lock")
        assert {lock.mode for lock in system.held("idle")} == {"block"}
        daemon.ask("pause")
        daemon.until_state(status.PAUSED)
        wait_for(lambda: not system.held("idle"), 3, "the idle lock to go")
        daemon.ask("resume")
        daemon.until_state(status.RUNNING)
        wait_for(lambda: len(system.held("idle")) == 1, 5, "the idle lock again")
        daemon.process.kill()
        wait_for(lambda: not system.held("idle") and not system.held(DELAYS), 5, "everything to go with it")
    assert [line["by"] for line in events(home, "kept awake")] == ["logind", "logind"]


@pytest.mark.parametrize(
    ("level", "state", "plugged", "expected"),
    [
        ("auto", status.RUNNING, True, True),
        ("auto", status.RUNNING, None, True),
        ("auto", status.RUNNING, False, False),
        ("auto", status.RECOVERING, True, True),
        ("auto", status.PAUSED, True, False),
        ("auto", status.WAITING, True, False),
        ("auto", status.STOPPING, True, False),
        ("auto", status.COMPLETED, True, False),
        ("off", status.RUNNING, True, False),
        ("on", status.RUNNING, False, True),
        ("on", status.PAUSED, True, False),
    ],
)
def test_on_battery_and_at_rest_the_machine_may_sleep(level: str, state: str, plugged: bool | None, expected: bool) -> None:
    """auto follows the plug; nothing is held while nothing is trained."""
    assert stays_awake(level, state, plugged) == expected


def test_windows_is_never_kept_awake_on_battery(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed laptop would go on in its bag."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert not stays_awake("on", status.RUNNING, False) and stays_awake("on", status.RUNNING, True)


def test_without_a_bus_nothing_is_said(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server, a container: no event about it, no warning, and the training runs."""
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS")
    with Daemon(home, {"steps": 30}, config=config("on")) as daemon:
        assert daemon.process.wait(60) == 0
        reading = daemon.reading()
    assert reading.state == status.COMPLETED and reading.status is not None and reading.status.warnings == []
    assert not [line for line in journal(home) if "awake" in line["kind"] or "before" in line["kind"]]


def test_a_system_that_refuses_is_named_once(home: Home, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session without a power manager and a logind that refuses: one line in the events, with the reason, and no more."""
    Logind(bus, refuses=True)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", bus.address)
    with Daemon(home, LONG, config=config("on")) as daemon:
        daemon.until_step(3)
        wait_for(lambda: events(home, "cannot be kept awake"), 10, "the note")
        daemon.ask("pause")
        daemon.until_state(status.PAUSED)
        daemon.ask("resume")
        daemon.until_step(50)
    assert len(events(home, "cannot be kept awake")) == 1 and events(home, "cannot be kept awake")[0]["why"]


def test_a_power_manager_of_the_session_is_asked_first(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """wakepy's way counts; logind is asked only when there is none."""
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", bus.address)
    monkeypatch.setenv("WAKEPY_FAKE_SUCCESS", "yes")
    system, told, came = Logind(bus), [], threading.Event()

    def tell(words: str, held: bool) -> None:
        told.append((words, held))
        came.set()

    keep = awake.KeepAwake(tell)
    keep.hold()
    assert came.wait(10) and told[0][1] and "logind" not in told[0][0] and not system.locks
    keep.release()
    assert not keep.held


def test_a_bus_that_goes_away_takes_nothing_along(bus: Bus) -> None:
    """The watch survives the end of its bus, and closes at once whatever it is doing."""
    told: list[str] = []
    system = Logind(bus)
    watch = standby.Watch(lambda event, seconds: told.append(event))
    watch.start()
    wait_for(lambda: system.held(DELAYS), 10, "the delay lock")
    bus.close()
    wait_for(lambda: not system.held(DELAYS), 5, "the lock to go")
    watch.close()
    assert told == [] and not any(thread.name == "standby" for thread in threading.enumerate())


def test_it_stays_small(home: Home, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything of this at work the supervisor stays below 40 MB."""
    system = Logind(bus)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", bus.address)
    with Daemon(home, LONG, config=config("on")) as daemon:
        daemon.until_step(20)
        wait_for(lambda: system.held("idle") and system.held(DELAYS), 10, "both locks")
        used = psutil.Process(daemon.process.pid).memory_info().rss
        print(f"supervisor: {used / 1e6:.1f} MB")
        assert used < 40e6
