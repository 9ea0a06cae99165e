"""run.json and a home's folders as a person, a disk or an enemy may leave them: named, left alone, never trained over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import choose, follow
from tests.person import ROOT, Person
from tests.supervised import RUN, Daemon, supervise_here
from trainerd.config.model import RunConfig
from trainerd.contract import files, ground, requests, runs, status
from trainerd.contract.errors import NothingRunning, Refused, Unreadable
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord

LINUX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="links, owners and modes of POSIX")
LONG = {"steps": 100_000, "every": 5, "pause": 0.01}
GONE = object()
DAMAGE = [
    ("plan", "x"), ("plan", []), ("outcome", ["stopped"]), ("outcome", "dancing"), ("wanted", "everything"), ("wanted", None),
    ("config", {}), ("config", []),
    ("config", {"task": "another"}), ("identity", None), ("identity", GONE), ("step", "7"), ("step", -1), ("step", True),
    ("step", 10**40), ("sources", ["a.py"]), ("sources", {"a.py": 5}), ("created_at", "noon"), ("created_at", 1e300), ("ended_at", []),
    ("id", "another"), ("id", 5), ("task", None), ("reason", None), ("created_at", GONE),
]  # fmt: skip


def write(home: Home, name: str, created_at: float = 1.0, **facts: Any) -> None:
    runs.write(home, RunRecord(name, "cadence", created_at, RunConfig().model_dump(mode="json"), {"task": "cadence"}, **facts))


def damage(home: Home, name: str, key: str = "plan", value: Any = "x") -> bytes:
    path = home.run(name).record
    document = json.loads(path.read_text("utf-8"))
    document[key] = value
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not GONE}), encoding="utf-8")
    return path.read_bytes()


@pytest.mark.parametrize(("key", "value"), DAMAGE, ids=[f"{key}-{number}" for number, (key, _) in enumerate(DAMAGE)])
def test_a_part_of_the_wrong_kind_is_damage(home: Home, key: str, value: Any) -> None:
    """Every field of run.json is checked where it is read; the message names the part, the file, and what to do."""
    write(home, "mine", step=5)
    assert runs.read(home, "mine").step == 5 and runs.damaged(home) == {}
    damage(home, "mine", key, value)
    with pytest.raises(Unreadable, match="damaged") as caught:
        runs.read(home, "mine")
    assert str(home.run("mine").record) in caught.value.message and caught.value.hint
    assert key in caught.value.message or key in ("id", "config")
    assert list(runs.damaged(home)) == ["mine"] and runs.names(home) == []


def test_a_damaged_run_is_named_not_skipped(home: Home, tmp_path: Path) -> None:
    """`resume` of it, or of the run last looked at, fails in words; `start` warns; `runs` shows it; nothing is changed or removed."""
    write(home, "old", 1.0)
    write(home, "mine", 2.0, step=5)
    damaged = damage(home, "mine")
    for asked in ("mine", None):
        status.write(home, status.Status(run="mine", state=status.STOPPED))
        with pytest.raises(Unreadable, match=r"run mine .* is damaged: 'plan' is 'x'"):
            choose.unfinished(home, asked)
    status.write(home, status.Status(run="old", state=status.STOPPED))
    choice = choose.unfinished(home, None)
    assert choice.run == "old" and "mine" in choice.warnings[0] and "left alone" in choice.warnings[0]
    damage(home, "old")
    home.status.unlink()
    with pytest.raises(Unreadable, match="is damaged"):
        choose.unfinished(home, None)
    person = Person(home.root, tmp_path / "state")
    done = person.types("resume", "mine")
    assert done.returncode == 4 and "'plan' is 'x'" in done.stderr and "--no-resume" in done.stderr
    assert "damaged" in person.types("runs").stdout and "'plan' is 'x'" in person.types("runs", "show", "mine").stdout
    taken = person.types("start", "--name", "mine", "--dataset-size", "100")
    assert taken.returncode == 5 and "'plan' is 'x'" in taken.stderr
    assert home.run("mine").record.read_bytes() == damaged
    with pytest.raises(NothingRunning):
        choose.unfinished(Home(home.root / "another"), None)


def test_start_warns_of_a_damaged_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the very run that was meant: said before a new one begins; --no-resume asked for a new one and is not told."""
    write(home, "mine")
    damage(home, "mine")
    monkeypatch.setattr(choose, "look_at_data", lambda _: {})
    asked = choose.Resolved(RunConfig(), frozenset())
    assert "mine" in choose.choose(home, asked, resume=True).warnings[0]
    assert choose.choose(home, asked, resume=False).warnings == []


def _file(path: Path) -> None:
    path.write_text("mine", encoding="utf-8")


