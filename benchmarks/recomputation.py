"""What computing blocks again costs and spares: `python -m benchmarks.recomputation`. Time against none, interleaved; tensors counted.

Forward and backward of one micro-batch, for a transformer and for CADENCE's memory network. Must not judge.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.chunked_loss import interval
from benchmarks.memory.families import Family, family
from tests.memory_oracle import TensorCount

MODES = ("none", "selective", "full")


def seconds(made: torch.nn.Module, parts: Family, samples: int, low: bool) -> float:
    """One forward and backward pass."""
    batch = parts.batch(samples)
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = made(*batch)
    loss.backward()
    spent = time.perf_counter() - began
    made.zero_grad()
    return spent


def held(made: torch.nn.Module, parts: Family, samples: int, low: bool) -> int:
    """The most that tensors hold beyond the weights."""
    with TensorCount([*made.parameters(), *made.buffers()]) as count:
        seconds(made, parts, samples, low)
    return count.peak - count.known


def main() -> None:
    """A line for each model, precision and mode."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recomputation", description=__doc__)
    parser.add_argument("--families", nargs="*", default=["gpt", "gru-mn"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.families:
        for low in (False, True):
            parts = {mode: family(name, mode) for mode in MODES}
            made = {mode: parts[mode].model().train() for mode in MODES}
            bytes_held = {mode: held(made[mode], parts[mode], asked.samples, low) for mode in MODES}
            rounds = [{mode: seconds(made[mode], parts[mode], asked.samples, low) for mode in MODES} for _ in range(asked.rounds)]
            for mode in MODES[1:]:
                ratios = [times[mode] / times["none"] for times in rounds]
                low_end, high_end = interval(ratios)
                print(
                    f"{name}, {'bf16' if low else 'fp32'}, {asked.samples} samples, {mode}: time {statistics.median(ratios):.3f} "
                    f"[{low_end:.3f}, {high_end:.3f}] of {statistics.median(t['none'] for t in rounds) * 1e3:.0f} ms, "
                    f"held {bytes_held[mode] / 1e6:.1f} MB of {bytes_held['none'] / 1e6:.1f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
