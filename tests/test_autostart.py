"""After a reboot: registration, what the log-in runs, and what it leaves alone. Under a real systemd user manager where one can be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import registration
from tests import logins
from tests.logins import Account
from tests.person import Person, own_task
from tests.supervised import wait_for
from trainerd.contract import clock, lock, runs, status
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord
from trainerd.machine import autostart
from trainerd.machine.login import Entry

if sys.platform == "win32":
    pytest.skip("tests/windows has its own", allow_module_level=True)

AWKWARD = "a %n b%% $HOME ${X} \"q\" 'ü' \\ \\n `x` =; #~*?<>|& é"
needs_manager = pytest.mark.skipif(bool(logins.missing()), reason=logins.missing())


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """An account without a systemd user manager, until it logs in."""
    found = Account(tmp_path / "account")
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    yield found
    found.logs_out()


@pytest.fixture
def person(account: Account, tmp_path: Path) -> Iterator[Person]:
    found = Person(tmp_path / "ein Zuhause für $HOME")
    yield found
    found.leaves()


def entry(folder: Path) -> Entry:
    """A command that writes its words down, with the most awkward name for everything."""
    program = folder / AWKWARD.replace("/", "") / "program"
    program.parent.mkdir()
    told = folder / "told.json"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nopen({str(told)!r}, 'w').write(json.dumps(sys.argv))\n", "utf-8")
    program.chmod(0o755)
    return Entry("trainerd-test", f"trainerd: {AWKWARD}", (str(program), "--home", AWKWARD, ""), program)


def told(folder: Path) -> list[str]:
    path = folder / "told.json"
    wait_for(lambda: path.exists() and path.read_text("utf-8").endswith("]"), 15, "the command to run")
    words: list[str] = json.loads(path.read_text("utf-8"))
    return words


def opens(desktop_entry: Path) -> None:
    """What a desktop does at log-in."""
    if shutil.which("gio") is None:
        pytest.skip("no gio (libglib2.0-bin) here to open a desktop entry with")
    done = subprocess.run(["gio", "launch", str(desktop_entry)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def record(home: Home, name: str = "a", **changes: object) -> RunRecord:
    """A run that began, its supervisor long gone, with a status about it."""
    found = RunRecord(name, "cadence", clock.wall(), {"task": "cadence"}, {})
    for key, value in changes.items():
        setattr(found, key, value)
    runs.write(home, found)
    home.status.write_text(json.dumps({"schema": 1, "state": "running", "run": name, "updated_at": 1.0}), "utf-8")
    return found


def test_without_a_systemd_manager_a_desktop_entry_runs_the_exact_words(account: Account, tmp_path: Path) -> None:
    """Every word arrives as it was, through the desktop's own reading of the file; the desktop's checker has nothing to say."""
    wanted = entry(tmp_path)
    found = autostart.enable(wanted)
    assert (found.state, found.path) == (autostart.ON, account.desktop_entries[0])
    if shutil.which("desktop-file-validate"):
        checked = subprocess.run(["desktop-file-validate", str(found.path)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0 and "error" not in checked.stdout, checked.stdout
    opens(account.desktop_entries[0])
    assert told(tmp_path) == list(wanted.command)
    assert autostart.disable(wanted) and not account.desktop_entries and not autostart.disable(wanted)


@needs_manager
def test_systemd_runs_the_exact_words_at_log_in(account: Account, tmp_path: Path) -> None:
    """Every word arrives as it was, through systemd's own reading of the unit; without the program nothing is tried."""
    account.logs_in()
    wanted = entry(tmp_path)
    found = autostart.enable(wanted)
    assert (found.state, found.path) == (autostart.ON, account.units / "trainerd-test.service") and not account.desktop_entries
    assert account.asks("is-enabled", "trainerd-test.service").stdout.strip() == "enabled"
    assert not (tmp_path / "told.json").exists()  # enabling starts nothing
    account.logs_out()
    account.logs_in()
    assert told(tmp_path) == list(wanted.command)
    (tmp_path / "told.json").unlink()
    wanted.needs.unlink()
    account.logs_out()
    account.logs_in()
    wait_for(lambda: "condition" in account.asks("status", "trainerd-test.service").stdout.lower(), 10, "the unit to be looked at")
    assert account.asks("is-failed", "trainerd-test.service").stdout.strip() != "failed"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_has_nothing_to_say_against_the_unit(account: Account, tmp_path: Path) -> None:
    """`systemd-analyze verify` is silent about it, whatever the paths."""
    (account.folder / "runtime" / "systemd").mkdir()  # a manager seems to run; nothing of it is asked here
    tool = tmp_path / "bin" / "systemctl"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexit 0\n", "utf-8")
    tool.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
        found = autostart.enable(entry(tmp_path))
    checked = subprocess.run(["systemd-analyze", "--user", "verify", str(found.path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and "trainerd-test" not in checked.stderr, checked.stderr


def test_what_no_file_can_carry_is_said(account: Account, tmp_path: Path) -> None:
    """A line break, or bytes that are no text, in a path: an error in words, and nothing is written."""
    for bad in ("line\nbreak", os.fsdecode(b"\xff")):
        with pytest.raises(OSError, match="cannot be written into a file"):
            autostart.enable(Entry("trainerd-test", "t", (sys.executable, bad), tmp_path))
    assert not account.desktop_entries and not account.units.exists()


def test_a_user_without_a_home_is_told_and_trains(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers have such users: one sentence instead of a traceback."""
    monkeypatch.setenv("TRAINERD_AUTOSTART", "")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert "cannot be registered for log-in (Could not determine" in registration.begun(home, "a", True)


def nobody() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_what_the_person_switched_off_in_the_system_stays_off(account: Account, home: Home) -> None:
    """The desktop's own switch outlives the next start, which says so; `autostart enable` turns it on again; a moved Python is named."""
    autostart.enable(registration.entry(home))
    path = account.desktop_entries[0]
    path.write_text(path.read_text("utf-8").replace("enabled=true", "enabled=false"), "utf-8")
    assert "switched off" in registration.begun(home, "a", True)
    assert registration.found(home).state == autostart.SWITCHED_OFF
    autostart.enable(registration.entry(home))
    assert registration.found(home).state == autostart.ON
    path.write_text(path.read_text("utf-8").replace(sys.executable, "/old/python"), "utf-8")
    assert registration.found(home).state == autostart.OUTDATED
    assert "when you log in" in registration.begun(home, "a", True) and registration.found(home).state == autostart.ON


def test_disable_is_remembered_and_no_autostart_is_for_one_run(account: Account, person: Person) -> None:
    """After `disable` no start registers; after `enable` it does again; --no-autostart keeps out one run, also when it is resumed after
    another one was started; a new run of its name is another one."""
    home = person.home
    assert registration.begun(home, "a", True) and account.desktop_entries
    assert person.types("autostart", "disable").stdout.startswith("Off") and not account.desktop_entries
    assert "autostart enable" in registration.begun(home, "a", True) and not account.desktop_entries
    assert registration.begun(home, "a", False) == ""
    assert person.types("autostart", "enable").stdout.startswith("On") and account.desktop_entries
    registration.decline(home, "b")
    assert registration.begun(home, "b", False) == "" and not account.desktop_entries
    record(home, "b")
    assert "waits" not in registration.begun(home, "b", True) and not account.desktop_entries and registration.due(home) is None
    assert registration.begun(home, "c", True) and account.desktop_entries
    registration.decline(home, "c")
    assert registration.read(home).without == ["b", "c"]
    for run in ("c", "b"):
        assert registration.begun(home, run) == "" and not account.desktop_entries and registration.due(home) is None
    assert registration.begun(home, "b", new=True) and account.desktop_entries and registration.read(home).without == ["c"]
    document = json.loads(person.types("autostart", "--json").stdout)
    assert (document["state"], document["wanted"], document["path"]) == ("on", "on", str(account.desktop_entries[0]))
    wrong = person.types("autostart", "sideways")
    assert wrong.returncode == 2 and "'status', 'enable', 'disable'" in wrong.stderr


def test_nothing_is_registered_where_it_is_turned_off(account: Account, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRAINERD_AUTOSTART=off, for containers and tests: no file, no word."""
    monkeypatch.setenv("TRAINERD_AUTOSTART", "off")
    assert registration.begun(home, "a", True) == "" and not account.desktop_entries and not home.autostart.exists()


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        ({}, True),
        ({"wanted": runs.WANTED_PAUSED}, False),
        ({"wanted": runs.WANTED_STOPPED, "outcome": "stopped"}, False),
        ({"outcome": "completed"}, False),
        ({"outcome": "failed"}, False),
    ],
    ids=["unfinished", "paused", "stopped", "completed", "failed"],
)
def test_only_an_unfinished_and_wanted_run_is_due(home: Home, changes: dict[str, object], due: bool) -> None:
    """A log-in goes on with what power or a log-out ended, and with nothing else."""
    record(home, **changes)
    found = registration.due(home)
    assert (found is not None and found.id == "a") == due


def test_an_older_unfinished_run_does_not_come_back(home: Home) -> None:
    """Who began another run since then is not surprised by the old one; without a readable status the newest run counts."""
    record(home, "old", created_at=1.0)
    record(home, "new", created_at=2.0, outcome="completed")
    assert registration.due(home) is None
    home.status.write_text("{", "utf-8")
    assert registration.due(home) is None
    record(home, "newest", created_at=3.0)
    home.status.unlink()
    found = registration.due(home)
    assert found is not None and found.id == "newest"


@pytest.mark.parametrize("damaged", [b"", b"\xff", b"[]", b'{"schema": 1, "wanted": 3, "environment": [1]}', b'{"schema": 99}'])
def test_a_damaged_wish_is_none(home: Home, damaged: bytes) -> None:
    """autostart.json may hold anything: no traceback, and no foreign variable gets into the training."""
    home.autostart.write_bytes(damaged)
    assert (registration.read(home).environment, registration.read(home).wanted) == ({}, registration.AUTO)
    home.autostart.write_text('{"schema": 1, "without": "a"}', "utf-8")
    assert registration.read(home).without == ["a"]  # as 0.1 wrote it
    home.autostart.write_text('{"schema": 1, "environment": {"LD_PRELOAD": "x", "HF_HOME": 3, "CUDA_VISIBLE_DEVICES": "1"}}', "utf-8")
    assert registration.read(home).environment == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_log_in_with_nothing_to_do_tidies_up(account: Account, person: Person) -> None:
    """A finished run: nothing starts, the registration goes; one that was asked for stays. A missing home is no error."""
    record(person.home, outcome="completed")
    registration.begun(person.home, "a", True)
    opens(account.desktop_entries[0])
    wait_for(lambda: not account.desktop_entries, 15, "the registration to go")
    assert not lock.is_held(person.home.supervisor_lock)
    person.types("autostart", "enable")
    done = person.types("login")
    assert done.returncode == 0 and account.desktop_entries
    assert "nothing to go on with" in person.types("autostart").stdout
    person.home.root.rename(person.home.root.with_name("elsewhere"))
    done = person.types("login")
    assert done.returncode == 0 and not person.home.root.exists()


@needs_manager
def test_a_training_outlives_power_cuts_and_log_outs(account: Account, person: Person, tmp_path: Path) -> None:
    """Power fails: the next log-in goes on. Log-out: it saves, and the log-in after goes on. Stopped: no log-in brings it back."""
    account.logs_in()
    done = person.starts(*own_task(tmp_path))
    assert "goes on when you log in" in done.stdout
    seen = person.waits_for(lambda r: r.status and r.status.checkpoint)
    assert seen.status and seen.status.supervisor
    for pid in (seen.status.supervisor.pid, seen.status.trainer.pid):
        person.kills(pid)
    account.loses_power()
    person.waits_until_gone()
    before = seen.status.checkpoint.step if seen.status.checkpoint else 0

    account.logs_in()
    second = goes_on(person, before, seen)
    account.logs_out()
    person.waits_until_gone()
    kept = runs.read(person.home, person.run())
    assert (kept.wanted, kept.outcome, kept.step) == ("running", None, person.steps()[-1][0])

    account.logs_in()
    goes_on(person, kept.step or 0, second)
    assert person.types("stop").returncode == 0
    account.logs_out()
    account.logs_in()
    wait_for(lambda: not list(account.units.glob("*.service")), 30, "the registration to go")
    assert not person.sees().alive and runs.names(person.home) == [kept.id]


def goes_on(person: Person, step: int, before: status.Reading) -> status.Reading:
    """Beyond this step, under a supervisor of its own: the file of the one before is there until the new one has written its first."""

    def is_new(reading: status.Reading) -> bool:
        now, then = reading.status and reading.status.supervisor, before.status and before.status.supervisor
        return now is not None and then is not None and now.instance != then.instance

    return person.waits_for(
        lambda r: r.alive and r.state == status.RUNNING and is_new(r) and r.status and (r.status.progress.step or 0) > step, what="going on"
    )
