"""The contract's files: atomic replacement, reading what may be damaged, names, and clocks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainerd.contract import clock, files, runs
from trainerd.contract.errors import ConfigError, Refused, TrainerdError, Unreadable
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord

LINUX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


def test_a_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """write_json and read_json are each other's inverse, and leave no other file."""
    path = tmp_path / "a.json"
    files.write_json(path, {"schema": 1, "text": "Läufe ✓", "n": 1e-4}, durable=True)
    assert files.read_json(path, "The file") == {"schema": 1, "text": "Läufe ✓", "n": 1e-4}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    """What cannot be written changes nothing."""
    path = tmp_path / "a.json"
    files.write_json(path, {"old": True})
    with pytest.raises(ValueError):
        files.write_json(path, {"loss": float("nan")})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "in the way").touch()
    with pytest.raises(OSError):
        files.write_atomic(tmp_path / "folder", b"x", busy_seconds=0.1)
    assert files.read_json(path, "The file") == {"old": True}
    assert sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


@LINUX_ONLY
def test_a_reader_never_sees_half_a_file_even_when_the_writer_is_killed(tmp_path: Path) -> None:
    """Replace, never overwrite: a writer in a tight loop, killed at any moment, leaves the old or the new document, whole."""
    path = tmp_path / "a.json"
    code = (
        "import itertools, sys\nfrom pathlib import Path\nfrom trainerd.contract import files\n"
        "for n in itertools.count(1): files.write_json(Path(sys.argv[1]), {'n': n, 'filler': [n] * 5000})"
    )
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[1]) as writer:
            seen = 0
            while seen < 40:
                try:
                    document = files.read_json(path, "The file")
                except FileNotFoundError:
                    continue
                assert document["filler"] == [document["n"]] * 5000
                seen += 1
            os.kill(writer.pid, signal.SIGKILL)
        document = files.read_json(path, "The file")
        assert document["filler"] == [document["n"]] * 5000


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00garbage", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1, 2]", "no JSON object"),
        (b'{"schema": 2}', "schema 2"),
        (b'"' + b"x" * 5000 + b'"', "larger than"),
    ],
)
def test_a_damaged_or_newer_document_is_refused_in_words(tmp_path: Path, content: bytes, says: str) -> None:
    """Readers refuse what they cannot read, and say which file and why."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=says) as caught:
        files.read_json(path, "The file", max_bytes=4000 if b"xxx" in content else 1 << 20)
    assert str(path) in str(caught.value)


def test_lines_are_appended_whole_after_a_torn_one(tmp_path: Path) -> None:
    """A line torn by a crash spoils no other."""
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b"')
    files.append_line(path, '{"c": 3}')
    assert path.read_bytes() == b'{"a": 1}\n{"b"\n{"c": 3}\n'


def test_removing_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    """remove() states an end, not an act."""
    files.remove(tmp_path / "nothing")


def test_a_run_record_survives_and_a_damaged_one_is_refused(home: Home) -> None:
    """run.json comes back as it was; unknown keys are ignored, missing parts are said."""
    record = RunRecord("r1", "cadence", 5.0, {"task": "cadence", "seed": 1}, {"task": "cadence"})
    runs.write(home, record)
    assert runs.read(home, "r1") == record
    document = json.loads(home.run("r1").record.read_text("utf-8"))
    files.write_json(home.run("r1").record, {**document, "later": 1})
    assert runs.read(home, "r1") == record
    assert runs.names(home) == ["r1"]
    for broken in ({k: v for k, v in document.items() if k != "config"}, {**document, "config": 5}, {**document, "id": "other"}):
        files.write_json(home.run("r1").record, broken)
        with pytest.raises(Unreadable):
            runs.read(home, "r1")
    assert runs.names(home) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "con", "NUL.txt", "-a", "a" * 81, "a.", "é"])
def test_names_no_system_could_hold_are_refused(name: str) -> None:
    """A run's name becomes a folder's, on every system."""
    assert not runs.valid_name(name)


def test_runs_are_listed_oldest_first(home: Home) -> None:
    """By the time they were made, not by name."""
    for name, at in (("b", 1.0), ("a", 2.0), ("c", 0.5)):
        runs.write(home, RunRecord(name, "t", at, {"task": "t"}, {}))
    assert runs.names(home) == ["c", "b", "a"]


def test_errors_say_what_and_what_to_do_and_carry_their_exit_code() -> None:
    """One tree; the exit code belongs to the error."""
    assert str(TrainerdError("It broke.", "Mend it.")) == "It broke. Mend it."
    assert (TrainerdError("x").exit_code, ConfigError(["a"]).exit_code, Refused("x").exit_code) == (4, 2, 5)
    both = ConfigError(["a = 1: no.", "b = 2: no."])
    assert "2 problems" in str(both) and "a = 1" in str(both) and "b = 2" in str(both)


def test_the_boot_has_one_name() -> None:
    """Two processes of one boot may compare their monotonic clocks."""
    code = "from trainerd.contract import clock; print(clock.boot_id())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout.strip() == clock.boot_id()
