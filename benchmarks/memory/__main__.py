"""Estimate against count, over families × micro-batch × precision × checkpointing × accumulation: `python -m benchmarks.memory`.

Two truths for each cell: tensors (a dispatch mode counts every one) and torch's CPU allocator (kernels' scratch included).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from benchmarks.memory.families import HELD_OUT, KNOWN, Family, family
from tests.memory_oracle import TensorCount, allocator_changes, peak
from trainerd.engine import attention
from trainerd.memory import heap
from trainerd.memory.estimate import _PROCESS_SLACK_BYTES
from trainerd.memory.optimizers import Optimizer
from trainerd.memory.tape import GRADIENTS, Tape

_TYPES = {torch.int64: "int64", torch.float32: "fp32"}


@dataclass
class Cell:
    """One configuration, the estimate of its peak and the two counts, in bytes."""

    family: str
    micro_batch: int
    precision: str
    checkpointing: str
    accumulation: int
    counted: int
    estimated: int
    allocator: int
    estimated_in_place: int
    most: int
    """The upper bound for tensors: what an estimate adds to those that come and go."""
    most_in_place: int
    """The same as torch is when nothing counts its tensors: a bound for its allocator, but for what is kept for the process."""
    milliseconds: float

    @property
    def error(self) -> float:
        return (self.estimated - self.counted) / self.counted

    @property
    def allocator_error(self) -> float:
        return (self.estimated_in_place - self.allocator) / self.allocator


def training(
    made: torch.nn.Module, parts: Family, optimizer: torch.optim.Optimizer, samples: int, precision: str, accumulation: int
) -> None:
    """What the engine does: states first, then one step of `accumulation` micro-batches."""
    weights = [p for p in made.parameters() if p.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(accumulation):
        batch = parts.batch(samples)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = made(*batch)
        loss.backward()
        del loss, batch
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(weights, 1.0, norm)
    del norm
    optimizer.step()
    optimizer.zero_grad()


def counted(parts: Family, samples: int, precision: str, accumulation: int) -> int:
    """The peak of tensors."""
    made, weights = _model(parts)
    with attention.for_trace(parts.attention), TensorCount([*made.parameters(), *made.buffers()]) as count:
        training(made, parts, torch.optim.AdamW(weights, fused=True), samples, precision, accumulation)
    return count.peak


def allocated(parts: Family, samples: int, precision: str, accumulation: int) -> int:
    """The peak of torch's CPU allocator, the weights included."""
    made, weights = _model(parts)
    known = TensorCount([*made.parameters(), *made.buffers()]).known
    optimizer = torch.optim.AdamW(weights, fused=True)
    with attention.for_trace(parts.attention):
        return known + peak(allocator_changes(lambda: training(made, parts, optimizer, samples, precision, accumulation)))


def _model(parts: Family) -> tuple[torch.nn.Module, list[torch.nn.Parameter]]:
    torch.manual_seed(0)
    made = parts.model()
    return made, [p for p in made.parameters() if p.requires_grad]


def estimated(parts: Family, samples: int, precision: str, accumulation: int, *, in_place: bool) -> tuple[int, int]:
    """The peak of the same step on tensors without contents, and the bound that a plan would take for it (without a process's slack)."""
    tape = Tape("cpu", None if precision == "fp32" else precision)
    tape.adds_in_place = in_place
    made = parts.table(tape)
    optimizer = Optimizer(tape, "adamw")
    optimizer.allocate()
    resting = tape.live
    shapes = [(tuple(t.shape), _TYPES[t.dtype]) for t in parts.batch(samples)]
    for _ in range(accumulation):
        batch = [tape.input(*shape, dtype=dtype) for shape, dtype in shapes]
        with tape.autocast():
            loss = made(*batch)
        tape.backward(loss)
        del loss, batch
    optimizer.clip()
    optimizer.work()
    optimizer.zero_grad()
    coming = max(0, tape.peak - resting - tape.breakdown().get(GRADIENTS, 0))
    return tape.peak, int(tape.peak + tape.scratch + heap.MOST[heap.GIVEN_BACK].of(coming))


def cells(names: list[str], batches: list[int]) -> Iterator[Cell]:
    """The grid. CADENCE's laptop form has no blocks to checkpoint."""
    for name in names:
        for again in ("none", "selective", "full") if name != "gru" else ("none",):
            for samples in batches:
                for precision in ("fp32", "bf16"):
                    for accumulation in (1, 4):
                        parts = family(name, again)
                        began = time.perf_counter()
                        guess, most = estimated(parts, samples, precision, accumulation, in_place=False)
                        spent = (time.perf_counter() - began) * 1e3
                        in_place, bound = estimated(parts, samples, precision, accumulation, in_place=True)
                        truth, allocator = (of(parts, samples, precision, accumulation) for of in (counted, allocated))
                        yield Cell(name, samples, precision, again, accumulation, truth, guess, allocator, in_place, most, bound, spent)


def _say(found: list[Cell], what: str, errors: list[float]) -> None:
    ordered = sorted(abs(e) for e in errors)
    p95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    exact = sum(e == 0 for e in errors)
    under = sum(e < -0.001 for e in errors)
    print(
        f"{what}: {len(found)} cells, exact {exact}, median |error| {statistics.median(ordered):.3%}, p95 {p95:.3%}, "
        f"max {ordered[-1]:.3%}, too low by more than 0.1 %: {under}"
    )


def main() -> None:
    """Print every cell that is not exact, and a line for each family."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--families", nargs="*", default=[*KNOWN, *HELD_OUT])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--json", action="store_true", help="one JSON line per cell instead")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for cell in cells(asked.families, asked.batches):
        found.append(cell)
        if asked.json:
            print(json.dumps(asdict(cell)), flush=True)
        elif cell.error:
            print(f"  {cell}: {cell.error:+.3%}", file=sys.stderr)
    for name in asked.families:
        some = [cell for cell in found if cell.family == name]
        _say(some, f"{name}{' (held out)' if name in HELD_OUT else ''}, tensors", [cell.error for cell in some])
        _say(some, f"{name}, CPU allocator", [cell.allocator_error for cell in some])
    _say(found, "all, tensors", [cell.error for cell in found])
    print(f"tensors beyond the upper bound: {sum(cell.counted > cell.most for cell in found)} of {len(found)} cells")
    beyond = [cell.allocator - cell.most_in_place for cell in found if cell.allocator > cell.most_in_place]
    slack = f"beyond its {_PROCESS_SLACK_BYTES >> 20} MiB for the process as well {sum(n > _PROCESS_SLACK_BYTES for n in beyond)}"
    print(f"the allocator beyond the upper bound: {len(beyond)}, by {max(beyond, default=0) / 1e6:.1f} MB at most; {slack}")
    times = sorted(cell.milliseconds for cell in found)
    print(f"time for an estimate: median {statistics.median(times):.1f} ms, most {times[-1]:.1f} ms")


if __name__ == "__main__":
    main()
