"""Samples per second of the engine beside its peers, interleaved.

    python -m benchmarks.throughput same|padded|precision|deterministic|overhead [--rounds 15] [--steps 60] [--batch 8 32 128]
                                    [--precision fp32] [--threads 2] [--data FILE] [--peers bare huggingface lightning]

same       everybody trains the task's model on the engine's own batches
padded     the others train the plain model on random batches padded to their longest
precision  the engine in bf16 against the engine in fp32
deterministic  the engine with deterministic kernels, as it comes, against the engine without
overhead   time per step on a 4x4 model, engine against a bare loop
A ratio above 1 means that the engine is faster. The interval is a bootstrap over rounds. Against what document 002 describes:
benchmarks/throughput/document.py.
"""

from __future__ import annotations

import argparse
import functools
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import contenders
from benchmarks.throughput.contenders import WARM, Padded, TokensOnly
from benchmarks.throughput.workload import Workload, prepare


def interval(ratios: list[float], draws: int = 4000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(draws * 0.025)], medians[int(draws * 0.975)]


def show(label: str, ours: list[float], theirs: list[float]) -> None:
    """Both lists: seconds for the same number of samples, round by round."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, high = interval(ratios)
    print(f"  engine / {label:12} {statistics.median(ratios):6.3f}  [{low:.3f}, {high:.3f}]", flush=True)


def peers_of(form: Any, names: list[str]) -> dict[str, Callable[..., float]]:
    return {name: getattr(contenders, name)(form) for name in names}


def interleave(workload: Workload, sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """A B C A B C …, the order turned by one each round, so that nobody always follows the same."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds + 1):  # the first round warms caches and is not counted
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = sides[name]()
            if number:
                seconds[name].append(taken)
    return seconds


def compare(asked: argparse.Namespace, form: Any) -> None:
    workload = prepare(data=asked.data, size=asked.size)
    others = workload.bucketed if form is TokensOnly else workload.shuffled
    for precision in asked.precision:
        for batch in asked.batch:
            sides = {"engine": lambda b=batch, p=precision: contenders.engine(workload, workload.bucketed, asked.steps, b, p)}
            for name, side in peers_of(form, asked.peers).items():
                sides[name] = lambda s=side, b=batch, p=precision: s(workload, others, asked.steps, b, p)
            seconds = interleave(workload, sides, asked.rounds)
            speed = {name: statistics.median((asked.steps - WARM) * batch / s for s in taken) for name, taken in seconds.items()}
            print(f"batch {batch}, {precision}: " + ", ".join(f"{name} {value:.0f}/s" for name, value in speed.items()))
            for name in list(sides)[1:]:
                show(name, seconds["engine"], seconds[name])


def precision(asked: argparse.Namespace) -> None:
    workload = prepare(data=asked.data, size=asked.size)
    for batch in asked.batch:
        sides = {p: (lambda b=batch, p=p: contenders.engine(workload, workload.bucketed, asked.steps, b, p)) for p in ("bf16", "fp32")}
        seconds = interleave(workload, sides, asked.rounds)
        print(f"batch {batch}: bf16 against fp32")
        show("fp32", seconds["bf16"], seconds["fp32"])


def deterministic(asked: argparse.Namespace) -> None:
    workload = prepare(data=asked.data, size=asked.size)
    for batch in asked.batch:
        run = functools.partial(contenders.engine, workload, workload.bucketed, asked.steps, batch, asked.precision[0])
        seconds = interleave(workload, {"auto": run, "off": lambda run=run: run(deterministic=False)}, asked.rounds)
        print(f"batch {batch}, {asked.precision[0]}: deterministic kernels against any")
        show("any kernels", seconds["auto"], seconds["off"])


def overhead(asked: argparse.Namespace) -> None:
    from benchmarks.throughput import tiny

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        sides = {"engine": lambda: tiny.engine(home, asked.steps), "bare": lambda: tiny.bare(asked.steps)}
        seconds = interleave(None, sides, asked.rounds)  # type: ignore[arg-type]
    steps = asked.steps - WARM
    milliseconds = {name: statistics.median(taken) / steps * 1e3 for name, taken in seconds.items()}
    extra = [(a - b) / steps * 1e3 for a, b in zip(seconds["engine"], seconds["bare"], strict=True)]
    low, high = interval(extra)
    print(f"4x4 model: engine {milliseconds['engine']:.3f} ms, bare {milliseconds['bare']:.3f} ms a step")
    print(f"  overhead {statistics.median(extra):.3f} ms  [{low:.3f}, {high:.3f}]")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("same", "padded", "precision", "deterministic", "overhead"))
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128])
    options.add_argument("--precision", nargs="+", default=["fp32"])
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--data")
    options.add_argument("--size", type=int)
    options.add_argument("--peers", nargs="*", default=["bare", "huggingface", "lightning"])
    asked = options.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(asked.threads)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{time.strftime('%Y-%m-%d')}  {machine}, {asked.rounds} rounds of {asked.steps} steps: {' '.join(sys.argv[1:])}")
    if asked.what == "same":
        compare(asked, TokensOnly)
    elif asked.what == "padded":
        compare(asked, Padded)
    else:
        {"precision": precision, "deterministic": deterministic, "overhead": overhead}[asked.what](asked)


if __name__ == "__main__":
    main()
