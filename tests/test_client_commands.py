"""The commands a person types, against a real supervisor with a trainer that needs no torch, and against nothing at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from client import cli
from client import home as homes
from client import main as door
from tests.person import DOOR, Person
from tests.supervised import RUN, Daemon
from trainerd.contract import files, lock, runs, status
from trainerd.contract.errors import UsageError
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord

LINUX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="signals and shells of POSIX")
LONG = {"steps": 5000, "pause": 0.02}


@pytest.fixture
def person(home: Home, tmp_path: Path) -> Person:
    return Person(home.root, tmp_path / "state")


@pytest.mark.parametrize("verb", ["stop", "pause", "save", "resume", "logs", "logs -f"])
def test_without_a_supervisor_a_command_says_so(person: Person, verb: str) -> None:
    """Exit 3, one line what is the matter and one what to do; no traceback."""
    done = person.types(*verb.split())
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and "start" in done.stderr and "Traceback" not in done.stderr


def test_status_says_how_it_stands_with_its_exit_code(person: Person, home: Home) -> None:
    """Never started 3, live 0, garbage 4 in words; --json is one document, the same way."""
    never = person.types("status")
    assert never.returncode == 3 and never.stdout.startswith("NEVER STARTED")
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        live = person.types("status")
        assert live.returncode == 0 and live.stdout.startswith(f"RUNNING  {RUN}") and "step" in live.stdout
        document = json.loads(person.types("status", "--json").stdout)
        assert (document["state"], document["alive"], document["run"]) == ("running", True, RUN)
    assert person.types("status").returncode == 4
    home.status.write_bytes(b"\x00{garbage")
    broken = person.types("status")
    assert broken.returncode == 4 and "damaged" in broken.stdout and "Traceback" not in broken.stdout + broken.stderr
    assert json.loads(person.types("status", "--json").stdout)["state"] == "unreadable"


def test_pause_resume_save_and_stop_return_when_their_effect_is_there(person: Person, home: Home) -> None:
    """Each command ends when the status shows what it was for."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        assert person.types("save").stdout.startswith("Saved: step ")
        paused = person.types("pause")
        assert paused.returncode == 0 and "resume" in paused.stdout
        assert daemon.reading().state == status.PAUSED and not lock.is_held(home.trainer_lock)
        refused = person.types("save")
        assert refused.returncode == 5 and "refused" in refused.stderr
        twice = person.types("start")
        assert twice.returncode == 5 and "paused" in twice.stderr and "resume" in twice.stderr
        assert person.types("resume", "another-run").returncode == 5
        assert person.types("resume").returncode == 0
        daemon.until_step(3)
        assert person.types("resume").returncode == 5
        stopped = person.types("stop")
        assert stopped.returncode == 0 and stopped.stdout.startswith("Stopped")
        assert not lock.is_held(home.supervisor_lock) and status.read(home).state == status.STOPPED
    assert person.types("stop").returncode == 3 and person.types("status").returncode == 3
    assert not list(home.control.glob("*.json"))


def test_a_second_start_is_refused_with_what_to_do(person: Person, home: Home) -> None:
    """Exit 5, in words and as JSON; the running training is not touched."""
    with Daemon(home, LONG) as daemon:
        before = daemon.until_step(1)
        done = person.types("start", "--dataset-size", "10")
        assert done.returncode == 5 and RUN in done.stderr and "monitor" in done.stderr and "--home" in done.stderr
        told = person.types("start", "--json")
        document = json.loads(told.stdout)
        assert told.returncode == 5 and document["exit_code"] == 5 and RUN in document["error"] and document["hint"]
        after = daemon.reading()
        assert before.status and after.status and before.status.supervisor == after.status.supervisor and after.state == status.RUNNING


