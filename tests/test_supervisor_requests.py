"""stop, pause, resume, save: what a client asks by files, and what a real supervisor with a real process does about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.supervised import RUN, Daemon, alive, journal, starts, wait_for
from trainerd.contract import lock, requests, runs, status
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home
from trainerd.contract.requests import Request

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals; tests/windows has its own")
LONG = {"steps": 100_000, "every": 1000, "pause": 0.01}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    root = tmp_path / "home"
    root.mkdir()
    return Home(root)


def committed(home: Home) -> list[int]:
    return sorted(int(path.stem.rpartition("_")[2]) for path in home.run(RUN).checkpoints.glob("*.json"))


def test_stop_commits_and_everything_is_gone(home: Home) -> None:
    """`stop` ends with a checkpoint, no process, no lock, a status that says so, and a run that is not wanted any more."""
    with Daemon(home, LONG) as daemon:
        reading = daemon.until_step(3)
        began = time.monotonic()
        request = daemon.ask("stop")
        assert daemon.process.wait(60) == 0
        assert time.monotonic() - began < 20
        ended = daemon.reading()
        assert ended.status is not None and reading.status is not None
        assert (ended.state, ended.alive, ended.status.trainer.pid) == (status.STOPPED, False, None)
        assert not alive(reading.status.trainer.pid or 0)
        assert committed(home)[-1] >= 3
        assert [(r.id, r.outcome) for r in ended.status.requests][-1] == (request, "accepted")
        record = runs.read(home, RUN)
        assert (record.wanted, record.outcome, record.step) == ("stopped", "stopped", committed(home)[-1])
        assert requests.pending(home) == []


def test_a_stop_is_noticed_at_once(home: Home) -> None:
    """The watch on control/ wakes the supervisor; nobody waits for the next scan."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(3)
        taken = []
        for _ in range(5):
            began = time.monotonic()
            path = requests.send(home, Request("pause", "somebody else"))
            wait_for(lambda path=path: not path.exists(), 5, "the request to be deleted")  # type: ignore[misc]
            taken.append(time.monotonic() - began)
        assert sorted(taken)[2] < 0.3, taken


def test_stop_is_quick_while_others_want_the_whole_machine(home: Home) -> None:
    """A trainer that has stepped back behind everything writes 50 MB and is gone within five seconds, on saturated cores."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(os.cpu_count() or 1)]
    try:
        with Daemon(home, {**LONG, "polite": True, "save_bytes": 50_000_000, "pause": 0.001}) as daemon:
            daemon.until_step(3)
            began = time.monotonic()
            daemon.ask("stop")
            assert daemon.process.wait(60) == 0
            assert time.monotonic() - began < 20
            assert len(committed(home)) == 1
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def test_stop_now_does_not_wait_for_a_save(home: Home) -> None:
    """`stop --now` saves nothing, even while a slow stop is under way."""
    with Daemon(home, {**LONG, "save_seconds": 30}) as daemon:
        daemon.until_step(3)
        daemon.ask("stop")
        daemon.until_state(status.STOPPING)
        daemon.ask("stop", now=True)
        assert daemon.process.wait(60) == 0
        assert committed(home) == []
        assert "Computed again on resume" in daemon.reading().reason


def test_a_trainer_that_ignores_the_request_is_killed_and_the_loss_is_named(home: Home) -> None:
    """The client's time limit is kept: the whole group is killed, and `stop` says what was lost."""
    with Daemon(home, {**LONG, "at": 4, "do": "deaf"}) as daemon:
        reading = daemon.until_step(8)
        daemon.ask("stop", timeout_seconds=0.5)
        assert daemon.process.wait(60) == 0
        assert reading.status is not None
        assert not alive(reading.status.trainer.pid or 0)
        reason = daemon.reading().reason
        assert "did not leave in time and was killed" in reason and "steps" in reason


