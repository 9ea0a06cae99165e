"""The RAM of real trainings of own tasks on a CPU beside what was foretold: the process's peak, likely and at most.

    python -m benchmarks.memory.ram [--steps 6] [--heap kept given-back system] [--only NAME ...]

Each training is a process of its own, and runs twice: traced first, then with the trace that was kept.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trainerd.memory import heap

HEAPS = ("kept", "given-back", "system")
CASES: dict[str, dict[str, Any]] = {
    "gpt": {"settings": {}, "batch_size": 32},
    "gpt full": {"settings": {}, "batch_size": 32, "activation_checkpointing": "full"},
    "gpt bf16": {"settings": {}, "batch_size": 32, "precision": "bf16"},
    "gpt 4 pieces": {"settings": {}, "batch_size": 64, "micro_batch": 16},
    "gpt wide": {"settings": {"width": 512, "depth": 2, "words": 16000}, "batch_size": 16},
    "lora": {"settings": {"kind": "lora"}, "batch_size": 32},
    "lora full bf16": {"settings": {"kind": "lora"}, "batch_size": 32, "activation_checkpointing": "full", "precision": "bf16"},
    "lora base": {"settings": {"kind": "lora"}, "batch_size": 8, "offload": "base", "activation_checkpointing": "full"},
    "lora base wide": {"settings": {"kind": "lora", "width": 768}, "batch_size": 4, "offload": "base", "activation_checkpointing": "full"},
    "qlora base": {"settings": {"kind": "qlora"}, "batch_size": 8, "offload": "base", "activation_checkpointing": "full"},
    "by hand": {"settings": {"kind": "by-hand", "length": 384}, "batch_size": 8},
    "by hand full": {"settings": {"kind": "by-hand", "length": 384}, "batch_size": 8, "activation_checkpointing": "full"},
    "cnn": {"settings": {"kind": "cnn", "width": 32, "length": 48}, "batch_size": 32},
    "cnn bf16": {"settings": {"kind": "cnn", "width": 32, "length": 48}, "batch_size": 32, "precision": "bf16"},
    "ragged": {"settings": {"kind": "ragged"}, "batch_size": 32},
    "ragged 4 pieces": {"settings": {"kind": "ragged"}, "batch_size": 64, "micro_batch": 16},
    "data": {"settings": {"data_mb": 600, "depth": 1}, "batch_size": 8},
}


def one(asked: argparse.Namespace) -> None:
    """A training in this process; its receipt is what is read of it."""
    from benchmarks.memory.ram_task import Net, Settings
    from trainerd.config.model import RunConfig
    from trainerd.engine import arenas, fitting
    from trainerd.engine.loop import Link
    from trainerd.engine.trainer import Trainer

    if asked.one != "system":
        arenas.hold(heap.GIVEN_BACK)  # as a trainer begins
    if asked.one == "given-back":
        fitting._hold_blocks = lambda *_: None  # as where there is no room for holes
    case = dict(CASES[asked.only[0]])
    settings = Settings(**case.pop("settings"))
    memory = {"offload": case.pop("offload", "none")}
    train = {"precision": "fp32", "threads": 1, "max_steps": asked.steps, "activation_checkpointing": "none", **case}
    train.setdefault("micro_batch", train["batch_size"])
    config = RunConfig.model_validate({"train": train, "memory": memory, "settings": settings.model_dump()})
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(Net(settings), config, home=asked.home, run=asked.run, link=Link(), traces=True).train()


def trained(name: str, how: str, home: Path, run: str, steps: int) -> tuple[float, float, float]:
    """A training in a process of its own: bytes likely, at most, and really."""
    words = ["--one", how, "--only", name, "--home", str(home), "--run", run, "--steps", str(steps)]
    environment = {**os.environ, "TRAINERD_STATE": str(home / "state"), "OMP_NUM_THREADS": "1"}
    if how != "system":
        environment[heap.TUNABLES] = heap.tunables(environment.get(heap.TUNABLES))  # as the supervisor starts a trainer
    subprocess.run([sys.executable, "-m", "benchmarks.memory.ram", *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    found = json.loads((home / "runs" / run / "receipt.json").read_text("utf-8"))
    return found["predicted"]["ram_bytes"], found["at_most"]["ram_bytes"], found["real"]["ram_bytes"]


def measured(home: Path) -> None:
    """This machine, once: the bare trainer's RAM is not what is asked here."""
    subprocess.run([sys.executable, "-m", "trainerd.engine.measuring", "--home", str(home)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--heap", nargs="+", choices=HEAPS, default=list(HEAPS))
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--one", choices=HEAPS, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked)
        return
    print("| training | large blocks | MB likely | at most | real | traced first: at most | real | real / likely |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    beyond = total = 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        measured(home)
        for how in asked.heap:
            for name in asked.only:
                run = f"{how}-{name}".replace(" ", "-")
                _, first_most, first = (value / 1e6 for value in trained(name, how, home, f"{run}-first", asked.steps))
                likely, most, again = (value / 1e6 for value in trained(name, how, home, f"{run}-again", asked.steps))
                beyond += (first > first_most) + (again > most)
                total += 2
                numbers = f"{likely:.0f} | {most:.0f} | {again:.0f} | {first_most:.0f} | {first:.0f} | {again / likely:.2f}"
                print(f"| {name} | {how} | {numbers} |", flush=True)
    print(f"\n{beyond} of {total} beyond at most")


if __name__ == "__main__":
    main()