@LINUX_ONLY
def test_a_supervisor_that_does_not_answer_is_told_and_the_request_withdrawn(person: Person, home: Home) -> None:
    """A time limit, an exit code, and nothing left that could take effect later."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        os.kill(daemon.process.pid, signal.SIGSTOP)
        done = person.types("stop", "--timeout", "0.5")
        assert done.returncode == 4 and "did not answer within 0.5 seconds" in done.stderr
        assert not list(home.control.glob("*.json"))
        os.kill(daemon.process.pid, signal.SIGCONT)
        daemon.until_step(3)


def test_wrong_words_are_told_with_the_nearest_right_ones(person: Person) -> None:
    """Exit 2; a usage error with --json is JSON too."""
    for words, says in (
        (["staus"], "did you mean 'status'"),
        (["start", "--epocs", "3"], "no such option"),
        (["start", "--epochs", "0", "--preset", "quik"], "2 problems"),
        (["logs", "-n", "x"], "valid integer"),
        (["runs", "show", "nope"], "no run 'nope'"),
        (["status", "--home"], "--home needs a folder"),
    ):
        done = person.types(*words)
        assert done.returncode == 2 and says.lower() in done.stderr.lower(), (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert json.loads(person.types("start", "--bogus", "--json").stdout)["exit_code"] == 2


@pytest.mark.parametrize("verb", ["", *(verb for verb in cli.COMMANDS if verb != "suggest"), "menu", "foreground"])
def test_every_command_explains_itself(person: Person, verb: str) -> None:
    """--help of each lazily imported command, exit 0."""
    done = person.types(*verb.split(), "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage:")


def test_logs_are_shown_and_followed_without_escape_codes(person: Person, home: Home) -> None:
    """The last N lines; -f goes on until the training ends."""
    home.logs.mkdir()
    log = home.logs / "training_20261121_120000.log"
    log.write_bytes("".join(f"line {n} ünï \x1b[31mred\n" for n in range(20_000)).encode() + b"torn")
    done = person.types("logs", "-n", "3")
    assert [line.split(" ünï")[0] for line in done.stdout.splitlines()] == ["line 19998", "line 19999", "torn"]
    assert "\x1b" not in done.stdout
    assert len(person.types("logs", "-n", "5000").stdout.splitlines()) == 5000


def test_following_a_log_goes_on_in_the_next_and_ends_with_the_training(person: Person, home: Home) -> None:
    """What is added is printed; a restarted trainer's new log comes next; the end of the supervisor is the end."""
    home.logs.mkdir()
    first, second = (home.logs / f"training_20261121_12000{n}.log" for n in (0, 1))
    first.write_text("old\n", encoding="utf-8")
    held = FileLock(home.supervisor_lock)
    assert held.acquire()
    words = [sys.executable, str(DOOR), "--home", str(home.root), "logs", "-f", "-n", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=person.environment, text=True, encoding="utf-8") as follower:
        assert follower.stdout and follower.stdout.readline() == "old\n"
        for path, text in ((first, "one\n"), (second, "two\n")):
            with open(path, "a", encoding="utf-8") as log:
                log.write(text)
            if path == second:
                assert follower.stdout.readline() == f"--- {second.name}\n"
            assert follower.stdout.readline() == text
        held.release()
        assert follower.wait(60) == 0


def test_runs_are_listed_shown_and_deleted(person: Person, home: Home) -> None:
    """A live run is refused; what is removed is said; nothing else is touched."""
    for number, name in enumerate(("old", "new")):
        outcome = "completed" if number else None
        runs.write(home, RunRecord(name, "cadence", 100.0 + number, {"task": "cadence", "seed": 1}, {"task": "cadence"}, outcome=outcome))
        for folder in (home.run(name).checkpoints, home.run(name).model):
            folder.mkdir(parents=True)
            (folder / "file").write_bytes(b"x" * 1000)
    assert [line.split()[:2] for line in person.types("runs").stdout.splitlines()] == [["old", "unfinished"], ["new", "completed"]]
    rows = json.loads(person.types("runs", "list", "--json").stdout)["runs"]
    assert [row["id"] for row in rows] == ["old", "new"] and rows[0]["bytes"] > 2000
    assert "state       unfinished" in person.types("runs", "show", "old").stdout
    assert json.loads(person.types("runs", "show", "new", "--json").stdout)["outcome"] == "completed"
    assert "Nothing was removed" in person.types("runs", "delete", "old", given="n\n").stdout and home.run("old").record.exists()
    done = person.types("runs", "delete", "old", "--yes")
    assert done.returncode == 0 and str(home.run("old").checkpoints) in done.stdout
    assert runs.names(home) == ["new"] and not home.run("old").checkpoints.exists() and home.run("new").model.exists()
    assert person.types("runs", "delete", "../new", "--yes").returncode == 2
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        live = person.types("runs", "delete", RUN, "--yes")
        assert live.returncode == 5 and home.run(RUN).record.exists()
    home.run("new").record.write_bytes(b"{")
    assert "damaged" in person.types("runs").stdout
    assert person.types("runs", "delete", "new", "--yes").returncode == 0


def test_resume_says_what_there_is_to_resume(person: Person, home: Home) -> None:
    """No such run 3; a completed one 5."""
    runs.write(home, RunRecord("done", "cadence", 1.0, {"task": "cadence"}, {}, outcome="completed"))
    assert person.types("resume").returncode == 3
    assert "no run 'x'" in person.types("resume", "x").stderr
    assert person.types("resume", "done").returncode == 5


def test_the_menu_does_what_the_commands_do(person: Person, home: Home) -> None:
    """One key and Enter, from a pipe; errors are told and the menu goes on; the end of the input is the exit."""
    done = person.types("menu", given="5\n7\nz\n\n9\n")
    assert done.returncode == 0
    assert "NEVER STARTED" in done.stdout and "Nothing is running" in done.stdout and "no choice 'z'" in done.stdout
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        done = person.types("menu", given="5\r\n7\r\n")
        assert done.returncode == 0 and "RUNNING" in done.stdout and "Stopped" in done.stdout


def test_which_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--home, else TRAINERD_HOME, else the checkout, else the current folder in use, else the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if sys.platform != "win32":
        assert homes.find(None, None).root == tmp_path / "data" / "trainerd"
    (tmp_path / "training_status.json").touch()
    assert homes.find(None, None).root == tmp_path
    assert homes.find(None, tmp_path / "checkout").root == tmp_path / "checkout"
    monkeypatch.setenv("TRAINERD_HOME", "named")
    assert homes.find(None, tmp_path / "checkout").root == tmp_path / "named"
    assert homes.find("given/../given", None).root == tmp_path / "given"
    with pytest.raises(UsageError, match="not a folder"):
        homes.find("training_status.json", None)


