"""CADENCE's memory layer with its gradient by hand, against the same formulas left to autograd: `python -m benchmarks.memory_layer`.

Forward and backward of one layer of the paper's model, or of another size; processor time in turns, tensors counted. Must not judge.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.chunked_loss import interval
from tests.memory_oracle import TensorCount
from trainerd.tasks.cadence.model import MemoryLayer


def by_autograd(layer: MemoryLayer, inputs: torch.Tensor) -> torch.Tensor:
    """As the layer was computed before: tape and keys copied at each place, tables of scores kept for the way back."""
    given, hidden = layer.from_input(inputs), layer.hidden
    assert layer.key is not None and layer.score is not None
    tape, keys = given.new_zeros(len(given), 0, hidden), given.new_zeros(len(given), 0, layer.key.out_features)
    recall = keys.new_zeros(len(given), keys.shape[2])
    for here in given.unbind(1):
        past = given.new_zeros(len(given), hidden)
        if tape.shape[1]:
            weights = torch.softmax(layer.score(torch.tanh(keys + (here[:, 3 * hidden :] + recall).unsqueeze(1))), 1)
            past = (weights.transpose(1, 2) @ tape).squeeze(1)
        read = layer.from_past(past)
        reset, update = torch.sigmoid(here[:, : 2 * hidden] + read[:, : 2 * hidden]).chunk(2, -1)
        new = torch.tanh(here[:, 2 * hidden : 3 * hidden] + reset * read[:, 2 * hidden : 3 * hidden])
        state, recall = torch.lerp(new, past.to(new.dtype), update), read[:, 3 * hidden :]
        tape, keys = torch.cat([tape, state.unsqueeze(1)], 1), torch.cat([keys, layer.key(state).unsqueeze(1)], 1)
    return tape


def by_hand(layer: MemoryLayer, inputs: torch.Tensor) -> torch.Tensor:
    """As it is."""
    return layer(inputs, None)[0]  # type: ignore[no-any-return]


Way = Callable[[MemoryLayer, torch.Tensor], torch.Tensor]


def step(way: Way, layer: MemoryLayer, inputs: torch.Tensor, low: bool) -> float:
    """Seconds of the processor for one forward and backward pass."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        made = way(layer, inputs)
    made.float().square().sum().backward()
    layer.zero_grad()
    return time.process_time() - began


def held(way: Way, layer: MemoryLayer, inputs: torch.Tensor, low: bool) -> int:
    """The most that tensors hold beyond the weights and the input."""
    with TensorCount([*layer.parameters(), inputs]) as count:
        step(way, layer, inputs, low)
    return count.peak - count.known


def main() -> None:
    """A line for each precision and micro-batch."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_layer", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs=3, default=[256, 2000, 1000], metavar=("WIDTH", "HIDDEN", "ATTENTION"))
    parser.add_argument("--places", type=int, default=25)
    parser.add_argument("--samples", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    layer = MemoryLayer(*asked.sizes)
    for low in (False, True):
        for samples in asked.samples:
            inputs = torch.randn(samples, asked.places, asked.sizes[0])
            before, after = (held(way, layer, inputs, low) for way in (by_autograd, by_hand))
            rounds = [(step(by_autograd, layer, inputs, low), step(by_hand, layer, inputs, low)) for _ in range(asked.rounds)]
            ratios = [hand / plain for plain, hand in rounds]
            least, most = interval(ratios)
            print(
                f"{'bf16' if low else 'fp32'}, {samples} samples: time {statistics.median(ratios):.3f} [{least:.3f}, {most:.3f}] of "
                f"{statistics.median(plain for plain, _ in rounds):.2f} s, held {after / 1e6:.0f} MB of {before / 1e6:.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
