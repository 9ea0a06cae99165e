"""The monitor: in a real terminal of 80x24 with every key, printed once, and piped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import ask, curve, screen, tail, view
from tests.person import DOOR, Person
from tests.supervised import RUN, Daemon
from trainerd.contract import files, lock, requests, status
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home

LONG = {"steps": 5000, "pause": 0.02}
_PATIENCE_SECONDS = 60.0
FROZEN = json.loads((Path(__file__).with_name("data") / "status_schema1.json").read_text("utf-8"))


class Terminal:
    """An 80x24 terminal with the monitor in it; what it shows is rendered, not guessed."""

    def __init__(self, home: Home, *, lang: str = "C.UTF-8", interval: str = "0.3") -> None:
        import pexpect
        import pyte

        self.screen = pyte.Screen(80, 24)
        self.stream = pyte.ByteStream(self.screen)
        environment = {"PATH": "/usr/bin:/bin", "TERM": "xterm-256color", "LC_ALL": lang, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
        words = [str(DOOR), "--home", str(home.root), "monitor", "--interval", interval]
        self.child = pexpect.spawn(sys.executable, words, dimensions=(24, 80), env=environment, timeout=20)
        self.raw = b""

    def look(self, seconds: float = 0.05) -> str:
        import pexpect

        try:
            content = self.child.read_nonblocking(65536, timeout=seconds)
            self.raw += content
            self.stream.feed(content)
        except (pexpect.TIMEOUT, pexpect.EOF):
            pass
        return "\n".join(self.screen.display)

    def until(self, *words: str) -> str:
        """The screen with any of these words on it."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not any(some in (shown := self.look()) for some in words):
            assert time.monotonic() < deadline, f"{words!r} did not appear in\n{shown}"
        return shown

    def left(self) -> int:
        import pexpect

        self.child.expect(pexpect.EOF)
        self.raw += self.child.before or b""
        self.child.close()
        code: int = self.child.exitstatus
        return code


@pytest.fixture
def terminal(home: Home) -> Iterator[Callable[..., Terminal]]:
    pytest.importorskip("pexpect")
    pytest.importorskip("pyte")
    if sys.platform == "win32":
        pytest.skip("pseudo-terminals of POSIX; the Windows tier has a console")
    opened: list[Terminal] = []

    def open_one(**words: Any) -> Terminal:
        opened.append(Terminal(home, **words))
        return opened[-1]

    yield open_one
    for one in opened:
        one.child.close(force=True)


def metrics(home: Home, run: str, losses: list[float]) -> None:
    path = home.run(run).metrics
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"step": n + 1, "epoch": 1, "loss": loss}) for n, loss in enumerate(losses)]
    path.write_text("\n".join([*rows, json.dumps({"step": len(rows), "eval": {"loss": 1}})]) + "\n", encoding="utf-8")


def test_every_key_in_a_real_terminal(home: Home, terminal: Callable[..., Terminal]) -> None:
    """p pauses, r resumes, c saves, s asks once and stops, ? helps, q leaves; the screen fits 80x24 and is given back."""
    metrics(home, RUN, [10 - n / 20 for n in range(100)])
    with Daemon(home, LONG) as daemon:
        daemon.until_step(2)
        monitor = terminal()
        shown = monitor.until("q quit")
        for words in ("trainerd", RUN, "RUNNING", "progress", "of 5,000", "RAM        machine", "restarts   none", "log", "p pause"):
            assert words in shown, f"{words!r} is missing in\n{shown}"
        assert any("⠀" < c <= "⣿" for c in shown), shown  # the curve
        monitor.child.send("?")
        monitor.until("asks once")
        monitor.child.send("?")
        monitor.child.send("c")
        monitor.until("save: done")
        monitor.child.send("p")
        assert "PAUSED" in monitor.until("pause: done")  # not a moment before
        monitor.child.send("?")
        monitor.child.send("?")
        assert "p pause" not in monitor.until("r resume  s stop  ? help  q quit")
        monitor.child.send("r")
        monitor.until("resume: done")
        daemon.until_state(status.RUNNING)
        monitor.child.send("s")
        monitor.until("s again: yes")
        monitor.child.send("n")
        monitor.until("q quit")
        assert daemon.reading().state == status.RUNNING
        monitor.child.send("\x1b[A")
        monitor.child.send("ss")  # faster than it looks
        monitor.until("Go on from the last checkpoint with:")
        daemon.process.wait(60)  # while it ends it still answers
        monitor.child.send("p")
        if "too late" in monitor.until("Nothing is running", "pause: too late"):  # it had not looked since
            monitor.child.send("p")
        shown = monitor.until("Nothing is running")
        assert "STOPPED" in shown and "Go on from the last checkpoint with:" in shown and "RAM " not in shown and "speed" not in shown
        monitor.child.send("q")
        assert monitor.left() == 0
        assert b"\x1b[?1049h" in monitor.raw and b"\x1b[?1049l" in monitor.raw and b"\x1b[?25h" in monitor.raw