@LINUX_ONLY
def test_another_users_status_does_not_make_a_folder_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its content would be obeyed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training_status.json").touch()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert homes.find(None, None).root != tmp_path


@pytest.mark.parametrize("words", [["--home", "{home}", "status"], ["status", "--home", "{home}"], ["status", "--home={home}", "--json"]])
def test_the_home_stands_before_or_after_the_command(home: Home, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """For all commands alike."""
    files.write_json(home.status, {"schema": 1, "state": "completed", "run": "found-it"})
    assert door.main([word.format(home=home.root) for word in words]) == 0
    assert "found-it" in capsys.readouterr().out


def test_an_error_of_ours_is_words_with_the_traceback_in_a_file(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person never sees a traceback; we find it."""
    monkeypatch.setattr("client.glance.show", lambda *_, **__: 1 // 0)
    assert door.main(["--home", str(home.root), "status"]) == 4
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told and "Traceback" not in told
    path = Path(told.split("traceback is in ")[1].strip().rstrip("."))
    assert "Traceback" in path.read_text("utf-8")
    path.unlink()


def test_the_menu_says_what_is_going_on_and_fits_a_narrow_terminal(person: Person, home: Home) -> None:
    """Above the choices how it stands; in 40 columns no line is broken by the terminal."""
    files.write_json(home.status, {"schema": 1, "state": "completed", "run": "r", "reason": "Completed. The model is in models/r."})
    person.environment["COLUMNS"] = "40"
    done = person.types("menu", given="")
    assert done.returncode == 0 and "Now: Completed. The model is in" in done.stdout and "  9  Exit\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 40
    person.environment["COLUMNS"] = "80"
    assert "  1  Quick test          3 epochs, 5,000 samples\n" in person.types("menu", given="").stdout


@LINUX_ONLY
def test_a_reader_that_has_enough_is_no_error(person: Person, home: Home) -> None:
    """`logs | head` ends quietly."""
    home.logs.mkdir()
    (home.logs / "training_20261121_120000.log").write_text("x" * 100 + "\n" * 200_000, encoding="utf-8")
    words = [sys.executable, str(DOOR), "--home", str(home.root), "logs", "-n", "200000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=person.environment) as reader:
        assert reader.stdout and reader.stderr
        reader.stdout.read(1)
        reader.stdout.close()
        assert reader.wait(60) == 0 and reader.stderr.read() == b""


def test_output_that_cannot_carry_a_character_shows_another(person: Person, home: Home) -> None:
    """A cp1252 pipe gets "?" and ASCII bars, never an error."""
    half = {"step": 1, "total_steps": 2}
    home.status.write_text(json.dumps({"schema": 1, "state": "completed", "run": "r", "reason": "ばつ \ud800", "progress": half}))
    words = [sys.executable, str(DOOR), "--home", str(home.root), "status"]
    done = subprocess.run(words, capture_output=True, env={**person.environment, "PYTHONIOENCODING": "cp1252"}, check=False)
    assert done.returncode == 0 and b"[############............] 50.0 %" in done.stdout and done.stderr == b""


@LINUX_ONLY
def test_stop_is_recorded_when_no_supervisor_is_left_to_hear_it(person: Person, home: Home) -> None:
    """Killed while it trains, or while it is paused: `stop` makes the run stopped, so that nothing brings it back; once more is 3."""
    for pause in (False, True):
        with Daemon(home, LONG, run=f"run-{pause}") as daemon:
            daemon.until_step(6)
            if pause:
                daemon.ask("pause")
                daemon.until_state(status.PAUSED)
            daemon.process.kill()
            daemon.process.wait(60)
        before = status.read(home)
        assert (before.state, before.alive) == (status.PAUSED if pause else status.CRASHED, False)
        assert person.types("status").returncode == (0 if pause else 4)
        done = person.types("stop")
        assert done.returncode == 0 and "goes on from the last checkpoint" in done.stdout, done.stderr
        record, after = runs.read(home, f"run-{pause}"), status.read(home)
        assert (record.wanted, record.outcome, after.state) == ("stopped", "stopped", status.STOPPED)
        assert after.status is not None and before.status is not None
        assert (after.status.progress.step, after.status.checkpoint) == (before.status.progress.step, before.status.checkpoint)
        assert not lock.is_held(home.supervisor_lock) and not list(home.control.glob("*.json"))
        assert person.types("stop").returncode == 3


def test_stopped_before_the_first_checkpoint_promises_none(home: Home) -> None:
    """Nothing was saved: the words say that resume begins at the beginning."""
    with Daemon(home, {**LONG, "prepare": 5000}) as daemon:
        daemon.until(lambda reading: reading.status is not None and reading.status.phase is not None and reading.status.phase.done)
        daemon.ask("stop")
        assert daemon.process.wait(60) == 0
    assert status.read(home).reason == "Stopped; nothing was saved yet: `resume` begins at the beginning."
