"""What convolutions hold beside their tensors on this CPU, against the rule of the upper bound: `python -m benchmarks.memory.scratch`.

Torch's CPU allocator tells what a forward and a backward pass hold, the table what their tensors do. Must not judge.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.memory_oracle import allocator_changes, peak
from trainerd.memory import kernels
from trainerd.memory.tape import Tape


@dataclass(frozen=True)
class Shape:
    """A convolution: samples, channels in and out, the side of a picture, and of the kernel; stride, dilation, dimensions."""

    samples: int
    channels: int
    made: int
    side: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    dims: int = 2


SHAPES = (
    Shape(8, 3, 16, 32, 3),
    Shape(8, 16, 16, 32, 3),
    Shape(8, 64, 64, 16, 3),
    Shape(8, 64, 128, 16, 3, stride=2),
    Shape(8, 64, 64, 16, 3, dilation=2),
    Shape(8, 20, 24, 16, 3),
    Shape(8, 1, 32, 28, 3),
    Shape(8, 8, 32, 28, 5),
    Shape(8, 64, 64, 16, 1),
    Shape(1, 256, 256, 8, 3),
    Shape(4, 16, 16, 16, 3, dims=3),
    Shape(2, 3, 16, 16, 3, stride=2, dims=3),
    Shape(1, 16, 16, 16, 3),
    Shape(1, 16, 16, 16, 3, dims=3),
    Shape(1, 16, 16, 16, 5),
)


def _tensors(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape.samples, shape.channels, *(shape.side,) * shape.dims)
    weight = torch.randn(shape.made, shape.channels, *(shape.kernel,) * shape.dims, requires_grad=True)
    return x.requires_grad_(), weight, torch.randn(shape.made, requires_grad=True)


def held(shape: Shape, precision: str) -> int:
    """By torch's allocator, of a forward and a backward pass."""
    x, weight, bias = _tensors(shape)
    compute: Any = functional.conv2d if shape.dims == 2 else functional.conv3d
    padding = shape.dilation * (shape.kernel // 2)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            made = compute(x, weight, bias, padding=padding, stride=shape.stride, dilation=shape.dilation)
        made.backward(torch.ones_like(made))
        x.grad = weight.grad = bias.grad = None

    run()
    return peak(allocator_changes(run))


def foretold(shape: Shape, precision: str) -> tuple[int, int]:
    """Of its tensors by the table, and what the rule adds."""
    tape = Tape("cpu", None if precision == "fp32" else precision)
    x, weight, bias = (tape.parameter(*t.shape) for t in _tensors(shape))
    before = tape.peak = tape.live
    with tape.autocast():
        made = kernels.convolution(x, weight, bias, tuple(-(-n // shape.stride) for n in x.shape[2:]))
    assert made.node is not None
    with tape.no_grad():
        tape.run([(made.node, made.output, tape.new(made.shape, made.dtype))])
    return tape.peak - before, tape.scratch


def main() -> None:
    """A line for each convolution and precision."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory.scratch", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    warnings.simplefilter("ignore")
    for precision in ("fp32", "bf16"):
        for shape in SHAPES:
            real, (tensors, rule) = held(shape, precision), foretold(shape, precision)
            share = f"{real / tensors:.2f} of {tensors:,} of tensors"
            print(f"{precision} {shape}: held {share}; beyond them {(real - tensors) / rule:.2f} of the rule")


if __name__ == "__main__":
    main()