def test_what_nobody_heard_is_not_called_done(home: Home, terminal: Callable[..., Terminal]) -> None:
    """A pause asked of a supervisor that dies before it hears it: it was too late, and it waits for no later one."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        monitor = terminal()
        monitor.until("RUNNING")
        os.kill(daemon.process.pid, signal.SIGSTOP)
        monitor.child.send("p")
        monitor.until("pause: asked")
        daemon.process.kill()
        daemon.process.wait(60)
        monitor.until("pause: too late")
        assert requests.pending(home) == []


def test_what_was_taken_is_done_when_it_has_taken_effect(tmp_path: Path) -> None:
    """A pause that was accepted is under way until the state says paused; what is not answered is neither."""
    asked = ask.Asked("pause", "abc", tmp_path / "abc.json")

    def stands(state: str, *outcomes: str) -> bool | None:
        answers = [status.RequestOutcome("abc", "pause", outcome, 0.0) for outcome in outcomes]
        return asked.is_done(status.Reading(state, "", status.Status(requests=answers), True))

    assert (stands(status.RUNNING), stands(status.RUNNING, "accepted")) == (None, False)
    assert stands(status.PAUSED, "accepted") and stands(status.RUNNING, "done")


def test_leaving_never_stops_the_training(home: Home, terminal: Callable[..., Terminal]) -> None:
    """q and Ctrl-C leave the screen, nothing else."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(1)
        for key in ("q", "\x03"):
            monitor = terminal()
            monitor.until("RUNNING")
            monitor.child.send(key)
            assert monitor.left() == 0
        before = daemon.reading().status
        daemon.until_step((before.progress.step or 0) + 2 if before else 1)


def test_the_clock_and_every_age_go_on_between_two_looks(home: Home, terminal: Callable[..., Terminal]) -> None:
    """The files are read as often as was asked for, and time passes every second."""
    held = FileLock(home.supervisor_lock)
    assert held.acquire()
    found = status.from_dict(FROZEN)
    assert found.checkpoint
    found.checkpoint.at = time.time() - 20
    status.write(home, found)
    monitor = terminal(interval="3600")
    first = monitor.until("q quit")
    home.status.unlink()
    ages = {re.search(r"(\d+) s ago", first)[1]}  # type: ignore[index]
    clocks = {first.splitlines()[0][-8:]}
    deadline = time.monotonic() + 20
    while len(ages) < 4 and time.monotonic() < deadline:
        shown = monitor.look(0.2)
        ages.add(re.search(r"(\d+) s ago", shown)[1])  # type: ignore[index]
        clocks.add(shown.splitlines()[0][-8:])
    assert len(ages) >= 4 and len(clocks) >= 4, (ages, clocks)
    held.release()


def test_a_terminal_without_unicode_gets_ascii(home: Home, terminal: Callable[..., Terminal]) -> None:
    """Bars, rules and the curve have forms that any encoding carries."""
    metrics(home, FROZEN["run"], [10 - n / 20 for n in range(100)])
    files.write_json(home.status, {**FROZEN, "state": "completed", "reason": "Completed."})
    monitor = terminal(lang="C")
    shown = monitor.until("q quit")
    assert "#" in shown and "*" in shown and "COMPLETED" in shown
    assert not [c for c in shown if ord(c) > 127], shown
    monitor.child.send("q")
    assert monitor.left() == 0


