"""What a run needs on the disk, and how many checkpoints fit: pure arithmetic. Must not look at any disk.

The rule: room for all checkpoints that are kept, the best one, the one being written, the result, and a line of metrics for each
step to come, plus 5 %. With less, fewer are kept; below two checkpoints (one kept, one being written) and the rest, a run is not begun.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 1.05


@dataclass(frozen=True)
class Room:
    """How many of the newest checkpoints fit, and whether the best one does, too. `missing_bytes`: 0 unless it does not fit at all."""

    keep: int
    keep_best: bool
    missing_bytes: int
    need_bytes: int
    """For everything that was asked for."""


def room(free_bytes: int, checkpoint_bytes: int, result_bytes: int, keep: int, keep_best: bool, *, there: int = 0) -> Room:
    """What fits into `free_bytes`; `there` checkpoints of this run lie on the disk already and will make place for new ones."""
    need = need_bytes(number(keep, keep_best), checkpoint_bytes, result_bytes)
    free = free_bytes + int(there * checkpoint_bytes * MARGIN)
    if free >= need:
        return Room(keep, keep_best, 0, need)
    least = need_bytes(2, checkpoint_bytes, result_bytes)
    if free < least:
        return Room(1, False, least - free, need)
    fit = int((free / MARGIN - result_bytes) // max(1, checkpoint_bytes)) - 1  # besides the one being written
    best = keep_best and fit >= 2
    return Room(max(1, min(keep, fit - best)), best, 0, need)


def number(keep: int, keep_best: bool) -> int:
    """How many checkpoints lie there at once, at most: those that are kept, the best, and the one being written."""
    return keep + keep_best + 1


def need_bytes(checkpoints: int, checkpoint_bytes: int, result_bytes: int) -> int:
    """Room for so many checkpoints and the result, with what lies between."""
    return int((checkpoints * checkpoint_bytes + result_bytes) * MARGIN)


_PER_WEIGHT_BYTES = 4
_PER_STEP_BYTES = 200
# How many numbers each optimizer keeps beside every weight.
_STATE_PER_WEIGHT = {"adamw": 2.0, "adam": 2.0, "sgd": 1.0, "adafactor": 0.0, "adamw8bit": 0.51, "paged_adamw8bit": 0.51}


def weights_bytes(num_parameters: int) -> int:
    """Of the result."""
    return num_parameters * _PER_WEIGHT_BYTES


def metrics_bytes(num_steps: int) -> int:
    """What metrics.jsonl will grow by, at most: each step has its line in it for good."""
    return max(0, num_steps) * _PER_STEP_BYTES


def checkpoint_bytes(num_parameters: int, optimizer: str) -> int:
    """Of one checkpoint: the weights and what the optimizer keeps."""
    return int(weights_bytes(num_parameters) * (1 + _STATE_PER_WEIGHT.get(optimizer, 2.0)))


def too_little(where: str, found: Room, checkpoint_bytes: int, metrics_bytes: int = 0) -> tuple[str, str]:
    """The refusal, and what to do, in words: about the larger of the checkpoints and the metrics."""
    metrics, smaller = "the metrics", "make the model smaller"
    if metrics_bytes > 2 * checkpoint_bytes:
        metrics = f"{metrics_bytes:,} bytes of metrics ({_PER_STEP_BYTES} for each of {metrics_bytes // _PER_STEP_BYTES:,} steps)"
        smaller = "train fewer steps (train.epochs, train.max_steps)"
    least = f"two checkpoints of {checkpoint_bytes:,} bytes, the result and {metrics}"
    missing = f"{found.missing_bytes:,} bytes are missing where {where} is for {least}"
    message = f"The disk is too full to begin: {missing}; for everything that is kept, {found.need_bytes:,} bytes are needed."
    return message, f"Free some space, use another --home, or {smaller}."
