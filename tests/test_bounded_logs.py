"""Logs and events of a long run stay small, whatever a task prints and however often something happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.commands import logs as logs_command
from tests.person import Person
from tests.supervised import RUN, Daemon, wait_for
from trainerd.contract import files, runs, status
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord
from trainerd.machine import append
from trainerd.supervisor import journal, logs
from trainerd.supervisor.journal import Journal

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="tests/windows has its own")
LONG = {"steps": 100_000, "every": 50, "pause": 0.01}


def size(path: Path) -> int:
    """0 for a file that was replaced between two looks."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@POSIX
def test_a_log_that_grows_is_cut_while_the_trainer_writes(home: Home) -> None:
    """A task that prints 40 MB: never more than two parts on disk, the newest lines in order, and the trainer waits for nobody."""
    with Daemon(home, {**LONG, "print_bytes": 50_000, "steps": 800, "pause": 0.002}) as daemon:
        largest = 0
        while daemon.process.poll() is None:
            largest = max(largest, sum(map(size, home.logs.glob("*"))))
        assert daemon.process.wait(60) == 0
    assert largest < 5 * logs.LOG_BYTES  # what is printed between two looks comes on top
    (log,) = home.logs.glob("*.log")
    content = logs.part_before(log).read_bytes() + log.read_bytes()
    numbers = [int(line) for line in content.split(b"\n") if line.isdigit()]
    assert numbers == sorted(numbers) and numbers[-1] == 799 and b"\0" not in content
    assert log.stat().st_mode & 0o077 == logs.part_before(log).stat().st_mode & 0o077 == 0


@POSIX
def test_the_last_words_are_found_across_a_cut(home: Home) -> None:
    """A death right after a cut is explained by the part before; `logs -n` shows it too; the parts go with their log."""
    path, log = logs.open_new(home)
    log.write(b"x" * logs.LOG_BYTES + b"\nValueError: the end\n")
    logs.cut(path)
    assert path.stat().st_size == 0
    log.write(b"after\n")
    assert logs.tail(path).endswith("ValueError: the end\nafter\n")
    log.close()
    done = Person(home.root).types("logs", "-n", "2")
    assert done.stdout == "ValueError: the end\nafter\n"
    for _ in range(logs.KEEP_LOGS + 2):
        logs.open_new(home)[1].close()
    assert not logs.part_before(path).exists() and len(list(home.logs.iterdir())) == logs.KEEP_LOGS


@POSIX
def test_a_full_disk_does_not_keep_a_log_from_being_cut(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the earlier part cannot be kept, it is given up: the log must not be what fills the disk."""
    path, log = logs.open_new(home)
    log.write(b"x" * (logs.LOG_BYTES + 1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logs, "_copy_rest", full)
    logs.cut(path)
    assert path.stat().st_size == 0
    log.close()


@POSIX
def test_a_link_planted_for_the_next_log_is_not_followed(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """training_logs may hold anything: a name that is taken is passed over, and nothing is written through it."""
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    home.logs.mkdir()
    monkeypatch.setattr(logs.time, "strftime", lambda _: "training_20261121_120000")
    for name in ("training_20261121_120000.log", "training_20261121_120000_2.log"):
        (home.logs / name).symlink_to(victim)
    (home.logs / "training_20261121_120000_3.log").symlink_to(tmp_path / "not there")
    path, log = logs.open_new(home)
    assert path.name == "training_20261121_120000_4.log"
    log.write(b"x" * (logs.LOG_BYTES + 1))
    logs.part_before(path).symlink_to(victim)
    logs.cut(path)
    log.close()
    assert victim.read_text("utf-8") == "mine" and not (tmp_path / "not there").exists()
    with pytest.raises(FileExistsError):
        append.create(home.logs / "training_20261121_120000.log")


def test_following_goes_on_after_a_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`logs -f`: a log that became shorter is read from its beginning."""
    path = tmp_path / "a.log"
    path.write_bytes(b"one\ntwo\n")
    offset = logs_command._print_from(path, 0)
    path.write_bytes(b"new\n")
    assert logs_command._print_from(path, offset) == 4
    assert capsys.readouterr().out.splitlines() == ["one", "two", "new"]


def test_events_keep_their_beginning_and_the_newest(home: Home) -> None:
    """100,000 events: a megabyte at most, whole lines, the first one, what was left out, and the last ones in order."""
    record = RunRecord("r", "t", 1.0, {"task": "t"}, {})
    runs.write(home, record)
    notes = Journal(home, record)
    notes.note("started", instance="i")
    for number in range(12_000):
        notes.note("warning", text="x" * 200, number=number)
    path = home.run("r").events
    assert path.stat().st_size <= journal.EVENTS_BYTES + 1000
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["kind"] for line in lines[:3]] == ["started", "trimmed", "warning"]
    numbers = [line["number"] for line in lines[2:]]
    assert numbers == list(range(numbers[0], 12_000)) and len(numbers) > 1500


