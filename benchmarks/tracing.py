"""How long it takes to foretell the memory of a GPT of so many GB, and what RAM it takes: on real tensors, and on ones without memory.

    python -m benchmarks.tracing [--gb 0.1 1 3] [--kind real without] [--tokens 1024]

Each case runs in a process of its own. The weights of the model are allocated and touched, as a task's model() leaves them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from benchmarks.memory import families
from benchmarks.memory.counted import FamilyTask, configuration
from benchmarks.memory.families import Family
from trainerd.engine import trace
from trainerd.engine.largest import largest
from trainerd.engine.precision import Precision
from trainerd.engine.task import TaskContext

_WORDS = 32_000
_SHAPES = {0.02: (128, 6), 0.1: (384, 7), 0.3: (768, 7), 1.0: (1280, 11), 3.0: (2048, 14)}
"""Width and blocks, by GB of weights."""


class _Blocks(FamilyTask):
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)  # type: ignore[arg-type]


def _task(gb: float, tokens: int, precision: Precision) -> _Blocks:
    width, depth = _SHAPES[gb]

    def batch(samples: int) -> list[Tensor]:
        return [torch.randint(0, _WORDS, (samples, tokens)) for _ in range(2)]

    made = Family(lambda: families._Gpt(_WORDS, width, width // 64, depth, tokens), lambda tape: lambda *given: given[0], batch)
    task = _Blocks(made, 64)
    data = configuration(8).data
    task.bind(TaskContext(device=torch.device("cpu"), dtype=precision.dtype, seed=0, cache_dir=Path(tempfile.gettempdir()), data=data))
    return task


class _Most:
    """The most RAM the process holds while it lasts, looked at every 5 ms."""

    def __enter__(self) -> _Most:
        self._process, self._going = psutil.Process(), True
        self.bytes = self.now()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._going = False
        self._thread.join()

    def now(self) -> int:
        return int(self._process.memory_info().rss)

    def _look(self) -> None:
        while self._going:
            self.bytes = max(self.bytes, self.now())
            time.sleep(0.005)


def one(gb: float, kind: str, tokens: int, name: str) -> str:
    """A line of the table."""
    precision = Precision(name, torch.device("cpu"))
    task = _task(gb, tokens, precision)
    model = task.model()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    data = task.dataset("train")
    tracing = trace._Tracing(task, model, data, precision, 8, "auto", trace.Means(), largest(task, data))
    with _Most() as most:
        before, began = most.now(), time.monotonic()
        table = tracing.without_memory() if kind == "without" else tracing.computed(1e9)
        seconds, after = time.monotonic() - began, most.now()
    peak = table.modes["none"].steps[-1].peak
    ram = " ".join(f"{n / 1e6:7.0f}" for n in (before, most.bytes, after))
    return f"{weights / 1e9:5.2f} GB {name:5} {kind:8} {seconds:7.1f} s   RAM before, most, after (MB) {ram}   step {peak / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gb", type=float, nargs="+", default=[0.1, 1.0, 3.0])
    parser.add_argument("--kind", nargs="+", default=["real", "without"])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--alone", action="store_true")
    asked = parser.parse_args()
    if asked.alone:
        print(one(asked.gb[0], asked.kind[0], asked.tokens, asked.precision[0]), flush=True)
        return
    for gb in asked.gb:
        for precision in asked.precision:
            for kind in asked.kind:
                words = ["--gb", str(gb), "--kind", kind, "--precision", precision, "--tokens", str(asked.tokens), "--alone"]
                subprocess.run([sys.executable, "-m", "benchmarks.tracing", *words], check=True)


if __name__ == "__main__":
    main()
