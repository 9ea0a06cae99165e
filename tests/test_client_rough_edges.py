"""The commands at a rough terminal: Ctrl-C while importing, output nobody takes, a folder that is gone, a supervisor that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from client import stuck
from tests.person import DOOR, ROOT, Person
from tests.supervised import RUN, Daemon
from trainerd.contract import files, lock, status
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading, Status

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, descriptors and shells of POSIX")
LONG = {"steps": 5000, "pause": 0.02}

_INTERRUPT_AT = """
import os, runpy, signal, sys
place, door = sys.argv[1:3]
class AtImport:
    def find_spec(self, name, path=None, target=None):
        if name == place:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000): pass  # the interpreter looks for signals between instructions
sys.meta_path.insert(0, AtImport())
sys.argv = [door, *sys.argv[3:]]
runpy.run_path(door, run_name="__main__") if door.endswith(".py") else runpy.run_module(door, run_name="__main__")
raise SystemExit(f"{place} was never imported")
"""


@pytest.fixture
def person(home: Home, tmp_path: Path) -> Person:
    return Person(home.root, tmp_path / "state")


def shell(person: Person, words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which $T is the program with its home."""
    environment = {**person.environment, "T": f"{sys.executable} {DOOR}", "H": str(person.home.root)}
    command = ["bash", "-c", words.replace("$T", '$T --home "$H"')]
    return subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("door", [str(DOOR), str(ROOT / "optimized_train.py"), "trainerd"])
@pytest.mark.parametrize(
    "place",
    ["launcher.hand_over", "client.main", "trainerd.contract.errors", "client.glance", "client.cli", "click", "trainerd.config.model"],
)
def test_ctrl_c_while_importing_is_no_traceback(person: Person, door: str, place: str) -> None:
    """An impatient person's Ctrl-C, at any import: 130 (or the signal), and not a word."""
    if door == "trainerd" and place.startswith("launcher"):
        pytest.skip("the installed command has no launcher")
    words = ["status"] if place == "client.glance" else ["start", "--dataset-size", "0"]
    if door.endswith("optimized_train.py"):
        words = words[1:]
        if place == "client.glance":
            pytest.skip("training in the terminal shows no status")
    command = [sys.executable, "-c", _INTERRUPT_AT, place, door, "--home", str(person.home.root), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=person.environment, cwd=ROOT, timeout=60, check=False)
    assert done.returncode in (130, -signal.SIGINT), done
    assert (done.stdout + done.stderr).strip() == ""


def test_output_whose_reader_is_gone_changes_nothing(person: Person, home: Home) -> None:
    """`| head -0`: not a word, and the exit code is that of what was done."""
    for words, code in (("status", 3), ("stop", 3), ("status --json", 3), ("doctor", None), ("--help", 0), ("runs", 0)):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, str(DOOR), "--home", str(home.root), *words.split()]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=person.environment, timeout=60, check=False)
        os.close(writer)
        assert code is None or done.returncode == code, (words, done)
        assert done.stderr == b"" or (words == "stop" and done.stderr.startswith(b"Error: Nothing is running")), (words, done)
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        done = shell(person, "$T stop | true; exit ${PIPESTATUS[0]}")
        assert (done.returncode, done.stderr) == (0, b"") and daemon.process.wait(60) == 0


def test_a_closed_or_full_output_is_told_in_words(person: Person, home: Home) -> None:
    """`>&-` is quiet; /dev/full and a descriptor that cannot be written are named on stderr with 4 and a remedy; never an error of ours."""
    assert shell(person, "$T status >&-").returncode == 3
    assert shell(person, "$T status >&- 2>&-").returncode == 3
    assert shell(person, "$T stop >&- 2>&- <&-").returncode == 3
    for verb in ("status", "status --json", "--help", "doctor", "runs", "start --help"):
        words = f"$T {verb} >/dev/full" if verb != "runs" else f"$T {verb} 1</dev/null"
        done = shell(person, words)
        assert done.returncode == 4, (words, done)
        assert re.fullmatch(rb"Error: The output could not be written: [^\n]*\.\n[^\n]+\.\n", done.stderr), (words, done.stderr)
    assert shell(person, "$T stop 2>/dev/full").returncode == 3
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        assert shell(person, "$T stop >&-").returncode == 0
        assert daemon.process.wait(60) == 0
    assert status.read(home).state == status.STOPPED


def test_a_current_folder_that_is_gone_is_said(person: Person, tmp_path: Path) -> None:
    """A relative --home or no home at all from a deleted folder: 2 in words; an absolute one works."""
    there = f'mkdir "{tmp_path}/gone" && cd "{tmp_path}/gone" && rmdir "{tmp_path}/gone"'
    program = f"{sys.executable} {DOOR}"
    for words in (f"{program} --home relative status", f"{program} --home x start", f"{program} --home x runs"):
        done = shell(person, f"{there} && {words}")
        assert done.returncode == 2 and b"current folder does not exist" in done.stderr and b"Traceback" not in done.stderr
    assert shell(person, f"{there} && $T status").returncode == 3


