"""`start` with the real supervisor and the real trainer: one and only one, detached, resumed or new, and told in words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import choose, follow
from tests.person import DOOR, FOR_LONG, OWN_TASK, Person
from trainerd.config.load import load
from trainerd.contract import lock, runs, status
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord

LINUX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="sessions and signals of POSIX")


@pytest.fixture
def person(home: Home, tmp_path: Path) -> Iterator[Person]:
    someone = Person(home.root, tmp_path / "state")
    yield someone
    someone.leaves()


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(OWN_TASK, encoding="utf-8")
    return f"{path}:Mine"


def test_start_goes_on_with_the_same_and_begins_the_other(person: Person, home: Home, task: str) -> None:
    """Started, refused while running, stopped, gone on with; another seed is a new run and is said to be; nothing is deleted."""
    first = person.starts("--task", task, *FOR_LONG)
    assert "in the background" in first.stdout
    run = person.run()
    assert run.startswith("mine-2") and lock.is_held(home.supervisor_lock)
    person.waits_for_step(1)
    assert person.types("stop").returncode == 0
    again = person.starts("--task", task, "--epochs", "90000")
    assert f"unfinished run {run}" in again.stdout and "train.epochs 100000 -> 90000" in again.stdout
    assert person.types("stop").returncode == 0
    forbidden = person.types("start", "--task", task, "--set", "train.weight_decay=0.7")
    assert forbidden.returncode == 5 and "train.weight_decay 0.01 -> 0.7" in forbidden.stderr and "--no-resume" in forbidden.stderr
    taken = person.types("start", "--task", task, "--set", "seed=7", "--name", run)
    assert taken.returncode == 5 and "seed 0 -> 7" in taken.stderr
    assert person.types("start", "--task", task, "--name", run, "--no-resume").returncode == 5
    other = person.starts("--task", task, "--set", "seed=7", "--epochs", "1", "--name", "other", "--wait", "--json")
    document = json.loads(other.stdout)
    assert (document["state"], document["run"], document["resumed"]) == ("completed", "other", False)
    finished = person.types("start", "--task", task, "--set", "seed=7", "--name", "other")
    assert finished.returncode == 5 and "completed" in finished.stderr
    new = person.starts("--task", task, "--set", "seed=8")
    assert f"the unfinished {run} differs (seed 0 -> 8)" in new.stdout
    assert len(runs.names(home)) == 3


def test_a_task_file_that_cannot_be_trained_is_told_by_start(person: Person, tmp_path: Path) -> None:
    """`start` waits for the trainer's verdict on a person's own file: exit 2, with the exception's words."""
    path = tmp_path / "broken.py"
    path.write_text("class Mine:\n    oops = 1 / 0\n", encoding="utf-8")
    done = person.types("start", "--task", f"{path}:Mine")
    assert done.returncode == 2 and "division by zero" in done.stderr and "Traceback" not in done.stderr
    assert person.types("start", "--task", f"{path}:Other").returncode == 2


def test_a_wrong_setting_of_ones_own_task_is_told_by_start(person: Person, task: str) -> None:
    """Only the trainer can check it, and `start` waits for that: exit 2 with the key and the value, nothing left running."""
    done = person.types("start", "--task", task, "--set", "settings.no_such_setting=5")
    assert done.returncode == 2 and "settings.no_such_setting" in done.stderr and "Traceback" not in done.stderr
    assert person.waits_for(lambda reading: not reading.alive, 20).state == "failed"


def test_a_run_that_fails_is_waited_for_as_failed(person: Person, tmp_path: Path) -> None:
    """--wait returns the run's own result: 4 for a failure, with its reason."""
    path = tmp_path / "failing.py"
    # An error of the very first step would only come again: the first death is the end.
    path.write_text(OWN_TASK.replace('return {"loss": len(batch["y"])}', 'raise ArithmeticError("the shape is wrong")'), encoding="utf-8")
    done = person.types("start", "--task", f"{path}:Mine", "--wait")
    assert done.returncode == 4 and "the shape is wrong" in done.stdout + done.stderr


def test_data_that_are_not_there_are_told_before_anything_starts(person: Person, home: Home, task: str, tmp_path: Path) -> None:
    """Exit 2, and not a file is left but the home."""
    (tmp_path / "empty.tsv").touch()
    for words in (["--data", "/none"], ["--data", str(tmp_path / "empty.tsv")], ["--data", "/none", "--task", task]):
        done = person.types("start", *words)
        assert done.returncode == 2 and "Traceback" not in done.stderr and ("/none" in done.stderr or "empty" in done.stderr)
    assert list(home.root.iterdir()) == []


@LINUX_ONLY
def test_the_supervisor_outlives_the_terminal_that_started_it(person: Person, home: Home) -> None:
    """A session of its own, no descriptor of the terminal, the home as its folder: a hang-up does not reach it."""
    words = [sys.executable, str(DOOR), "--home", str(home.root), "start"]
    begun = time.monotonic()
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=person.environment, start_new_session=True) as shell:
        assert shell.stdout
        shell.stdout.read()  # ends when nobody holds the pipe any more: the supervisor must not
        assert shell.wait(60) == 0
    assert time.monotonic() - begun < 30
    reading = person.sees()
    assert reading.alive and reading.status and reading.status.supervisor
    pid = reading.status.supervisor.pid
    assert os.getsid(pid) == pid and os.readlink(f"/proc/{pid}/cwd") == str(home.root)
    opened = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)}
    assert opened == {"/dev/null", next(str(p) for p in home.logs.glob("supervisor_*.log"))}
    try:
        os.killpg(shell.pid, signal.SIGHUP)
    except ProcessLookupError:
        pass  # nobody is left of the terminal's session
    assert person.sees().alive
    assert list(home.control.glob("*.json")) == []


