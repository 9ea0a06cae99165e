"""Samples per second of the engine beside what document 002 describes, to the same held-out loss; each side a process of its own.

    python -m benchmarks.throughput.document --data FILE [--rounds 9] [--steps 150] [--precision auto] [--threads 2] [--curve]

Both train CADENCE's default model at an effective batch of 32 for the same number of samples; then both are scored on the same
held-out split. The engine runs as the daemon's trainer does, heap settings included, which a process of their own keeps from
the other side. Prints the ratio with a bootstrap interval over rounds, and both losses. With --curve no times, but the losses of
both after equal numbers of samples: who needs fewer for the same loss.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM = 10
BATCH = 32


def ours(asked: argparse.Namespace, every_steps: int) -> tuple[float, dict[int, float]]:
    """Samples per second of the engine, and its held-out loss after each so many steps."""
    from benchmarks.throughput.workload import prepare
    from trainerd.config.model import RunConfig
    from trainerd.engine import arenas
    from trainerd.engine.loop import Link
    from trainerd.engine.trainer import Trainer
    from trainerd.memory import heap

    arenas.hold(heap.GIVEN_BACK)  # as a trainer begins; it keeps them where there is room
    workload = prepare(Path(asked.home), asked.data)
    words = workload.config.model_dump()
    train = {"batch_size": BATCH, "precision": asked.precision, "scheduler": "constant", "threads": asked.threads}
    words["train"].update(train, max_steps=asked.steps, eval_every_steps=every_steps)
    run = f"engine-{time.monotonic_ns()}"
    settings = workload.task.settings
    Trainer(type(workload.task)(settings), RunConfig.model_validate(words), home=workload.home, run=run, link=Link()).train()
    rows = [json.loads(line) for line in (workload.home / "runs" / run / "metrics.jsonl").read_text("utf-8").splitlines()]
    stamps = {row["step"]: row["t"] for row in rows if "loss" in row}
    held_out = {row["step"]: row["eval"]["loss"] for row in rows if "eval" in row}
    for kind in ("runs", "checkpoints", "models"):
        shutil.rmtree(workload.home / kind / run, ignore_errors=True)
    return (asked.steps - WARM) * BATCH / (stamps[asked.steps] - stamps[WARM]), held_out


def theirs(asked: argparse.Namespace, every_steps: int) -> tuple[float, dict[int, float]]:
    """The same of the recipe: padded batches of 8, 4 of them a step, cleaned up every 10. Only the last evaluation is not in its time."""
    import torch

    from benchmarks.throughput import contenders
    from benchmarks.throughput.workload import prepare

    torch.set_num_threads(asked.threads)
    workload = prepare(Path(asked.home), asked.data)
    held_out: dict[int, float] = {}

    def after(step: int, work: contenders.Padded) -> None:
        if step % every_steps == 0 and step < asked.steps:
            held_out[step] = contenders.held_out_loss(workload, work)

    seconds, work = contenders.document(workload, asked.steps, WARM, after)
    held_out[asked.steps] = contenders.held_out_loss(workload, work)
    return (asked.steps - WARM) * BATCH / seconds, held_out


def one(side: str, asked: argparse.Namespace) -> tuple[float, float]:
    """A round of one side, in a new process."""
    command = [sys.executable, "-m", "benchmarks.throughput.document", "--one", side, "--home", asked.home, "--steps", str(asked.steps)]
    command += ["--precision", asked.precision, "--threads", str(asked.threads), *(["--data", asked.data] if asked.data else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    per_second, held_out = json.loads(done.stdout.splitlines()[-1])
    return per_second, held_out[str(asked.steps)]


def curve(asked: argparse.Namespace) -> None:
    """The held-out losses after equal numbers of samples, eight times on the way."""
    with tempfile.TemporaryDirectory() as asked.home:
        every_steps = max(1, asked.steps // 8)
        with contextlib.redirect_stdout(io.StringIO()):
            losses = {"engine": ours(asked, every_steps)[1], "document 002": theirs(asked, every_steps)[1]}
    steps = sorted(set.intersection(*map(set, losses.values())))
    print("samples".ljust(14) + "".join(f"{step * BATCH:9}" for step in steps))
    for side, at in losses.items():
        print(side.ljust(14) + "".join(f"{at[step]:9.4f}" for step in steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--curve", action="store_true", help="losses after equal numbers of samples instead of times")
    parser.add_argument("--one", choices=["engine", "document"], help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        with contextlib.redirect_stdout(io.StringIO()):
            found = (ours if asked.one == "engine" else theirs)(asked, asked.steps)
        print(json.dumps(found))
        return
    if asked.curve:
        curve(asked)
        return
    from benchmarks.throughput.__main__ import interval

    found_by: dict[str, list[tuple[float, float]]] = {"engine": [], "document": []}
    with tempfile.TemporaryDirectory() as asked.home:
        for number in range(asked.rounds + 1):  # the first fills the caches of data and files
            for side in sorted(found_by, reverse=bool(number % 2)):
                result = one(side, asked)
                if number:
                    found_by[side].append(result)
    ratios = [a[0] / b[0] for a, b in zip(found_by["engine"], found_by["document"], strict=True)]
    low, high = interval(ratios)
    print(f"effective batch {BATCH}, engine {asked.precision}, document 002 fp32, {asked.threads} threads, {asked.rounds} rounds")
    for side, rows in found_by.items():
        speed, loss = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"  {side:9} {speed:6.0f} samples/s, held-out loss {loss:.4f} after {asked.steps * BATCH} samples")
    print(f"  engine / document 002  {statistics.median(ratios):.3f}  [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