def test_a_supervisor_that_hangs_is_named_with_how_to_end_it(person: Person, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hint leads out: the process that holds the home, the command that ends it on this system, and what follows."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        os.kill(daemon.process.pid, signal.SIGSTOP)
        daemon.until_state(status.NOT_ANSWERING, seconds=15)
        ends = f"kill -9 {daemon.process.pid}"
        for words in (["status"], ["start"], ["stop", "--timeout", "0.2"], ["pause", "--timeout", "0.2"], ["save", "--timeout", "0.2"]):
            done = person.types(*words)
            said = done.stdout + done.stderr
            assert ends in said and "resume" in said and done.returncode in (4, 5), (words, said)
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait(60)
        assert person.sees().state == status.CRASHED


def test_the_process_named_is_the_one_that_holds_the_lock(home: Home) -> None:
    """Not the one an old status names: its number may be a stranger's by now."""
    held = lock.FileLock(home.supervisor_lock)
    assert held.acquire()
    document = json.loads((ROOT / "tests" / "data" / "status_schema1.json").read_text("utf-8"))
    from trainerd.contract import clock

    files.write_json(home.status, {**document, "updated_monotonic": clock.monotonic() - 60, "boot_id": clock.boot_id()})
    os.utime(home.supervisor_lock, (clock.wall() - 40,) * 2)  # it is not just starting
    reading = status.read(home)
    assert reading.state == status.NOT_ANSWERING and reading.holder == os.getpid()
    assert f"kill -9 {os.getpid()}" in stuck.remedy(reading, "trainerd")
    held.release()
    assert "Restart the machine" in stuck.remedy(Reading(status.NOT_ANSWERING, "", Status(), True), "trainerd")


def test_a_time_limit_is_a_number_of_seconds(person: Person) -> None:
    """nan, infinity and a year are refused before anything is asked."""
    for given in ("nan", "inf", "1e400", "-1", "0", "40000000"):
        done = person.types("stop", "--timeout", given)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "itself" not in done.stderr, (given, done.stderr)


@pytest.mark.parametrize(
    "words",
    [("monitor", "--interval"), ("memory", "monitor", "--duration"), ("memory", "monitor", "--interval"), ("selftest", "--seconds")],
    ids="".join,
)
def test_nan_is_no_number_of_seconds(person: Person, words: tuple[str, ...]) -> None:
    """It would pass every bound, and then be waited for without end."""
    done = person.types(*words, "nan", timeout=30)
    assert done.returncode == 2 and "'nan' is not a number of seconds" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_configuration_that_is_no_file_holds_nobody(person: Person, tmp_path: Path) -> None:
    """A pipe, a folder, a device, an alias that doubles itself, brackets without end, megabytes: 2 in words, soon."""
    os.mkfifo(tmp_path / "pipe")
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    merge = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))
    for name, content in (("bomb", bomb), ("merge", merge), ("deep", "[" * 50_000), ("big", "x: 1\n" * 100_000), ("json", '{"a":' * 5000)):
        (tmp_path / name).write_text(content, encoding="utf-8")
    says = {
        "pipe": "is not a file", "/dev/zero": "is not a file", ".": "cannot be read", "bomb": "repeats a part", "merge": "repeats a part",
        "deep": "32 levels", "json": "32 levels", "big": "larger than",
    }  # fmt: skip
    for name, words in says.items():
        done = person.types("start", "--config", str(tmp_path / name), timeout=20)
        assert done.returncode == 2 and words in done.stderr, (name, done.stderr)
    assert not person.home.status.exists()


def test_nothing_but_the_task_file_is_ever_run(person: Person, home: Home, tmp_path: Path) -> None:
    """YAML tags, text in a status, in a record, in a log: shown or refused, never executed."""
    trap = tmp_path / "sprung"
    config = tmp_path / "c.yml"
    for content in (f"!!python/object/apply:os.system ['touch {trap}']", f"seed: !!python/object/apply:os.system ['touch {trap}']"):
        config.write_text(content, encoding="utf-8")
        assert person.types("start", "--config", str(config)).returncode == 2
    shot = f"$(touch {trap}) `touch {trap}` __import__('os').system('touch {trap}') \x1b]0;x\x07"
    files.write_json(home.status, Status(run=RUN, state=status.FAILED, reason=shot, task=shot, config=shot, log=shot).to_dict())
    shown = person.types("status").stdout + person.types("monitor", "--once").stdout
    assert "touch" in shown and "\x1b" not in shown and not trap.exists()


def test_a_home_that_cannot_be_written_can_be_asked(person: Person, home: Home) -> None:
    """A disk that became read-only: status, monitor --once, runs, logs and doctor answer; what would write says that it cannot."""
    with Daemon(home, {"steps": 5}) as daemon:
        assert daemon.process.wait(60) == 0
    enter = ["unshare", *(["-r"] if os.getuid() else []), "-m", "sh", "-c"]
    script = 'mount --bind "$H" "$H" && mount -o remount,ro,bind "$H" && exec "$@"'
    environment = {**person.environment, "H": str(home.root)}
    if subprocess.run([*enter, script, "sh", "true"], env=environment, capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace of our own here")
    for words, code, says in (
        ("status", 0, "COMPLETED"), ("status --json", 0, '"completed"'), ("monitor --once", 0, "completed"), ("runs list", 0, RUN),
        ("logs", 0, ""), ("doctor", 4, "cannot be written"), ("stop", 3, "Nothing is running"), ("resume", 3, "no unfinished run"),
        ("start --dataset-size 100", 4, "cannot be written"),
    ):  # fmt: skip
        command = [*enter, script, "sh", sys.executable, str(DOOR), "--home", str(home.root), *words.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == code and says.lower() in said.lower() and "itself" not in said, (words, said)
