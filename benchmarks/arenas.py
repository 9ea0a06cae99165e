"""What keeping large blocks in the heap is worth: kept, given back, and as glibc comes, in processes of their own, in turn.

    python -m benchmarks.arenas --data FILE [--rounds 5] [--batch 8 32 128] [--precision fp32] [--threads 2]

Prints samples per second, minor page faults per step and the ratio, a bootstrap interval over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trainerd.memory import heap

STEPS = {8: 400, 32: 240, 128: 90}


SIDES = ("kept", "given-back", "as-it-comes")


def one(side: str, asked: argparse.Namespace) -> None:
    """A training in this process; prints [samples per second, page faults per step] of its second half."""
    from trainerd.config.model import DataConfig, RunConfig, TrainConfig
    from trainerd.engine import arenas, fitting
    from trainerd.engine.loop import Link
    from trainerd.engine.trainer import Trainer
    from trainerd.tasks.cadence.settings import CadenceSettings
    from trainerd.tasks.cadence.task import CadenceTask

    class Half(Link):
        """Notes the page faults at the middle."""

        faults = 0

        def send(self, event: str, **fields: object) -> None:
            if event == "progress" and not self.faults and int(str(fields["step"])) >= steps // 2:
                self.faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                self.step = int(str(fields["step"]))

    if side != "as-it-comes" and not arenas.hold(heap.KEPT if side == "kept" else heap.GIVEN_BACK):
        raise SystemExit("This C library has no such setting.")
    fitting._hold_blocks = lambda *_: None  # whatever room there is
    steps = STEPS[asked.batch[0]]
    train = TrainConfig(batch_size=asked.batch[0], max_steps=steps, precision=asked.precision, threads=asked.threads)
    train.eval_every_steps = 10**6
    config = RunConfig(data=DataConfig(path=str(asked.data)), train=train)
    config.checkpoint.every_steps = 10**6
    link = Half()
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(CadenceTask(CadenceSettings()), config, home=asked.home, run=f"{side}-{asked.batch[0]}-{asked.round}", link=link)
        trainer.train()
    rows = [json.loads(line) for line in trainer.paths.metrics.read_text("ascii").splitlines()]
    times = [row["t"] for row in rows if "loss" in row]
    per_second = asked.batch[0] * (steps - 1 - steps // 4) / (times[-1] - times[steps // 4])
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - link.faults) / max(1, steps - link.step)
    print(json.dumps([per_second, faults]))


def _environment(side: str) -> dict[str, str]:
    """As the supervisor starts a trainer; or as anybody starts a program."""
    if side == "as-it-comes":
        return dict(os.environ)
    return {**os.environ, heap.TUNABLES: heap.tunables(os.environ.get(heap.TUNABLES))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128], choices=STEPS)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked.one, asked)
        return
    from benchmarks.throughput.__main__ import interval

    with tempfile.TemporaryDirectory() as home:
        for batch in asked.batch:
            found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
            for number in range(asked.rounds):
                for side in sorted(found, reverse=bool(number % 2)):
                    command = [sys.executable, "-m", "benchmarks.arenas", "--one", side, "--data", str(asked.data), "--batch", str(batch)]
                    command += ["--precision", asked.precision, "--threads", str(asked.threads), "--home", home, "--round", str(number)]
                    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=_environment(side))
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
            shown = {side: [round(statistics.median(column)) for column in zip(*rows, strict=True)] for side, rows in found.items()}
            print(f"batch {batch}, {asked.precision}: [samples/s, faults/step] {shown}")
            for side in SIDES[1:]:
                ratios = [kept[0] / other[0] for kept, other in zip(found["kept"], found[side], strict=True)]
                low, high = interval(ratios)
                print(f"  kept / {side}  {statistics.median(ratios):.3f}  [{low:.3f}, {high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
