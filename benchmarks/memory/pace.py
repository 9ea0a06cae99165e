"""A step's time on this CPU beside what is foretold of it: the model families in the real engine, after the machine was measured.

    python -m benchmarks.memory.pace [--only gru ...] [--steps 12] [--threads 1] [--precision fp32 bf16] [--parts]

Each row is a training of its own; its time is the median from step to step, the first three left out. For a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
from pathlib import Path

from benchmarks.memory.counted import FamilyTable, FamilyTask
from benchmarks.memory.families import family
from trainerd.config.model import RunConfig
from trainerd.engine import measuring
from trainerd.engine.loop import Link
from trainerd.engine.trainer import Trainer
from trainerd.memory.estimate import estimate
from trainerd.memory.timeline import Setup

BATCHES = {"gru": (8, 64), "gru-mn": (4, 16), "gpt": (4, 16), "cnn3d": (4, 16), "convnet": (8,), "llama-lora": (4, 16)}
_LEFT_OUT = 3


def real(name: str, batch: int, precision: str, threads: int, steps: int) -> float:
    """Seconds from step to step."""
    train = {"batch_size": batch, "micro_batch": batch, "max_steps": steps, "precision": precision, "threads": threads, "epochs": 1}
    config = RunConfig.model_validate({"task": "family", "name": "family", "train": train, "checkpoint": {"every_steps": 10**6}})
    with tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(FamilyTask(family(name), batch * steps), config, home=Path(home), link=Link())
        trainer.train()
        rows = [json.loads(line) for line in trainer.paths.metrics.read_text("ascii").splitlines()]
    times = [row["t"] for row in rows if "loss" in row]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times[_LEFT_OUT - 1 :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--parts", action="store_true", help="what the estimate is made of, too")
    asked = parser.parse_args()
    profile, _, _ = measuring.measured(asked.threads)
    print(f"{profile.gigaflops}, {(profile.ram_bytes_per_second or 0) / 1e9:.1f} GB/s, {asked.threads} threads")
    print("| family | samples | precision | ms likely | at most | real | likely / real |\n|---|---|---|---|---|---|---|", flush=True)
    ratios, beyond = [], 0
    for name, precision in itertools.product(asked.only, asked.precision):
        for batch in BATCHES[name]:
            found = estimate(FamilyTable(name, family(name)), Setup("cpu", precision, batch, batch), profile)
            assert found.seconds_per_step is not None
            likely, most = found.seconds_per_step.point, found.seconds_per_step.upper
            took = real(name, batch, precision, asked.threads, asked.steps)
            ratios.append(likely / took)
            beyond += took > most
            numbers = f"{likely * 1e3:.1f} | {most * 1e3:.1f} | {took * 1e3:.1f} | {ratios[-1]:.2f}"
            print(f"| {name} | {batch} | {precision} | {numbers} |", flush=True)
            if asked.parts:
                line = FamilyTable(name, family(name)).timeline(Setup("cpu", precision, batch, batch))
                about = {"flops": line.flops, "made_bytes": line.made_bytes, "operations": line.operations, "learned": line.num_trainable}
                print(json.dumps({**about, "state_bytes": line.state_bytes, "seconds": took}), flush=True)
    spread = f"median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
    print(f"\nlikely / real: {spread}; {beyond} of {len(ratios)} beyond at most")


if __name__ == "__main__":
    main()
