"""Windows, end to end: start_training.bat in a real console of Wine's cmd.exe, real torch, a real small training.

What Wine cannot show is listed in docs/windows.md. Skipped, with the reason, where there is no such prefix (tests/winpy.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import winpy
from tests.person import SMALL
from trainerd.contract import requests
from trainerd.contract.paths import Home

if sys.platform != "linux":
    pytest.skip("Windows under Wine is for Linux; on Windows everything runs natively", allow_module_level=True)

from tests.wine import ROOT, WindowsComputer, windows_path

# One prefix is one Windows: its tests run one after the other, in one worker.
pytestmark = [pytest.mark.windows, pytest.mark.timeout(400)]
LONG = ("--epochs", "200")
STARTUP = "*/AppData/Roaming/Microsoft/Windows/Start Menu/Programs/StartUp"
# Tests written for every system, of what differs most between systems.
PORTABLE = [
    f"tests/{name}.py"
    for name in (
        "test_config", "test_config_identity", "test_contract_files", "test_contract_requests", "test_machine",
        "test_checkpoints", "test_cadence_prepare", "test_launcher_parts", "test_hang", "test_engine_dumps",
    )
]  # fmt: skip


@pytest.fixture(scope="module")
def prefix() -> Iterator[Path]:
    """Wine's Windows, for us alone; every process of it ends with the tests."""
    where = winpy.root()
    reason = winpy.missing(where)
    if reason:
        pytest.skip(f"no Windows here: {reason}")
    with open(where / "trainerd-tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield where
        end_everything(where)


def end_everything(prefix: Path) -> None:
    """Switch this Windows off."""
    subprocess.run([prefix / "winstop"], env={**os.environ, "WINPY_ROOT": str(prefix)}, stderr=subprocess.DEVNULL, check=False, timeout=60)


@contextlib.contextmanager
def windows_without_a_screen(prefix: Path) -> Iterator[None]:
    """Let programs have windows, which Wine refuses without a display; the supervisor's hidden one is all that is wanted."""
    place = ("HKCU\\Software\\Wine\\Drivers", "/v", "Graphics", "/f")
    change = functools.partial(subprocess.run, env={**os.environ, "WINPY_ROOT": str(prefix)}, capture_output=True, check=False, timeout=60)
    change([prefix / "winrun", "wine", "reg", "add", *place, "/d", "null"])
    end_everything(prefix)  # read when Windows starts
    try:
        yield
    finally:
        change([prefix / "winrun", "wine", "reg", "delete", *place])
        end_everything(prefix)


@pytest.fixture
def computer(prefix: Path, tmp_path: Path) -> Iterator[WindowsComputer]:
    for left in (prefix / "prefix" / "drive_c" / "users").glob(f"{STARTUP}/trainerd-*"):
        left.unlink()  # by tests that were killed: their trainings would go on at the next start of this Windows
    found = WindowsComputer(prefix, tmp_path)
    yield found
    for window in found.windows:
        window.closes()
    end_everything(prefix)


def test_contract_and_processes_under_a_windows_python(prefix: Path, tmp_path: Path) -> None:
    """Locks, status, requests, job objects and priorities hold under Windows' own rules; files, checkpoints and settings as elsewhere."""
    environment = {**os.environ, "WINPY_ROOT": str(prefix), "WINPYTHONPATH": windows_path(ROOT)}
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={windows_path(tmp_path / 'there')}"]
    command = [prefix / "winpy", "-m", "pytest", *options, "tests/windows", *PORTABLE]
    with open(tmp_path / "stderr", "wb") as errors, windows_without_a_screen(prefix):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, check=False
        )
    said = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0 and " passed" in said, said[-6000:]


def test_the_menu_from_double_click_to_stop(computer: WindowsComputer) -> None:
    """The menu starts a training, the window is closed, it trains on; a second start is refused; the menu of a new window stops it."""
    window = computer.opens_window()
    window.shows("Quick test", "Your choice")
    window.types("5")
    window.shows("NEVER STARTED", "Your choice")
    window.types("3")
    window.shows("is starting in the background")
    seen = computer.waits_for_step(1)
    assert seen["state"] == "running" and seen["preset"] == "extended", computer.log()
    window.closes()
    computer.waits_for_step(seen["progress"]["step"] + 3)
    second = computer.types("start", *SMALL)
    assert second.returncode == 5 and "already" in (second.stdout + second.stderr), second
    glance = computer.types("monitor", "--once")
    assert glance.returncode == 0 and "loss" in glance.stdout and "\x1b" not in glance.stdout, glance
    window = computer.opens_window()
    window.shows("Your choice")
    window.types("5")
    window.shows("RUNNING", "Your choice")
    window.types("7")
    computer.waits_for_state("stopped", 60)
    window.shows("Stopped")
    window.types("9")
    assert window.exit_code() == 0
    assert list((computer.checkout / "checkpoints").glob("*/*.pt")), "the stop left no checkpoint"
    computer.is_left_by_all()


