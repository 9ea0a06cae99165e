"""Real trainers that hang in the middle of a real training, under a real supervisor: for tests and benchmarks/faults. No tests here."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.trainers import TASK, new_run
from trainerd.contract.paths import RunPaths
from trainerd.supervisor import opening
from trainerd.supervisor.loop import Supervisor, Timing

HANGS = ("stopped", "sleep", "lock", "save", "worker")
_HANG = '''
import re, signal
from pathlib import Path

class Hangs(Tiny):
    """Hangs once, at the 13th step, in the way that `hang.txt` says."""

    def once(self, *ways):
        marker = Path(__file__).parent / "hang.txt"
        way = marker.read_text() if marker.exists() else ""
        if way in ways:
            marker.unlink()
        return way if way in ways else ""

    def loss(self, model, batch, ctx):
        way = self.once("stopped", "sleep", "lock", "save") if ctx.step >= 12 else ""
        if way == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif way == "sleep":
            time.sleep(600)
        elif way == "lock":
            re.match(r"(a+)+$", "a" * 64 + "b")
        elif way == "save":
            from trainerd.engine.checkpoints import CheckpointStore
            CheckpointStore.commit = lambda *_, **__: time.sleep(600)
        return super().loss(model, batch, ctx)

    def collate(self, samples):
        if self.ctx.step >= 12 and self.once("worker"):
            time.sleep(600)
        return super().collate(samples)
'''


@dataclass
class Found:
    """How a hang was found. `silent_seconds` by the supervisor's count, `stack` whether the log shows where it hung."""

    result: str
    phase: str
    silent_seconds: float
    limit_seconds: float
    restart_seconds: float
    stack: str


def hang_once(root: Path, way: str, limit_seconds: float = 2.0, **timing: Any) -> Found:
    """Train with one hang in the middle, to the end."""
    if way == "worker":  # the first batch waits until a process has imported torch: with learned limits it has ten minutes
        limit_seconds += 20.0
    limits = {"starting": 300, "preparing": 300, "exporting": 300}
    workers = {"num_workers": 1} if way == "worker" else {}
    paths = new_run(root, source=TASK + _HANG, class_name="Hangs", faults={"hang": limit_seconds, "hang_limits": limits}, train=workers)
    (paths.task / "hang.txt").write_text(way, encoding="utf-8")
    supervisor = supervisor_of(paths, Timing(hung_seconds=2.0, **timing))
    result = supervisor.run()
    told = events(paths)
    hang = next(event for event in told if event["kind"] == "hang")
    death = next(event for event in told if event["kind"] == "death")
    log = (paths.home.logs / death["log"]).read_text(encoding="utf-8", errors="replace")
    stack = log[log.find("most recent call first") :] if "most recent call first" in log else ""
    return Found(result, hang["phase"], hang["silent_seconds"], hang["limit_seconds"], death["at"] - hang["at"], stack)


def supervisor_of(paths: RunPaths, timing: Timing | None = None) -> Supervisor:
    """A supervisor with the real engine, in this process."""
    paths.home.control.mkdir(parents=True, exist_ok=True)
    return Supervisor(paths.home, uuid.uuid4().hex, opening.open_run(paths.home, {"run": paths.name, "resume": True}), timing=timing)


def events(paths: RunPaths) -> list[dict[str, Any]]:
    """events.jsonl."""
    return [json.loads(line) for line in paths.events.read_text(encoding="utf-8").splitlines()]
