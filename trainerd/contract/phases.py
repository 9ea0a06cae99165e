"""What a trainer may be in, and how long it may give no sign of life there. Must not know who gives the signs, or how.

A sign comes from the training thread itself: between micro-batches, between batches of an evaluation, with every
ctx.progress() of a prepare(). A limit is learned (five times the slowest gap seen) and never below its floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STARTING, PREPARING, TRAINING, EVALUATING = "starting", "preparing", "training", "evaluating"
CHECKPOINTING, EXPORTING, WAITING = "checkpointing", "exporting", "waiting"


@dataclass(frozen=True)
class Silence:
    """`first_seconds` counts until enough was seen to learn from: first steps compile, cold disks load torch for minutes."""

    floor_seconds: float
    first_seconds: float


SILENCE = {
    STARTING: Silence(600.0, 600.0),
    PREPARING: Silence(1800.0, 1800.0),
    TRAINING: Silence(60.0, 600.0),
    EVALUATING: Silence(120.0, 1800.0),
    CHECKPOINTING: Silence(300.0, 600.0),
    EXPORTING: Silence(300.0, 1800.0),
}
_UNKNOWN = Silence(1800.0, 1800.0)


def silence(phase: str) -> Silence:
    """The limits of a phase by themselves; of one nobody has heard of, long ones."""
    return SILENCE.get(phase, _UNKNOWN)


def chosen_seconds(faults: Mapping[str, Any], phase: str) -> float | None:
    """What the configuration's section `faults` says about a phase: seconds, infinity for off; None: it is to be learned."""
    hang = faults.get("hang", "auto")
    if phase == WAITING or hang == "off":
        return math.inf
    own = (faults.get("hang_limits") or {}).get(phase)
    if isinstance(own, (int, float)):
        return float(own)
    return float(hang) if isinstance(hang, (int, float)) else None
