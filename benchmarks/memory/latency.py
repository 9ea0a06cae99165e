"""How long an answer takes: `python -m benchmarks.memory.latency`. Cold import, first answers, remembered ones, and `plan` as typed.

First answers are of questions nobody has asked before (another micro-batch each time), in a process that is warm.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from trainerd.memory import playing
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup, Table
from trainerd.tasks.cadence.blocks import table
from trainerd.tasks.cadence.settings import CadenceSettings

ROOT = Path(__file__).resolve().parents[2]
MODULES = "import trainerd.memory.estimate, trainerd.memory.planner, trainerd.memory.forecast, trainerd.tasks.cadence.blocks"
_REPEATS = 7


def setups(device: str) -> list[Setup]:
    """The questions a plan asks: micro-batches, whole or accumulated, in both precisions."""
    found = [Setup(device, p, m, m * k) for p, m, k in product(("fp32", "bf16"), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), (1, 4))]
    return [*found, Setup(device, "bf16", 1, 1, "adafactor")]


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Milliseconds of one call."""
    began = clock()
    work()
    return (clock() - began) * 1e3


def answers(model: Table, device: str, clock: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of first and of remembered answers."""
    first: list[float] = []
    again: list[float] = []
    for _ in range(rounds):
        playing.forget()
        for setup in setups(device):
            first.append(timed(lambda setup=setup: estimate(model, setup), clock))  # type: ignore[misc]
        again += [timed(lambda setup=setup: estimate(model, setup), clock) for setup in setups(device)]  # type: ignore[misc]
    return first[len(setups(device)) :] or first, again


def _said(name: str, times: Sequence[float]) -> None:
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    print(f"{name:<34} p50 {statistics.median(ordered):7.2f} ms  p99 {p99:7.2f}  most {ordered[-1]:7.2f}  ({len(ordered)})")


def _import_times() -> list[float]:
    """Milliseconds of importing everything an estimate needs, in fresh interpreters, by Python's own count."""
    found = []
    for _ in range(_REPEATS):
        done = subprocess.run([sys.executable, "-X", "importtime", "-c", MODULES], capture_output=True, text=True, cwd=ROOT, check=True)
        rows = [line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:") and "[us]" not in line]
        ours = [int(row[1]) for row in rows if row[2].strip().startswith("trainerd") and not row[2][1:].startswith("  ")]
        found.append(sum(ours) / 1e3)
    return found


def _plan_times(*words: str) -> list[float]:
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, str(ROOT / "run_optimized_training.py"), "--home", home, "plan", "--json", *words]
        return [
            timed(lambda: subprocess.run(command, capture_output=True, check=True, cwd=ROOT), time.perf_counter) for _ in range(_REPEATS)
        ]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.latency", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's time instead of the clock's")
    asked = parser.parse_args()
    clock = time.process_time if asked.cpu_time else time.perf_counter
    _said("cold import", _import_times())
    for name, device in product(("gru", "gru-mn"), ("cpu", "cuda")):
        first, again = answers(table(CadenceSettings(model=name)), device, clock, asked.rounds)  # type: ignore[arg-type]
        _said(f"{name} on {device}, first", first)
        _said(f"{name} on {device}, remembered", again)
    _said("plan", _plan_times())
    _said("plan, gru-mn in 3.5 GB", _plan_times("--set", "settings.model=gru-mn", "--budget", "3.5GB"))


if __name__ == "__main__":
    main()