def test_piped_it_is_plain_lines_until_the_end(home: Home, tmp_path: Path) -> None:
    """One line per interval, no escape codes, the exit code of the end; --once is the screen as text."""
    person = Person(home.root, tmp_path / "state")
    with Daemon(home, {"steps": 60, "pause": 0.02}) as daemon:
        daemon.until_step(1)
        once = person.types("monitor", "--once")
        done = person.types("monitor", "--interval", "0.2")
        daemon.until_state(status.COMPLETED)
    assert once.returncode == 0 and once.stdout.startswith("trainerd  fake-1  RUNNING") and "checkpoint" in once.stdout
    assert done.returncode == 0 and "running" in done.stdout.splitlines()[0] and "completed" in done.stdout.splitlines()[-1]
    assert "\x1b" not in once.stdout + done.stdout + once.stderr + done.stderr
    assert person.types("monitor", "--once").returncode == 0
    assert Person(tmp_path / "other").types("monitor", "--once").returncode == 3


def test_what_is_old_is_said_to_be_old(home: Home) -> None:
    """A supervisor that does not answer is said so, in words, with for how long."""
    held = FileLock(home.supervisor_lock)
    assert held.acquire()
    status.write(home, status.from_dict(FROZEN))
    document = json.loads(home.status.read_text("utf-8"))
    document["updated_monotonic"] -= 60
    files.write_json(home.status, document)
    reading = status.read(home)
    shown = screen.frame(screen.Scene(reading))
    assert any("NOT ANSWERING" in text and "red" in style for text, style in shown[0])
    assert any("60 seconds" in text for text, _ in shown[1])
    held.release()
    assert not lock.is_held(home.supervisor_lock)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60), (20, 3), (10, 1)])
def test_the_screen_fits_any_terminal(width: int, height: int) -> None:
    """Never more lines than there are, none longer than fits; the keys stay at the bottom."""
    found = status.from_dict({**FROZEN, "reason": "Because " * 40, "warnings": ["w" * 300] * 5})
    reading = status.Reading(found.state, found.reason, found, True)
    losses = [(n, float(n % 10)) for n in range(500)]
    rows = screen.frame(screen.Scene(reading, losses, ["log line " * 30] * 50, width=width, height=height))
    assert len(rows) <= height
    assert all(len("".join(text for text, _ in row)) <= width for row in rows)
    assert rows[-1][0][0].startswith("p pause" if width > 60 else "") and "q quit" in rows[-1][0][0]


@pytest.mark.parametrize("width", [80, 60, 40])
def test_what_does_not_fit_goes_whole(width: int) -> None:
    """No number and no name is cut in the middle: the least important part goes, the most important stays."""
    measured = {"loss": 2.298, "perplexity": 9.951, "success@10": 0.25, "mrr@10": 0.1}
    made = {**FROZEN["progress"], "eval": measured, "best": {"loss": 2.2, "step": 100}, "epoch": 3, "epochs": 12, "step": 1748}
    found = status.from_dict({**FROZEN, "progress": {**made, "total_steps": 4752}})
    scene = screen.Scene(status.Reading("running", "Training.", found, True), width=width, program="./start_training.sh")
    text = ["".join(piece for piece, _ in row).rstrip() for row in screen.frame(scene)]
    by_label = {line.split()[0]: line for line in text if line.split()}
    assert "36.8 %" in by_label["progress"] and "step 1,748 of 4,752" in by_label["progress"]
    words = set(re.findall(r"[^\s,·\[\]█░]+", f"{view.progress(found, True)} {view.loss(found, gradient=True)}"))
    for label in ("progress", "loss"):
        assert set(re.findall(r"[^\s,·\[\]█░]+", by_label[label])) - {label} <= words, by_label[label]
    assert "eval loss 2.298" in by_label["loss"]
    assert ("success@10 0.2500" in by_label["loss"]) == (width == 80)


def test_the_end_says_what_to_do_next_and_nothing_that_is_over() -> None:
    """Completed, stopped, failed: what to type, no key that does nothing, and no memory, speed or heat of before."""
    expected = {"completed": "suggest PREFIX", "stopped": "resume", "failed": "logs"}
    for state, words in expected.items():
        found = status.from_dict({**FROZEN, "state": state, "task": "cadence"})
        rows = screen.frame(screen.Scene(status.Reading(state, "It ended.", found, False), program="./start_training.sh"))
        text = "\n".join("".join(piece for piece, _ in row) for row in rows)
        assert f"./start_training.sh {words}" in text
        for gone in ("p pause", "r resume", "c checkpoint", "s stop", "RAM ", "VRAM", "GPU", "speed"):
            assert gone not in text, f"{gone!r} is shown at {state} in\n{text}"