def test_a_killed_trainer_is_restarted_and_the_training_ends(computer: WindowsComputer) -> None:
    """taskkill on the trainer: the supervisor starts another one, which goes on from the checkpoint; the result is usable."""
    started = computer.types("start", *SMALL, "--epochs", "8", "--name", "small")
    assert started.returncode == 0, started
    seen = computer.waits_for(lambda seen: seen.get("checkpoint") or seen.get("state") in ("failed", "completed"), "a checkpoint")
    assert seen["state"] == "running", computer.log()
    computer.kills(seen["trainer"]["pid"])
    computer.waits_for(lambda seen: (seen.get("trainer") or {}).get("restarts", 0) >= 1, "the restart")
    seen = computer.waits_for_state("completed", 180)
    assert seen["trainer"]["restarts"] == 1
    assert (computer.checkout / "models" / "small" / "model.safetensors").stat().st_size > 10_000
    shown = computer.types("status")
    assert shown.returncode == 0 and "COMPLETED" in shown.stdout and "my trainer (1) ü" in shown.stdout, shown
    answer = computer.types("suggest", "--model", "models\\small", "a")
    assert answer.returncode == 0 and answer.stdout.strip(), answer
    computer.is_left_by_all()


@pytest.mark.slow
def test_after_a_power_cut_the_next_log_in_goes_on(computer: WindowsComputer) -> None:
    """Windows is gone in the middle of a training; its next start runs the Startup folder, and the training goes on, without a console."""
    started = computer.types("start", *SMALL, *LONG, TRAINERD_AUTOSTART="")
    assert started.returncode == 0 and "goes on when you log in" in started.stdout, started
    before = computer.waits_for(lambda seen: seen.get("checkpoint"), "a checkpoint")
    end_everything(computer.prefix)
    assert computer.wine("wineboot").returncode == 0
    after = computer.waits_for(
        lambda seen: seen["supervisor"]["instance"] != before["supervisor"]["instance"] and seen["state"] == "running", "going on"
    )
    assert after["run"] == before["run"]
    computer.waits_for_step(before["checkpoint"]["step"] + 3)
    assert "pythonw" not in computer.wine("tasklist").stdout  # only the log-in itself was without a console
    assert computer.types("stop").returncode == 0
    assert computer.types("autostart", "disable").returncode == 0
    end_everything(computer.prefix)
    computer.wine("wineboot")
    computer.is_left_by_all()
    assert computer.sees()["state"] == "stopped"


@pytest.mark.slow  # the same by files, with a trainer that takes no time to start, is in tests/windows/test_supervisor.py
def test_stop_by_request_file_pause_and_resume(computer: WindowsComputer) -> None:
    """pause lets the trainer go and resume brings it back; a request file from anybody of this user stops it, with a checkpoint."""
    assert computer.types("start", *SMALL, *LONG).returncode == 0
    computer.waits_for_step(3)
    paused = computer.types("pause")
    assert paused.returncode == 0 and computer.sees()["state"] == "paused", paused
    assert computer.sees()["trainer"]["pid"] is None
    step = computer.sees()["checkpoint"]["step"]
    resumed = computer.types("resume")
    assert resumed.returncode == 0, resumed
    seen = computer.waits_for_step(step + 1)
    requests.send(Home(computer.checkout), requests.Request("stop", seen["supervisor"]["instance"]))
    seen = computer.waits_for_state("stopped", 60)
    assert seen["checkpoint"]["step"] > step
    computer.is_left_by_all()
    nothing = computer.types("stop")
    assert nothing.returncode == 3, nothing


