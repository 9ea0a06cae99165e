"""`monitor`: a live screen over the files, for a person; plain lines for a pipe. Must not keep the training from anything.

Drawn with rich, not textual: both were tried with this very screen at 5 s. rich: 0.07 s of CPU to start, then 0.05 %, 23 MB;
textual: 0.17 s, 0.25 %, 36 MB, and one more dependency for one screen without widgets. Keys are read by keys.py.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field

import click

from trainerd.contract import status
from trainerd.contract.errors import TrainerdError
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading

from .. import ask, console, keys, revive, screen, tail, view
from ..cli import pass_home
from ..seconds import Seconds

_SOON_SECONDS = 0.25
_GIVE_UP_SECONDS = 60.0
_LOG_LINES = 40
_TALLEST_WINDOW = 100
_VERBS = {"p": "pause", "r": "resume", "c": "save"}


@click.command("monitor")
@click.option("--interval", type=Seconds(0.2, 3600), default=5.0, metavar="S", show_default=True, help="Look every S seconds.")
@click.option("--once", is_flag=True, help="Print the screen once, and leave; changes nothing.")
@click.option("--no-revive", is_flag=True, help="Do not start a supervisor again that was killed while its training was wanted.")
@pass_home
def command(home: Home, interval: float, once: bool, no_revive: bool) -> int:
    """Watch the training live. Leaving never stops it.

    A supervisor that was killed, or lost with the machine, is started again if its training is still wanted.
    """
    if once:
        return _print_once(home)
    told = "" if no_revive else revive.revive(home)
    if told:
        console.complain(told)
    if not console.is_terminal(sys.stdout) or os.environ.get("TERM") == "dumb":
        return _print_lines(home, interval)
    try:
        Monitor(home, interval, note=told).run()
    except KeyboardInterrupt:
        pass
    return 0


def _print_once(home: Home) -> int:
    watcher = Monitor(home, 0)
    scene = watcher.look(80, 40)
    scene.footer = ""
    text = "\n".join("".join(piece for piece, _ in row).rstrip() for row in screen.frame(scene))
    console.say(text.rstrip())
    return view.exit_code(scene.reading)


def _print_lines(home: Home, interval: float) -> int:
    """One line per interval until the run has ended."""
    while True:
        reading = status.read(home)
        console.say(screen.line(reading, time.time()))
        if not reading.alive:
            return view.exit_code(reading)
        time.sleep(interval)


@dataclass
class Monitor:
    """What the screen remembers between two frames."""

    home: Home
    interval: float
    losses: tail.Losses | None = None
    asked: ask.Asked | None = None
    note: str = ""
    help: bool = False
    confirming: bool = False
    fancy: bool = field(default_factory=lambda: console.can_show("█░·×─"))
    braille: bool = field(default_factory=console.has_braille)
    _look_at: float = 0.0

    def run(self) -> None:
        """Draw, wait for a key or the next look, until q."""
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        terminal = Console(highlight=False)
        if terminal.legacy_windows and terminal.height > _TALLEST_WINDOW:
            terminal.height = 24  # Windows' old console may tell the height of its buffer: the top would scroll away
        with keys.Keyboard() as keyboard, Live(console=terminal, screen=True, auto_refresh=False) as live:
            while True:
                scene = self.look(terminal.width, terminal.height)
                key = None
                while key is None and time.monotonic() < self._look_at:
                    # The clock and all ages go on by the second; the files are read no more often than was asked for.
                    scene.now, scene.width, scene.height = time.time(), *terminal.size
                    scene.footer = self._footer(keyboard.works)
                    rows = [Text.assemble(*row, no_wrap=True, overflow="crop", end="") for row in screen.frame(scene)]
                    live.update(Text("\n", end="").join(rows), refresh=True)
                    key = keyboard.read(min(1.0 - time.time() % 1.0, max(self._look_at - time.monotonic(), 0.0)))
                if key == "q":
                    return
                self._press(key, scene.reading)

    def look(self, width: int, height: int) -> screen.Scene:
        """Read the files once."""
        reading = status.read(self.home)
        found = reading.status
        log = tail.newest_log(self.home)
        if found is not None and found.run:
            path = self.home.run(found.run).metrics
            if self.losses is None or self.losses.path != path:
                self.losses = tail.Losses(path)
            self.losses.read()
        self._settle(reading)
        self._look_at = time.monotonic() + (_SOON_SECONDS if self.asked else self.interval)
        return screen.Scene(
            reading,
            self.losses.points if self.losses else (),
            tail.last_lines(log, _LOG_LINES) if log else (),
            width=width,
            height=height,
            fancy=self.fancy,
            braille=self.braille,
            help=self.help,
            program=console.program(),
        )

    def _footer(self, keys_work: bool) -> str | None:
        return self.note or (None if keys_work else "Ctrl-C leaves; the training goes on")

    def _press(self, key: str | None, reading: Reading) -> None:
        if key is None:
            return
        if self.confirming:
            self.confirming, self.note = False, ""
            if key in ("s", "y", "\r", "\n"):
                self._send("stop", reading)
            return
        self.note = ""
        if key in ("?", "h"):
            self.help = not self.help
        elif key == "s" and reading.alive:
            self.confirming, self.note = True, "Save a checkpoint and stop the training?  s again: yes   any other key: no"
        elif key == "s" or key in _VERBS:
            self._send(_VERBS.get(key, "stop"), reading)

    def _send(self, verb: str, reading: Reading) -> None:
        if not reading.alive:
            self.note = "Nothing is running here any more; q leaves."
            return
        try:
            self.asked = ask.send(self.home, reading, verb)
            self.note = f"{verb}: asked ..."
        except TrainerdError as error:
            self.note = error.message

    def _settle(self, reading: Reading) -> None:
        """Say how a request went, and take back one that nobody answers."""
        if self.asked is None:
            return
        try:
            is_done = self.asked.is_done(reading)
        except TrainerdError as error:
            self.note, self.asked = error.message, None
            return
        verb = self.asked.verb
        if is_done:
            self.note, self.asked = f"{verb}: done. {view.summary(reading)}", None
        elif not reading.alive:
            self.asked.withdraw()
            self.note, self.asked = f"{verb}: too late. {view.summary(reading)}", None
        elif is_done is not None:
            self.note = f"{verb}: under way ..."
        elif time.monotonic() - self.asked.at > _GIVE_UP_SECONDS:
            self.asked.withdraw()
            self.note, self.asked = f"{verb}: the supervisor did not answer.", None