def test_a_number_that_can_be_bad_has_a_word() -> None:
    """VRAM near its limit, heat, battery: said, not only coloured."""
    hot = {**FROZEN["gpu"], "temperature_c": 90}
    found = status.from_dict({**FROZEN, "gpu": hot, "power": {"plugged": False, "percent": 41}})
    rows = screen.frame(screen.Scene(status.Reading("running", "", found, True), width=120))
    text = "\n".join("".join(piece for piece, _ in row) for row in rows)
    for words in ("88.6 % high", "43.6 % ok", "90 °C hot", "on battery, battery 41 %", "a kill now would repeat 26 steps"):
        assert words in text, f"{words!r} is missing in\n{text}"


def test_the_curve_shows_the_shape() -> None:
    """High is up, low is down, both in the given space; one value and none draw, too."""
    falling = curve.draw([10.0, 8.0, 6.0, 4.0], 4, 4, braille=False)
    assert falling == ["*   ", " *  ", "  * ", "   *"]
    dots = curve.draw([float(n) for n in range(1000)], 20, 3, braille=True)
    assert len(dots) == 3 and all(len(row) == 20 for row in dots) and dots[2][0] != " " and dots[0][-1] != " "
    assert curve.draw([], 3, 2, braille=True) == ["   ", "   "] and curve.draw([1.0], 3, 1, braille=False) == ["*  "]
    assert curve.draw([1.0], 0, 5, braille=True) == []


def test_losses_are_read_as_they_grow_and_anew_after_a_resume(tmp_path: Path) -> None:
    """Only what was added is read; a torn line waits; a file cut back starts over; a long one is thinned."""
    path = tmp_path / "metrics.jsonl"
    losses = tail.Losses(path)
    losses.read()
    assert losses.points == []
    path.write_bytes(b'{"step": 1, "loss": 2.0}\nnonsense\n{"step": 2, "lo')
    losses.read()
    assert losses.points == [(1, 2.0)]
    with open(path, "ab") as file:
        file.write(b'ss": 1.5}\n{"step": 3, "loss": null}\n')
    losses.read()
    assert losses.points == [(1, 2.0), (2, 1.5)]
    path.write_bytes(b'{"step": 1, "loss": 9.0}\n')
    losses.read()
    assert losses.points == [(1, 9.0)]
    with open(path, "ab") as file:
        file.writelines(b'{"step": %d, "loss": %d.5, "filler": "%s"}\n' % (n, n, b"x" * 100) for n in range(2, 60_000))
    begun = time.process_time()
    losses.read()
    assert time.process_time() - begun < 5.0
    steps = [step for step, _ in losses.points]
    assert steps == sorted(steps) and 200 < len(steps) <= 2048 and steps[-1] > 59_000


def test_the_monitor_costs_next_to_nothing(home: Home) -> None:
    """A frame with its reads takes a few milliseconds of CPU: at the usual interval of 5 s, 0.5 % is 25."""
    from client.commands.monitor import Monitor

    metrics(home, FROZEN["run"], [1.0] * 1000)
    status.write(home, status.from_dict(FROZEN))
    home.logs.mkdir()
    (home.logs / "training_20261121_120000.log").write_text("line\n" * 10_000, encoding="utf-8")
    monitor = Monitor(home, 5)
    screen.frame(monitor.look(80, 24))
    begun = time.process_time()
    for _ in range(20):
        screen.frame(monitor.look(80, 24))
    assert (time.process_time() - begun) / 20 < 0.015


def test_keys_are_not_read_where_nobody_types(home: Home) -> None:
    """A terminal without a keyboard (input from /dev/null) shows the screen; the words at the bottom say how to leave."""
    code = (
        "from client import keys, console\nimport sys, time\n"
        "keyboard = keys.Keyboard()\nbegun = time.monotonic()\n"
        "with keyboard: key = keyboard.read(0.2)\nprint(keyboard.works, key, time.monotonic() - begun > 0.15)"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=DOOR.parent, check=True)
    assert done.stdout.split() == ["False", "None", "True"]
