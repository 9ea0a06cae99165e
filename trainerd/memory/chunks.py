"""How a loss over many words is cut, so that its own tensors stay below a bound. Arithmetic only: must not import torch.

The engine cuts by it (trainerd/engine/chunked.py), and the estimate foretells what that allocates (losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_BYTES = 64 << 20
"""What linear_cross_entropy may hold at once beyond inputs, outputs and gradients."""
_TABLE_BYTES, _LOW_TABLE_BYTES = 50 << 20, 36 << 20  # logits of all words for some tokens
_WEIGHT_BYTES = 12 << 20  # a low copy of the whole weight, and as much again for its part of a gradient
_WORDS_BYTES = 56 << 20
_WORDS = 2048
_STEP = 16
_MOST = {"cpu": 256, "cuda": 8192}  # on a CPU a piece stays in the cache; a GPU wants few large launches
_FEWEST = {"cpu": 48, "cuda": 512}  # with fewer tokens at a time, passing over the weight's gradient costs more than logits made twice


@dataclass(frozen=True)
class Cut:
    """So many tokens at a time; `words` below the vocabulary: also so many words at a time, and logits are made twice."""

    tokens: int
    words: int


def cut(device: str, vocabulary: int, width: int, dtype: str, weight_bytes: int) -> Cut:
    """How to cut a last layer (vocabulary, width) whose products are of `dtype`, and each of whose weights has `weight_bytes`."""
    size = {"fp64": 8, "fp32": 4}.get(dtype, 2)
    most, fewest = (of.get(device, of["cuda"]) for of in (_MOST, _FEWEST))
    lowered = size < weight_bytes
    if size >= 4:
        tokens = _TABLE_BYTES // (vocabulary * size * 2)
    else:
        tokens = _LOW_TABLE_BYTES // (vocabulary * (size + 4))
    fits = vocabulary * width * size <= _WEIGHT_BYTES or not lowered
    tokens = min(most, tokens if tokens < _STEP else tokens // _STEP * _STEP)
    if fits and tokens >= fewest:
        return Cut(tokens, vocabulary)
    blocks = 2 * _WORDS * width * size if lowered else 0
    tokens = (_WORDS_BYTES - blocks) // (_WORDS * (size + 8) + width * (size + 8))
    return Cut(max(_STEP, min(most if device != "cpu" else 4096, tokens // _STEP * _STEP)), _WORDS)
