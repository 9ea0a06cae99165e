"""From the SIGKILL of a real trainer to the first step that nobody had done, and where the time between goes. Must not judge hangs.

The task itself notes the time of every step. Beside it, what importing torch costs a fresh process on this machine.
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.hangs import supervisor_of
from tests.trainers import TASK, new_run
from trainerd.contract import phases, status, wire

_TIMED = '''
class Timed(Tiny):
    """Notes when each step begins; its file is never read by the training."""

    def loss(self, model, batch, ctx):
        with open(os.environ["TIMED_STEPS"], "a") as file:
            file.write(f"{os.getpid()} {ctx.step} {time.monotonic()}\\n")
        return super().loss(model, batch, ctx)
'''
_IMPORTS = "import torch, accelerate"
PHASES = ("noticed, and a new process there", "Python and our pipes", "importing torch and the engine", "data, plan, checkpoint, model")


class _Tap:
    """The supervisor's inbox; remembers when each kind of event was sent, by the trainer's own clock."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.told: list[tuple[str, float]] = []

    def put(self, item: Any) -> None:
        if item is not None and item[1] is not None:
            name = str(item[1].get("name")) if item[1]["event"] == wire.PHASE else str(item[1]["event"])
            self.told.append((name, float(item[1]["monotonic"])))
        self._queue.put(item)

    def get(self, timeout: float) -> Any:
        return self._queue.get(timeout=timeout)

    def get_nowait(self) -> Any:
        return self._queue.get_nowait()

    def when(self, name: str, after: float) -> float:
        deadline = time.monotonic() + 5.0  # the pipe is read a little later than the step is noted
        while (found := next((at for told, at in list(self.told) if told == name and at > after), None)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {name!r}")
            time.sleep(0.01)
        return found


def imports(count: int) -> list[float]:
    """Seconds that a fresh process takes to import torch and accelerate, and to end."""
    found = []
    for _ in range(count):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", _IMPORTS], check=True)
        found.append(time.monotonic() - began)
    return found


def restarts(folder: Path, count: int) -> tuple[list[float], list[list[float]]]:
    """(seconds to the first new step, the same cut into PHASES and what is left), for each of `count` kills."""
    steps = folder / "steps.txt"
    os.environ.update(TINY_PAUSE="0.005", TIMED_STEPS=str(steps))
    paths = new_run(folder / "home", source=TASK + _TIMED, class_name="Timed", train={"epochs": 100_000})
    supervisor, tap = supervisor_of(paths), _Tap()
    supervisor.inbox = tap  # type: ignore[assignment]
    thread = threading.Thread(target=supervisor.run, daemon=True)
    thread.start()
    seconds, parts = [], []
    _until_stepped(steps, 20, 0)
    for _ in range(count):
        reading = status.read(paths.home)
        pid = (reading.status.trainer.pid if reading.status else None) or 0
        time.sleep(0.5)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)  # the dead one's last line
        stepped = _until_stepped(steps, max(step for _, step, _ in _lines(steps)) + 1, pid)
        started = supervisor.trainer.started_monotonic if supervisor.trainer else began
        marks = [began, started, *(tap.when(name, began) for name in (wire.HELLO, wire.CHECKED, phases.TRAINING)), stepped]
        seconds.append(stepped - began)
        parts.append([after - before for before, after in itertools.pairwise(marks)])
    supervisor.stop_wanted = True
    supervisor.signals += 1
    thread.join(60)
    return seconds, parts


def _lines(path: Path) -> list[tuple[int, int, float]]:
    """(process, steps done before, when) of every noted step."""
    whole = path.read_text("utf-8").rpartition("\n")[0].splitlines() if path.exists() else []
    return [(int(pid), int(step), float(at)) for pid, step, at in (line.split() for line in whole)]


def _until_stepped(path: Path, step: int, dead: int) -> float:
    """When a trainer other than `dead` has come to `step`."""
    deadline = time.monotonic() + 60
    while True:
        found = next((at for pid, reached, at in _lines(path) if reached >= step and pid != dead), None)
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"no step {step}")
        time.sleep(0.01)