def test_stop_while_preparing_or_recovering_is_quick(home: Home) -> None:
    """There is nothing to lose yet: nobody waits long."""
    with Daemon(home, {"prepare": 100_000, "do": "deaf"}) as daemon:
        daemon.until(lambda r: r.status is not None and r.status.phase is not None and r.status.phase.name == "preparing")
        daemon.ask("stop")
        assert daemon.process.wait(60) == 0
    with Daemon(home, {"do": "exit-first"}, run="fake-2") as daemon:
        daemon.until(lambda r: r.state == status.RECOVERING and r.status is not None and r.status.trainer.restarts >= 3)
        daemon.ask("stop")
        assert daemon.process.wait(60) == 0
        assert daemon.reading().state == status.STOPPED


def test_pause_frees_the_memory_and_resume_goes_on(home: Home) -> None:
    """While paused no trainer lives and the supervisor answers; resume goes on from the checkpoint the pause wrote."""
    with Daemon(home, LONG, LONG) as daemon:
        running = daemon.until_step(3)
        daemon.ask("pause")
        paused = daemon.until_state(status.PAUSED)
        assert running.status is not None and paused.status is not None
        assert not alive(running.status.trainer.pid or 0)
        assert (paused.alive, paused.status.trainer.pid, runs.read(home, RUN).wanted) == (True, None, "paused")
        saved = committed(home)[-1]
        assert daemon.outcome(daemon.ask("pause")) == "done"
        assert daemon.outcome(daemon.ask("save")).startswith("refused")
        daemon.ask("resume")
        again = daemon.until_step(saved + 2)
        assert again.status is not None
        assert (again.status.trainer.restarts, runs.read(home, RUN).wanted, len(starts(home))) == (0, "running", 2)
        assert daemon.outcome(daemon.ask("resume")) == "done"
        daemon.ask("pause")
        daemon.until_state(status.PAUSED)
        daemon.ask("stop")
        assert daemon.process.wait(60) == 0
        kinds = [line["kind"] for line in journal(home)]
        assert [kind for kind in kinds if kind in ("pause", "resume", "stop")] == ["pause", "resume", "pause", "stop"]


def test_resume_while_still_pausing_starts_again(home: Home) -> None:
    """A resume that comes before the pause is complete is not lost."""
    with Daemon(home, {**LONG, "save_seconds": 1}, LONG) as daemon:
        daemon.until_step(3)
        daemon.ask("pause")
        daemon.until(lambda r: r.reason.startswith("Pausing"))
        daemon.ask("resume")
        daemon.until(lambda r: len(starts(home)) == 2 and r.state == status.RUNNING)


def test_save_is_answered_when_the_checkpoint_is_on_disk(home: Home) -> None:
    """`done` means durable; a trainer that dies first makes it a refusal."""
    with Daemon(home, {**LONG, "save_seconds": 0.3}) as daemon:
        daemon.until_step(3)
        assert daemon.outcome(daemon.ask("save")) == "done"
        assert len(committed(home)) == 1
        reading = daemon.reading()
        assert reading.status is not None and reading.status.checkpoint is not None
        assert reading.status.checkpoint.step == committed(home)[0]
        ident = daemon.ask("save")
        wait_for(lambda: not requests.pending(home), 5, "the request to be taken")
        os.kill(reading.status.trainer.pid or 0, signal.SIGKILL)
        assert daemon.outcome(ident).startswith("refused: the trainer ended")


