"""What checkpoints cost a training at the default setting, by the engine's own counters; and the wall clock with and without them.

    python -m benchmarks.checkpoint_cost [--saves 110] [--seconds 170] [--data FILE] [-- options of start …]

A training of the built-in task is started through the client with the default `checkpoint` settings, and stopped after so many
saves, or so long. Its counters give the gate: (seconds the training thread was blocked + CPU seconds of the saving thread /
cores) / run time <= 1 %, and staging buffers no larger than a checkpoint. Then the same steps are done once more without a
save: the difference of the wall clock and of the RAM is told, and not judged, for a machine with other work has noise of more.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.person import Person
from trainerd.contract import status

# A model whose steps take milliseconds and whose checkpoint is a few megabytes, so that a hundred saves are a matter of minutes:
# what may be written in a day (checkpoint.max_write_per_day) spaces out those of larger ones.
SMALL = (
    "--set", "train.batch_size=4", "--set", "settings.vocabulary=500", "--set", "settings.gru.hidden=96",
    "--set", "settings.min_frequency=1", "--set", "settings.eval_prefixes=0", "--set", "polite.priority=normal",
)  # fmt: skip
WITHOUT = ("--set", "checkpoint.every_steps=1000000000", "--set", "checkpoint.every_minutes=100000", "--set", "checkpoint.keep_best=false")
_GATE = 0.01


@dataclass(frozen=True)
class Measured:
    """One training: its steps, the seconds from the first to the last, its saves as the engine counted them, its RAM."""

    steps: int
    seconds: float
    saving: dict[str, float]
    ram_bytes: int

    @property
    def share(self) -> float:
        return self.saving["cost_seconds"] / self.saving["of_seconds"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.checkpoint_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=110)
    parser.add_argument("--seconds", type=float, default=170.0)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("options", nargs="*", help="in place of the small model's")
    asked = parser.parse_args(arguments)
    words = ["--epochs", "1000000", *(asked.options or SMALL), *(["--data", str(asked.data)] if asked.data else [])]
    print(f"{platform.machine()}, {platform.system()}, {' '.join(words)}", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with_saves = train(Path(folder) / "with", words, asked.saves, asked.seconds)
        without = train(Path(folder) / "without", [*words, *WITHOUT, "--set", f"train.max_steps={with_saves.steps}"], 0, 0.0)
    return tell(with_saves, without)


def train(root: Path, words: Sequence[str], saves: int, seconds: float) -> Measured:
    """Train until there were so many saves, or so long; with neither, to the end."""
    person = Person(root)
    try:
        person.starts("--name", "cost", *words)
        if saves:
            began, seen = time.monotonic(), set[int]()
            while len(seen) < saves and time.monotonic() - began < seconds:
                reading = person.sees()
                if reading.state in status.END_STATES:
                    break
                if reading.status is not None and reading.status.checkpoint is not None:
                    seen.add(reading.status.checkpoint.step)
                time.sleep(0.1)
            person.types("stop")
        person.waits_for_state(*status.END_STATES, seconds=3600)
        rows = [row for row in person.metrics("cost") if "loss" in row]
        saving = next(event for event in person.events("cost") if event["kind"] == "saving")
        receipt = json.loads((person.home.run("cost").folder / "receipt.json").read_text("utf-8"))
        return Measured(len(rows), rows[-1]["t"] - rows[0]["t"], saving, receipt["real"]["ram_bytes"])
    finally:
        person.leaves()


def tell(with_saves: Measured, without: Measured) -> int:
    """Print what was found; 1 when the gate is not held."""
    saving, wall = with_saves.saving, with_saves.seconds / without.seconds - 1
    print(
        f"{with_saves.steps:,} steps, {saving['saves']} saves of {saving['checkpoint_bytes'] / 1e6:.1f} MB: blocked "
        f"{saving['blocked_seconds']:.3f} s, saver {saving['cpu_seconds']:.3f} s of CPU on {saving['cores']} cores; "
        f"cost {with_saves.share:.2%} of {saving['of_seconds']:.0f} s"
    )
    staged = saving["staged_bytes"] / saving["checkpoint_bytes"]
    more = with_saves.ram_bytes - without.ram_bytes
    print(f"staging {staged:.2f} of a checkpoint; the most RAM at once {more / 1e6:+.1f} MB beside a run with one save, at its end")
    print(f"wall clock {with_saves.seconds:.1f} s with, {without.seconds:.1f} s without: {wall:+.1%} (told, not judged)")
    return 0 if with_saves.share <= _GATE and staged <= 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
