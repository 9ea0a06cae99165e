"""The learning rate as a pure function of the step. Must not hold state: a resumed run asks the same and gets the same."""

from __future__ import annotations

import math
from collections.abc import Callable

_POWER = 2.0
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "polynomial": lambda done: (1.0 - done) ** _POWER,
}


def factor(name: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """What the peak learning rate is multiplied with for step number `step`, the first being 0.

    It rises linearly over the warm-up and reaches 1 with its last step; the shapes reach 0 after the last step, not in it.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return _SHAPES[name](min(1.0, done))
