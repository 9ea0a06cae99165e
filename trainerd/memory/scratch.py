"""What a CPU's convolutions hold beside their tensors while they compute: oneDNN's own forms of them. Must not import torch.

On a processor with AVX512 oneDNN lays input, weights and result out in blocks of 16 channels, computes there, and lays the result back;
so a convolution has all three twice. torch's CPU allocator shows it (benchmarks/memory/scratch.py), tensors do not. Processors with
other registers take blocks of 8 channels, which is no more; the rule was measured on one processor, so that it bounds and does not
foretell.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

_BLOCK = 16
_THREADS = 4  # each sums up weights' gradients of its own where there are few weights, in fp32


def of_convolution(x: Sequence[int], weight: Sequence[int], made: Sequence[int], size: int) -> int:
    """The most bytes that one convolution holds so, on either way; x (samples, channels, …), weight (out, in, …), the result as x, and
    the bytes of a number. Of low numbers pictures are turned once more, and all sums are in fp32."""
    pictures = _blocked(x, size) + _blocked(made, size)
    weights = prod(-(-n // _BLOCK) * _BLOCK for n in weight[:2]) * prod(weight[2:]) * size
    exact = weights * max(1, 4 // size)
    return pictures + weights + _THREADS * exact + (pictures if size < 4 else 0)


def _blocked(shape: Sequence[int], size: int) -> int:
    samples, channels, *places = shape
    return samples * -(-channels // _BLOCK) * _BLOCK * prod(places) * size