@pytest.mark.slow
def test_the_selftest_where_nothing_can_be_forked(computer: WindowsComputer) -> None:
    """Every life is a process from nothing, ended by TerminateProcess: nothing is lost, the bits are the same, nothing is left behind."""
    done = computer.types("selftest", "--kills", "2", "--seed", "1", "--json", timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout[done.stdout.index("{") :])
    assert verdict["passed"] and not verdict["forked"] and verdict["kills"] == 2 and verdict["acknowledged"] > 20
    assert verdict["home"] is None and computer.sees() == {}


def test_what_goes_wrong_before_anything_runs(computer: WindowsComputer) -> None:
    """A wrong TRAINERD_PYTHON is said in words; a double-clicked window stays open with the reason until a key is pressed."""
    wrong = computer.types("status", TRAINERD_PYTHON="C:\\no such\\python.exe")
    assert wrong.returncode == 2 and "C:\\no such\\python.exe" in wrong.stdout and "What to do" in wrong.stdout, wrong
    window = computer.opens_window(TRAINERD_PYTHON="C:\\no such\\python.exe")
    window.shows("What to do", "Press any key")
    window.types("")
    assert window.exit_code() == 2
    given = computer.types("status", TRAINERD_PYTHON="C:\\Python\\python.exe")
    assert given.returncode == 3 and "NEVER STARTED" in given.stdout, given


def test_without_a_python_the_remedy_is_said(computer: WindowsComputer) -> None:
    """No .venv and no Python on this Windows: what was looked for and where to get one."""
    (computer.checkout / ".venv").rename(computer.folder / "elsewhere")
    nothing = computer.types("status", WINEPATH="C:\\windows")
    assert nothing.returncode == 4 and "no 64-bit Python from 3.10 to 3.14" in nothing.stdout, nothing
    assert "winget install" in nothing.stdout


_FACTS = """
import json
from dataclasses import asdict
from pathlib import Path
from trainerd.machine import cpu, drive, filesystem, memory, page_cache, programs

here = Path.cwd()
held = [asdict(one) for one in programs.heaviest(50)]
swap, cached, total = memory.swap().total_bytes, page_cache.kept_bytes(here / "pyproject.toml"), filesystem.total_bytes(here)
print(json.dumps([cpu.model_name(), cpu.numa_nodes(), drive.kind(here), total, swap, cached, held, programs.tree([1])], default=list))
"""


def test_the_machines_memory_on_windows(computer: WindowsComputer) -> None:
    """The processor's name, NUMA and the kind of drive from Windows' own calls; who holds RAM; what Windows does not tell is unknown."""
    asked = computer.wine("C:\\Python\\python.exe", "-c", _FACTS)
    assert asked.returncode == 0, asked
    name, nodes, kind, total, swap, cached, held, _ = json.loads(asked.stdout)
    assert name and nodes >= 1 and total > 0 and swap >= 0 and cached is None
    assert kind in (None, "NVMe SSD", "SSD", "hard disk")
    ours = next(program for program in held if program["name"].lower().startswith("python"))
    assert ours["own_bytes"] > 1_000_000 and ours["yours"]


def test_memory_optimizer_on_windows(computer: WindowsComputer) -> None:
    """Each of its four commands through the door: what the machine has, a configuration that plan and start take, what could be freed,
    and a few moments of it, also in a file."""

    def types(*words: str) -> subprocess.CompletedProcess[str]:
        done = computer.wine("C:\\Python\\python.exe", "memory_optimizer.py", *words)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done
        return done

    facts = json.loads(types("profile", "--json").stdout)
    assert facts["cpu"]["name"] and facts["ram"]["total_bytes"] > 1e9
    assert "quick" in types("profile").stdout
    said = types("config", "--preset", "quick").stdout
    made = computer.checkout / "optimal_config.json"
    assert "optimal_config.json" in said and json.loads(made.read_text("utf-8"))["train"]["micro_batch"] >= 1
    planned = json.loads(computer.types("plan", "--config", "optimal_config.json", "--json").stdout)
    assert planned["verdict"] == "fits" and planned["device"] == "cpu"
    freed = types("optimize").stdout
    assert "RAM in use" in freed and "Most RAM of their own is held by:" in freed
    watched = types("monitor", "--duration", "1", "--interval", "0.4", "--csv", "seen ü.csv").stdout
    rows = (computer.checkout / "seen ü.csv").read_text("utf-8").splitlines()
    assert len(rows) >= 3 and "max" in watched and rows[0].startswith("at,ram_used_bytes")
