"""The loss in pieces against torch's own, interleaved: `python -m benchmarks.chunked_loss`. Ratios of time with bootstrap intervals.

Forward and backward of the last layer alone; below 1 the pieces are faster. Must not judge.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trainerd.engine.chunked import linear_cross_entropy

_DRAWS = 2000


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """torch's own."""
    return functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="sum")


def seconds(loss: Callable[..., Tensor], given: list[Tensor], low: bool) -> float:
    """One forward and backward pass, from no gradients to all."""
    for tensor in given:
        tensor.grad = None
    device = given[0].device.type
    began = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=low):
        value = loss(*given)
    value.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of ratios drawn from these."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_DRAWS))
    return medians[int(_DRAWS * 0.025)], medians[int(_DRAWS * 0.975)]


def main() -> None:
    """A line for each shape."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chunked_loss", description=__doc__)
    parser.add_argument("--words", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 768])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for low in (False, True):
        for width in asked.widths:
            for tokens in asked.tokens:
                torch.manual_seed(0)
                weight = torch.randn(asked.words, width, device=device) * width**-0.5
                learned = [torch.randn(tokens, width, device=device), weight, torch.zeros(asked.words, device=device)]
                given = [*(t.requires_grad_() for t in learned), torch.randint(0, asked.words, (tokens,), device=device)]
                seconds(plain, given, low), seconds(linear_cross_entropy, given, low)
                pairs = [(seconds(linear_cross_entropy, given, low), seconds(plain, given, low)) for _ in range(asked.rounds)]
                ratios = [ours / theirs for ours, theirs in pairs]
                low_end, high_end = interval(ratios)
                print(
                    f"{device}, {'bf16' if low else 'fp32'}, {asked.words} words, width {width}, {tokens} tokens: "
                    f"{statistics.median(ratios):.3f} [{low_end:.3f}, {high_end:.3f}] "
                    f"of {statistics.median(theirs for _, theirs in pairs) * 1e3:.0f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