@pytest.mark.parametrize("number", [16, pytest.param(50, marks=pytest.mark.slow)])
def test_of_many_concurrent_starts_exactly_one_supervises(person: Person, home: Home, number: int) -> None:
    """One returns 0, the others 5 with what to do; no request is left that could take effect later."""
    words = [sys.executable, str(DOOR), "--home", str(home.root), "start", "--dataset-size", "2000"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    starts = [subprocess.Popen(words, **streams, env=person.environment) for _ in range(number)]  # type: ignore[call-overload]
    ended = [(start.communicate(timeout=120), start.returncode) for start in starts]
    assert sorted(code for _, code in ended) == [0] + [5] * (number - 1), [streams for streams, code in ended if code not in (0, 5)][:2]
    assert all("already" in err and "monitor" in err for (_, err), code in ended if code == 5)
    assert len(runs.names(home)) == 1 and person.sees().alive
    assert list(home.control.glob("*.json")) == []


def test_a_full_disk_refuses_a_start(person: Person, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 5 with how much is free and what to do."""
    monkeypatch.setattr("trainerd.machine.filesystem.free_bytes", lambda _: 5_000_000)
    with pytest.raises(Refused, match="Only 5 MB are free"):
        follow.prepare_home(home)


def test_an_unsafe_place_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system or a synced folder is a warning of `start`."""
    monkeypatch.setattr("trainerd.machine.filesystem.network_filesystem", lambda _: "nfs4")
    monkeypatch.setattr("trainerd.machine.filesystem.synced_folder", lambda _: "OneDrive")
    warnings = follow.prepare_home(home)
    assert "nfs4" in warnings[0] and "OneDrive" in warnings[1]


def test_the_newest_unfinished_run_is_resumed_as_recorded(home: Home) -> None:
    """`resume` without a name: the configuration as recorded, the run's own copy of the task file."""
    config = load(overrides={"train.epochs": 8}).model_dump(mode="json")
    for number, name in enumerate(("a", "b", "c")):
        outcome = "completed" if name == "c" else None
        runs.write(home, RunRecord(name, "cadence", float(number), config, {"task": "cadence"}, outcome=outcome))
    found = choose.unfinished(home, None)
    assert (found.run, found.resume, found.config.train.epochs, found.task_file) == ("b", True, 8, None)
    assert choose.unfinished(home, "a").run == "a"
    runs.write(home, RunRecord("b", "cadence", 1.0, {"task": "cadence", "train": {"unheard_of": 1}}, {"task": "cadence"}))
    with pytest.raises(Refused, match="another version"):
        choose.unfinished(home, "b")


@LINUX_ONLY
def test_training_in_the_foreground_tells_its_stages_and_stops_at_ctrl_c(person: Person, home: Home, task: str, tmp_path: Path) -> None:
    """optimized_train.py: same lock, same status, one line per stage, what the task prints, the end once; the same words go on."""
    (tmp_path / "mine.py").write_text(
        OWN_TASK.replace("    def model(self): ", "    def model(self):\n        print('the task says hello')\n        "), "utf-8"
    )
    words = [sys.executable, str(DOOR.with_name("optimized_train.py")), "--home", str(home.root), "--task", task, *FOR_LONG]
    words += ["--set", "polite.priority=normal", "--set", "train.threads=1"]
    for _ in range(2):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(words, **streams, env=person.environment, start_new_session=True) as shell:  # type: ignore[call-overload]
            person.waits_for(lambda r: r.alive and r.status and (r.status.progress.step or 0) > 3 and r.state == status.RUNNING, 120)
            assert person.types("start").returncode == 5
            assert shell.stdout
            out = "".join(iter(lambda: line if "first step is done" not in (line := shell.stdout.readline()) else "", ""))
            os.killpg(shell.pid, signal.SIGINT)
            out += shell.communicate(timeout=60)[0]
            assert shell.returncode == 0, out
        person.waits_until_gone()
        for told in (
            "in this terminal. Ctrl-C",
            "loads PyTorch",
            "the task says hello",
            "Stopping. Ctrl-C once more",
            "Go on from the last",
        ):
            assert out.count(told) == 1, f"{told!r} in\n{out}"
        assert out.count("Stopped") == 1 and status.read(home).state == status.STOPPED, out
    assert "unfinished run" in out and len(runs.names(home)) == 1
    assert list(home.run(person.run()).checkpoints.glob("*.json"))


def test_a_memory_limit_that_is_passed_already_is_told(person: Person, task: str) -> None:
    """Below what the machine uses before the training begins: a warning with that number at once, and in the status."""
    done = person.starts("--task", task, *FOR_LONG, "--set", "memory.ram_limit=50MB")
    assert re.search(r"Warning: memory\.ram_limit is 50MB, and \d+\.\d GB are in use now.* close other programs", done.stderr), done.stderr
    reading = person.sees()
    assert reading.status and any("memory.ram_limit is 50MB" in warning for warning in reading.status.warnings)