def test_a_request_for_another_supervisor_is_deleted_without_effect(home: Home) -> None:
    """Requests left from an earlier life do nothing."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        path = requests.send(home, Request("stop", "f" * 32))
        wait_for(lambda: not path.exists(), 5, "the request to be deleted")
        later = daemon.until_step(30)
        assert later.status is not None
        assert [r.verb for r in later.status.requests] == ["start"]


def test_the_same_request_twice_is_one_request(home: Home) -> None:
    """A client that writes its request again pauses nothing twice."""
    with Daemon(home, LONG, LONG) as daemon:
        daemon.until_step(2)
        request = Request("pause", daemon.instance)
        requests.send(home, request)
        daemon.until_state(status.PAUSED)
        daemon.ask("resume")
        daemon.until(lambda r: len(starts(home)) == 2 and r.state == status.RUNNING)
        path = requests.send(home, request)
        wait_for(lambda: not path.exists(), 5, "the request to be deleted")
        time.sleep(0.3)
        assert daemon.reading().state == status.RUNNING


def test_words_it_does_not_know_are_refused(home: Home) -> None:
    """Unknown verbs, other shapes, links and garbage are deleted and named; nothing else happens."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        bad = {
            "verb": {"schema": 1, "verb": "destroy", "instance": daemon.instance, "id": "verb", "arguments": {}, "at": 0},
            "shape": {"schema": 1, "verb": "stop", "instance": daemon.instance, "id": "shape", "arguments": [], "at": 0},
            "name": {"schema": 1, "verb": "stop", "instance": daemon.instance, "id": "other", "arguments": {}, "at": 0},
        }
        for name, document in bad.items():
            (home.control / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
        (home.control / "garbage.json").write_bytes(b"\0\xff{")
        (home.control / "link.json").symlink_to("/etc/passwd")
        wait_for(lambda: not requests.pending(home), 5, "the requests to be deleted")
        for name in (*bad, "garbage", "link"):
            assert daemon.outcome(name).startswith("refused"), name
        assert daemon.outcome(daemon.ask("start")).startswith("refused")
        assert daemon.reading().state == status.RUNNING
        assert Path("/etc/passwd").exists()


def test_a_signal_ends_the_processes_but_the_run_stays_wanted(home: Home) -> None:
    """Log-out or shutdown: a checkpoint is written, everything leaves, and the run is resumed by the next start."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(3)
        os.kill(daemon.process.pid, signal.SIGTERM)
        assert daemon.process.wait(60) == 0
        record = runs.read(home, RUN)
        assert (record.wanted, record.outcome, committed(home)[-1] >= 3) == ("running", None, True)
        assert daemon.reading().state == status.STOPPED
    with Daemon(home, {"steps": 20, "pause": 0.001}, resume=True, config=None) as daemon:
        assert daemon.process.wait(60) == 0
        assert daemon.reading().state == status.COMPLETED


def test_a_second_signal_does_not_wait(home: Home) -> None:
    """Who presses twice means it."""
    with Daemon(home, {**LONG, "save_seconds": 30}) as daemon:
        daemon.until_step(3)
        os.kill(daemon.process.pid, signal.SIGINT)
        daemon.until_state(status.STOPPING)
        os.kill(daemon.process.pid, signal.SIGINT)
        assert daemon.process.wait(60) == 0


def test_closing_the_terminal_changes_nothing(home: Home) -> None:
    """SIGHUP is ignored."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(3)
        os.kill(daemon.process.pid, signal.SIGHUP)
        step = daemon.until_step(20)
        assert step.alive


def test_in_the_foreground_ctrl_c_is_a_stop_and_the_exit_code_is_the_result(home: Home) -> None:
    """`optimized_train.py`, where the client tells what goes on: the supervisor itself prints nothing; 4 means failed."""
    with Daemon(home, {"at": 2, "do": "permanent:no such column", "pause": 0.001}, options=["--foreground"]) as daemon:
        assert daemon.process.wait(60) == 4
        assert "no such column" in daemon.reading().reason and daemon.errors.read_text(encoding="utf-8") == ""
    with Daemon(home, LONG, options=["--foreground"], run="c") as daemon:
        daemon.until_step(3)
        os.kill(daemon.process.pid, signal.SIGINT)
        assert daemon.process.wait(60) == 0
        record = runs.read(home, "c")
        assert (record.wanted, record.outcome) == ("stopped", "stopped")
    assert not lock.is_held(home.supervisor_lock)


@pytest.mark.parametrize("seconds", ["1e400", "NaN", "-1", "0", "true", '"soon"', "[5]", "1" + "0" * 400, "90000"])
def test_a_time_limit_that_is_none_is_refused_before_anything_happens(home: Home, seconds: str) -> None:
    """stop and pause with an impossible timeout_seconds: refused with the value, nothing recorded, training goes on."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        for number, verb in enumerate(("stop", "pause")):
            text = f'{{"schema": 1, "verb": "{verb}", "instance": "{daemon.instance}", "id": "r{number}", "at": 0, "arguments": '
            (home.root / "written").write_text(f'{text}{{"timeout_seconds": {seconds}}}}}', encoding="utf-8")
            (home.root / "written").rename(home.control / f"r{number}.json")
            assert "timeout_seconds is" in daemon.outcome(f"r{number}")
        assert daemon.reading().state == status.RUNNING and runs.read(home, RUN).wanted == "running"
        assert not {"stop", "pause"} & {line["kind"] for line in journal(home)}
        assert daemon.outcome(daemon.ask("stop", now="false")).startswith("refused")


def test_what_is_refused_has_an_event_with_its_reason(home: Home) -> None:
    """A stranger's request, one of another user, too large, not JSON, for another supervisor: each named for what it is."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        request = {"schema": 1, "verb": "stop", "instance": daemon.instance, "arguments": {}, "at": 0}
        says = {"verb": "'explode' is none of", "large": "larger than", "garbage": "not JSON", "instance": "another supervisor"}
        if os.getuid() == 0:
            says["owner"] = "another user wrote it"
        for name in says:
            path = home.root / name
            changed = {**request, "id": name, "verb": "explode" if name == "verb" else "stop"}
            changed["instance"] = "f" * 32 if name == "instance" else daemon.instance
            content = json.dumps(changed) + " " * (requests.MAX_BYTES if name == "large" else 0)
            path.write_text("{" if name == "garbage" else content, encoding="utf-8")
            if name == "owner":
                os.chown(path, 12345, 12345)
            path.rename(home.control / f"{name}.json")
        wait_for(lambda: not requests.pending(home), 5, "the requests to be deleted")
        told = {line["file"].removesuffix(".json"): line["reason"] for line in journal(home) if line["kind"] == "request refused"}
        assert set(told) == set(says) and all(words in told[name] for name, words in says.items()), told
        assert "status" not in told["garbage"] and "next start" not in told["garbage"]
        assert daemon.reading().state == status.RUNNING


def test_a_flood_of_requests_is_taken_in_portions(home: Home) -> None:
    """5,000 files in control/: the status stays fresh, a real request is answered soon, the events stay few, all are gone."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        elsewhere = home.root / "flood"
        elsewhere.mkdir()
        for number in range(5_000):
            (elsewhere / f"f{number}.json").touch()
        for path in elsewhere.iterdir():
            path.rename(home.control / path.name)
        ident, oldest = daemon.ask("pause"), 0.0
        path = home.control / f"{ident}.json"
        os.utime(path, (1, 1))
        began = time.monotonic()
        while any(home.control.glob("f*.json")):
            reading = daemon.reading()
            assert reading.state != status.NOT_ANSWERING and time.monotonic() - began < 60
            if reading.status is not None:
                oldest = max(oldest, time.monotonic() - reading.status.updated_monotonic)
            time.sleep(0.05)
        daemon.until_state(status.PAUSED)
        assert oldest < 3.0
        assert sum(line["kind"] == "request refused" for line in journal(home)) < 1_000


def test_a_control_folder_that_is_a_link_is_not_obeyed(home: Home, tmp_path: Path) -> None:
    """control/ replaced by a link to somebody's folder: nothing there is read or deleted, and it is said."""
    mine = tmp_path / "my documents"
    mine.mkdir()
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        document = {"schema": 1, "verb": "stop", "instance": daemon.instance, "id": "letter", "arguments": {}, "at": 0}
        (mine / "letter.json").write_text(json.dumps(document), encoding="utf-8")
        home.control.rename(home.root / "was control")
        home.control.symlink_to(mine)
        reading = daemon.until(lambda r: r.status is not None and r.status.warnings)
        assert reading.status is not None and "control is a link" in reading.status.warnings[0]
        daemon.until_step((reading.status.progress.step or 0) + 5)
        assert (mine / "letter.json").exists() and not (mine / ".ballast").exists()
        with pytest.raises(Refused):
            daemon.ask("stop")
