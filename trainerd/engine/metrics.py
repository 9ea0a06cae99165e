"""metrics.jsonl: each step once, at full precision; and how fast it goes. Must not decide what is worth logging.

A step's numbers stay on the device until flush(): so a GPU is not waited for in every step. What a crash loses here was
not in a checkpoint either: a resume cuts the file back to the length its checkpoint names, and writes those steps again.
A full disk stops nothing: lines wait in memory until they can be written, and no checkpoint is committed before they are.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainerd.contract import files
from trainerd.engine.reporter import say

Number = float | Tensor
# Of lines that cannot be written, about a third of a million steps; then the oldest go.
_WAITING_BYTES = 64 << 20


@dataclass
class StepRecord:
    """What one step tells. `loss`, `grad_norm` and `metrics` may still be on the device."""

    step: int
    epoch: int
    loss: Number
    lr: float
    grad_norm: Number
    samples: int
    metrics: dict[str, Number] = field(default_factory=dict)
    at: float = 0.0


class MetricsLog:
    """The file. `on_line` sees each resolved line (for TensorBoard)."""

    def __init__(
        self, path: Path, resume_bytes: int, on_line: Callable[[dict[str, Any]], None] | None = None, sha256: str | None = None
    ) -> None:
        """`sha256` is what the first `resume_bytes` had when the checkpoint was written; None: nobody knows. Raises OSError."""
        files.make_folder(path.parent)
        self.path = path
        self._on_line = on_line
        self._pending: list[StepRecord] = []
        self._file = files.Growing(path, resume_bytes)
        self._hash = files.hash_of(path)
        self._waiting: deque[bytes] = deque()
        self.missing_bytes = resume_bytes - self._file.bytes
        self.damaged = sha256 is not None and not self.missing_bytes and self._hash.hexdigest() != sha256
        """Whether what was kept is not what was written: what will be added is hashed together with it as it is."""
        self.last: dict[str, Any] = {}
        self._abandoned = False

    @property
    def bytes(self) -> int:
        """How long the file is, or will be once it can be written again."""
        return self._file.bytes + sum(map(len, self._waiting))

    @property
    def sha256(self) -> str:
        """Of that much of it."""
        whole = self._hash.copy()
        for text in self._waiting:
            whole.update(text)
        return whole.hexdigest()

    @property
    def waits(self) -> bool:
        """Whether there are lines that the disk has not taken."""
        return bool(self._waiting)

    def abandon(self) -> None:
        """The file has become somebody else's: not a line more."""
        self._abandoned = True

    def add(self, record: StepRecord) -> None:
        """Keep a step's numbers; nothing is read from the device or written yet."""
        record.at = time.time()
        self._pending.append(record)

    def add_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self.flush()
        self._write([{"step": step, "eval": {name: _finite(value) for name, value in values.items()}}])

    def flush(self) -> list[dict[str, Any]]:
        """Read the pending numbers from the device, all in one go, and write their lines; returns them."""
        self._catch_up()
        if not self._pending:
            return []
        pending = self._pending
        values = iter(_resolve([n for r in pending for n in (r.loss, r.grad_norm, *r.metrics.values())]))
        self._pending = []  # not before: a device that has no memory for the transfer is asked again
        lines = []
        for record in pending:
            line: dict[str, Any] = {"step": record.step, "epoch": record.epoch, "loss": next(values), "lr": record.lr}
            line |= {"grad_norm": next(values), "samples": record.samples, "t": round(record.at, 3)}
            if record.metrics:
                line["metrics"] = {name: next(values) for name in record.metrics}
            lines.append(line)
        self.last = lines[-1]
        self._write(lines)
        return lines

    def _write(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines).encode("ascii")
        self._waiting.append(text)
        self._catch_up()
        if self._on_line is not None:
            for line in lines:
                self._on_line(line)

    def _catch_up(self) -> None:
        """Write what waits, if the disk takes it. What it is missing is told with the checkpoint that cannot be saved."""
        try:
            while self._waiting and not self._abandoned:
                self._file.append(self._waiting[0])
                self._hash.update(self._waiting.popleft())
        except OSError:
            while sum(map(len, self._waiting)) > _WAITING_BYTES:
                lost = len(self._waiting.popleft())
                say(f"metrics.jsonl: no room on the disk, nor in memory any more; {lost} bytes are lost")

    def close(self) -> None:
        self.flush()
        self._file.close()


def _resolve(numbers: list[Number]) -> list[float | None]:
    """Plain floats, None where not finite; all that is on a GPU costs one transfer together."""
    far = [n.detach().reshape(()).double() for n in numbers if isinstance(n, Tensor) and n.device.type != "cpu"]
    fetched = iter(torch.stack(far).tolist() if far else [])
    return [_finite(next(fetched) if isinstance(n, Tensor) and n.device.type != "cpu" else float(n)) for n in numbers]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Rate:
    """Speed over the last half minute of training; pauses for evaluations and saves do not count."""

    _SECONDS = 30.0

    def __init__(self) -> None:
        self._points: deque[tuple[float, int, int]] = deque()
        self._idle_seconds = 0.0
        self.samples = 0
        self.tokens = 0
        self.mark()

    def mark(self) -> None:
        """Note where we are; call it a few times a second at most."""
        now = time.monotonic() - self._idle_seconds
        self._points.append((now, self.samples, self.tokens))
        while len(self._points) > 2 and now - self._points[1][0] > self._SECONDS:
            self._points.popleft()

    def idle(self, seconds: float) -> None:
        """That long nothing was trained, on purpose."""
        self._idle_seconds += seconds

    def per_second(self) -> tuple[float | None, float | None]:
        """Samples and tokens per second; None while too little is known."""
        (began, samples, tokens), (now, all_samples, all_tokens) = self._points[0], self._points[-1]
        seconds = now - began
        if seconds <= 0 or all_samples == samples:
            return None, None
        return (all_samples - samples) / seconds, ((all_tokens - tokens) / seconds) or None
