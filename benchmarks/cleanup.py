"""What cleaning costs a training whose threshold is exceeded all the time, by the engine's own counter, which is held to 0.2 %.

    python -m benchmarks.cleanup [--seconds 190]

A small real training of the built-in task, in this process, with a RAM limit far below what the machine uses: every look finds it
exceeded. Told are the cleanups, what they cost, of how many seconds, and the pauses between them.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainerd.config.load import resolve
from trainerd.config.model import RunConfig
from trainerd.contract import wire
from trainerd.engine import taskfile
from trainerd.engine.loop import Link
from trainerd.engine.trainer import Trainer

_GATE = 0.002


class Watching(Link):
    """Keeps what the guard tells, and has the training leave when its time is up."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: float | None = None
        self.memory: dict[str, Any] = {}
        self.cleanups: list[dict[str, Any]] = []

    def send(self, event: str, **fields: Any) -> None:
        if event == wire.PROGRESS and self._until is None:
            self._until = time.monotonic() + self._seconds
        elif event == wire.MEMORY:
            self.memory = fields
        elif event == wire.NOTE and fields.get("kind") == "cleanup":
            self.cleanups.append(fields)

    def command(self) -> dict[str, Any] | None:
        if self._until is None or time.monotonic() < self._until:
            return None
        self._until = None
        return {"do": wire.LEAVE, "why": "stop", "save": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and say what the cleanups have cost. Exit code 1 when it was more than their share."""
    parser = argparse.ArgumentParser("python -m benchmarks.cleanup", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=190.0)
    asked = parser.parse_args(arguments)
    link = Watching(asked.seconds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        config = _config()
        Trainer(taskfile.load_task(config, Path(folder)), config, home=folder, run="cleanup", link=link).train()
    cost, cleanups = float(link.memory["cleanup_seconds"]), int(link.memory["cleanups"])
    share = cost / asked.seconds
    longest = max(note["milliseconds"] for note in link.cleanups)
    print(f"{platform.machine()}, {platform.system()}: {cleanups} cleanups, {cost:.3f} s of {asked.seconds:.0f} s: {share:.4%}")
    print(f"longest {longest} ms; pauses {[note['next_in_seconds'] for note in link.cleanups]} s")
    return 0 if share <= _GATE else 1


def _config() -> RunConfig:
    settings = {"vocabulary": 500, "gru": {"hidden": 96}, "min_frequency": 1, "eval_prefixes": 0}
    document = resolve("cadence", "quick").config.model_dump(mode="json")
    document["train"] |= {"epochs": 1_000_000, "batch_size": 4, "threads": 1}
    document["settings"] |= settings
    document["memory"]["ram_limit"] = "500MB"
    return RunConfig.model_validate(document)


if __name__ == "__main__":
    sys.exit(main())
