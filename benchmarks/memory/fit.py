"""How close the planner comes to the largest micro-batch that really fits, without a failed step: `python -m benchmarks.memory.fit`.

The truth is found by search: the real engine trains three steps where every tensor is counted and a budget is enforced.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.memory import counted
from benchmarks.memory.families import HELD_OUT, KNOWN, Family, family
from trainerd.memory.planner import FITS, judge

SHARES = (0.25, 0.4, 0.6, 0.9)
"""Of the way from one sample at a time to the whole batch at once."""


@dataclass(frozen=True)
class Fit:
    """One budget: the largest micro-batch that fits, the largest the planner holds for one that does, and what it chose."""

    family: str
    batch: int
    budget_bytes: int
    truth: int
    limit: int
    chosen: int
    refused: int
    """Allocations that were refused while training as planned."""

    @property
    def share(self) -> float:
        return self.limit / max(1, self.truth)


@cache
def peak(name: str, batch: int, micro_batch: int) -> int:
    """Of tensors, while the real engine trains."""
    count, _ = counted.train(family(name), counted.configuration(batch, micro_batch=micro_batch), 1 << 60)
    return count.peak


def largest(fits: object, most: int) -> int:
    """The largest number up to `most` for which `fits` holds, by bisection; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):  # type: ignore[operator]
            low = middle
        else:
            high = middle - 1
    return low


def fit(name: str, batch: int, share: float) -> Fit:
    """Search the truth, ask the planner, and train as it says.

    The truth and the planner's limit are for pieces that are all as large: two of them, so that gradients of the first are there. (Of 16
    samples as 10 + 6 the large piece would meet none, and the small one less than it.)
    """
    parts: Family = family(name)
    table = counted.FamilyTable(name, parts)
    most = batch // 2
    smallest, whole = peak(name, 2, 1), peak(name, 2 * most, most)
    budget = int(smallest + (whole - smallest) * share)
    truth = largest(lambda samples: peak(name, 2 * samples, samples) <= budget, most)

    def planned(samples: int) -> bool:
        answer = counted.plan(table, counted.configuration(2 * samples, micro_batch=samples), budget)
        return judge(answer.estimate, answer.budget_bytes) == FITS

    limit = largest(planned, most)
    chosen = counted.plan(table, counted.configuration(batch), budget).setup.micro_batch
    count, _ = counted.train(parts, counted.configuration(batch, micro_batch=chosen), budget)
    return Fit(name, batch, budget, truth, limit, chosen, count.refused)


def main() -> None:
    """A line for each family and budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.fit", description=__doc__)
    parser.add_argument("--families", nargs="*", default=[*KNOWN, *HELD_OUT])
    parser.add_argument("--batch", type=int, default=48)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for name in asked.families:
        for share in SHARES:
            one = fit(name, asked.batch, share)
            found.append(one)
            print(f"{one}: limit {one.share:.1%} of the truth", flush=True)
    least, refused = min(one.share for one in found), sum(one.refused for one in found)
    print(f"{len(found)} budgets: planner's limit at least {least:.1%} of the truth, refused allocations {refused}")


if __name__ == "__main__":
    main()
