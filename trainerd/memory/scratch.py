"""What some of a CPU's kernels hold beside their tensors while they compute: convolutions, and a choice by a mask. Must not import torch.

On a processor with AVX512 oneDNN lays input, weights and result out in blocks of 16 channels, computes there, and lays the result back;
so a convolution has all three twice. A single small picture in fp32, and fp64, torch multiplies itself, from a table with a column for
each place. torch's CPU allocator shows it (benchmarks/memory/scratch.py), tensors do not. Processors with
other registers take blocks of 8 channels, which is no more; the rule was measured on one processor, so that it bounds and does not
foretell.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

_BLOCK = 16
_BORDERED = 1.25  # a thread's own picture has a border
_SMALL = 20_480  # numbers, of a single picture (its last dimension not counted where it has three)
_THREADS = 4  # each sums up weights' gradients of its own where there are few weights, in fp32


def of_convolution(x: Sequence[int], weight: Sequence[int], made: Sequence[int], size: int) -> int:
    """The most bytes that one convolution holds so, on either way; x (samples, channels, …), weight (out, in, …), the result as x, and
    the bytes of a number. Sums are in fp32; of low numbers each thread turns the picture it is at once more."""
    pictures = _blocked(x, size) + _blocked(made, size)
    weights = prod(-(-n // _BLOCK) * _BLOCK for n in weight[:2]) * prod(weight[2:]) * size
    if _by_columns(x, weight, size):
        return x[0] * prod(weight[1:]) * prod(made[2:]) * size
    exact = weights * max(1, 4 // size)
    alone = int(_THREADS * _BORDERED * (_blocked((1, *x[1:]), size) + _blocked((1, *made[1:]), size))) if size < 4 else 0
    return pictures + weights + _THREADS * exact + alone


def of_masked_select(numbers: int) -> int:
    """What a choice among so many numbers holds: for each its place in the result, and the mask once more, in 8 bytes (two tables in
    masked_select of torch's TensorAdvancedIndexing.cpp)."""
    return 2 * 8 * numbers


def _by_columns(x: Sequence[int], weight: Sequence[int], size: int) -> bool:
    """Whether torch writes out what each place of the kernel meets, and multiplies that (use_mkldnn of its Convolution.cpp)."""
    small = x[0] == 1 and x[1] == weight[1] and prod(x[:4]) <= _SMALL and not (len(weight) > 3 and min(weight[-2:]) > 3)
    return size > 4 or (size == 4 and small)


def _blocked(shape: Sequence[int], size: int) -> int:
    samples, channels, *places = shape
    return samples * -(-channels // _BLOCK) * _BLOCK * prod(places) * size