def _link_out(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.mkdir(exist_ok=True)
    path.symlink_to(target)


@LINUX_ONLY
@pytest.mark.parametrize("name", ["control", "runs", "models", "training_logs", "cache", f"models/{RUN}", f"checkpoints/{RUN}"])
@pytest.mark.parametrize("put", [_file, _link_out])
def test_a_home_with_something_else_in_place_of_a_folder_is_refused(home: Home, name: str, put: Callable[[Path], None]) -> None:
    """A plain file, or a link out of the home: refused with its name and what to do, once, before anything starts."""
    path = home.root / name
    path.parent.mkdir(exist_ok=True)
    put(path)
    with pytest.raises(Refused) as caught:
        ground.check(home, RUN)
    assert str(path) in caught.value.message and "Move it away" in caught.value.hint
    if name != "control":  # a request cannot be written there at all
        with Daemon(home, LONG) as daemon:
            assert daemon.process.wait(60) == 5
            said = daemon.errors.read_text(encoding="utf-8")
            assert str(path) in said and len(said.strip().splitlines()) == 1
    assert not (home.root.parent / "elsewhere").exists() or not list((home.root.parent / "elsewhere").iterdir())


@LINUX_ONLY
@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "run.json", "config.yml"])
def test_a_link_among_the_files_of_a_run_is_refused(home: Home, tmp_path: Path, name: str) -> None:
    """A home from elsewhere with a link in a run: what is written into the run must not land in ~/.bashrc."""
    supervise_here(home, {"steps": 3})
    victim, path = tmp_path / "bashrc", home.run(RUN).folder / name
    content = path.read_bytes() if path.exists() else b"mine\n"
    path.unlink(missing_ok=True)
    victim.write_bytes(content)
    path.symlink_to(victim)
    with Daemon(home, {"steps": 6}, resume=True) as daemon:
        assert daemon.process.wait(60) == 5
        assert f"{name} is a link" in daemon.errors.read_text(encoding="utf-8")
    with pytest.raises(OSError, match="symbolic links"):
        files.append_line(path, "{}")
    assert victim.read_bytes() == content


@LINUX_ONLY
def test_start_says_what_is_wrong_with_the_home(home: Home, tmp_path: Path) -> None:
    """In words, exit 5, from the command a person types; nothing was started."""
    home.root.joinpath("models").write_text("mine", encoding="utf-8")
    done = Person(home.root, tmp_path / "state").types("start", "--dataset-size", "100")
    assert done.returncode == 5 and "models is a file" in done.stderr and not home.status.exists()


@LINUX_ONLY
def test_a_folder_that_became_a_file_is_not_tried_again(home: Home) -> None:
    """The trainer dies, and models/ is a file by then: failed at once with the reason, not after five restarts."""
    supervisor = supervise_here(home, {"at": 3, "do": "spoil:models"})
    assert supervisor.result == status.FAILED
    assert "models is a file" in supervisor.report.status.reason and "Move it away" in supervisor.report.status.reason
    assert supervisor.report.status.trainer.restarts == 1


@LINUX_ONLY
@pytest.mark.skipif(sys.platform == "win32" or os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("name", ["", "runs", "control"])
def test_a_home_of_another_user_is_not_trusted(home: Home, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who owns it could put code there: refused, with what to do; looking at it is no danger. sudo's own user may."""
    folder = home.root / name
    folder.mkdir(exist_ok=True)
    os.chown(folder, 12345, 12345)
    person = Person(home.root, tmp_path / "state")
    done = person.types("start", "--dataset-size", "100")
    assert done.returncode == 5 and "belongs to another user (number 12345)" in done.stderr and "chown" in done.stderr
    assert person.types("status").returncode == 3
    monkeypatch.setenv("SUDO_UID", "12345")
    assert ground.check(home) == []


@LINUX_ONLY
def test_a_home_open_to_everybody_is_said(home: Home) -> None:
    """A warning at the start: on some file systems it cannot be otherwise."""
    home.root.chmod(0o777)
    with Daemon(home, {"steps": 5}) as daemon:
        assert daemon.process.wait(60) == 0
        shown = daemon.reading().status
        assert shown is not None and "chmod o-w" in shown.warnings[0]


@LINUX_ONLY
def test_what_is_made_in_a_home_is_private(home: Home, tmp_path: Path) -> None:
    """An existing home keeps its mode (it may be a checkout); every folder and file made in it is its user's alone."""
    home.root.chmod(0o755)
    home.logs.mkdir()
    home.logs.chmod(0o755)
    task = tmp_path / "mine.py"
    task.write_text("x = 1\n", encoding="utf-8")
    new = Home(tmp_path / "new" / "home")
    before = os.umask(0o022)
    try:
        with Daemon(home, {"steps": 10}, task_file=str(task)) as daemon:
            daemon.errors.unlink()
            assert daemon.process.wait(60) == 0
        follow.prepare_home(new)
        requests.send(new, requests.Request("stop", "i"))
    finally:
        os.umask(before)
    assert home.root.stat().st_mode & 0o777 == home.logs.stat().st_mode & 0o777 == 0o755
    open_to_others = [p for p in home.root.rglob("*") if p.stat().st_mode & 0o077 and p != home.logs]
    assert open_to_others == []
    script = "import os, sys; from client.main import main; main(['--home', sys.argv[1], 'runs']); print(oct(os.umask(0)))"
    done = subprocess.run([sys.executable, "-c", script, str(home.root)], cwd=ROOT, capture_output=True, text=True, umask=0o022, check=True)
    assert done.stdout.splitlines()[-1] == "0o77"
    assert new.root.stat().st_mode & 0o777 == new.control.stat().st_mode & 0o777 == 0o700