def test_what_the_supervisor_says_ends_after_a_megabyte(tmp_path: Path) -> None:
    """An error that comes back with every tick fills no disk: the log ends with a word that it does."""
    code = "from trainerd.supervisor import journal\nfor n in range(30000): journal.say('x' * 99)"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert len(done.stderr) < journal.SAID_BYTES + 100 and done.stderr.rstrip().endswith(b"(nothing more is written here)")


@POSIX
def test_every_refusal_restart_and_pause_has_an_event_with_its_cause(home: Home) -> None:
    """events.jsonl tells a run's story: start, death and why, restart, pause, resume, refusal, stop."""
    with Daemon(home, {"at": 4, "do": "raise:boom"}, LONG) as daemon:
        daemon.until(lambda r: r.state == status.RUNNING and r.status is not None and r.status.trainer.restarts == 1)
        files.write_atomic(home.control / "x.json", b"{}")
        daemon.outcome("x")
        daemon.until_step(3)
        daemon.ask("pause")
        daemon.until_state(status.PAUSED)
        daemon.ask("resume")
        daemon.until_state(status.RUNNING)
        daemon.ask("stop")
        assert daemon.process.wait(60) == 0
    events = [json.loads(line) for line in home.run(RUN).events.read_text("utf-8").splitlines()]
    kinds = [event["kind"] for event in events]
    wanted = ["started", "trainer started", "death", "trainer started", "request refused"]
    wanted += ["pause", "resume", "trainer started", "stop", "stopped"]
    assert [kind for kind in kinds if kind in wanted] == wanted
    assert "boom" in events[kinds.index("death")]["why"] and "none of" in events[kinds.index("request refused")]["reason"]


@POSIX
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_steps_keep_disk_handles_and_memory_bounded(home: Home) -> None:
    """10^6 steps as fast as they come: once warm the supervisor's memory stays, its handles and the disk stay from the first tenth on."""
    with Daemon(home, {"steps": 1_000_000, "every": 100_000, "pause": 0, "print_bytes": 100}) as daemon:
        seen: dict[int, tuple[int, int, int]] = {}
        folder = Path(f"/proc/{daemon.process.pid}")

        def look() -> bool:
            reading = daemon.reading()
            step = (reading.status.progress.step or 0) if reading.status else 0
            if reading.alive and step // 100_000 not in seen:
                rss = int((folder / "statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
                disk = sum(size(path) for path in home.root.rglob("*") if path.is_file())
                seen[step // 100_000] = (rss, len(list((folder / "fd").iterdir())), disk)
            return daemon.process.poll() is not None

        wait_for(look, 1500, "a million steps")
        assert daemon.process.wait(60) == 0 and runs.read(home, RUN).step == 1_000_000
    tenths = [seen[number] for number in sorted(seen) if number >= 1]
    print([(rss // 1000, handles, disk // 1000) for rss, handles, disk in tenths])
    assert len(tenths) >= 5
    memory = [rss for rss, _, _ in tenths]
    assert max(memory) - memory[len(memory) // 2] < 3e6 and max(memory) < 40e6
    assert len({handles for _, handles, _ in tenths}) <= 2 and max(disk for *_, disk in tenths) < 5 * logs.LOG_BYTES
