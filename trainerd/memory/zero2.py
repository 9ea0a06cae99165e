"""What DeepSpeed's ZeRO-2 holds while its optimizer is on the CPU (trainerd/engine/zero2.py): on the device and in RAM. Must not import it.

Its weights lie in one line for each group; on the device are beside them a place for the largest gradient, and on the way back one or
two buckets, through which gradients leave. In RAM are masters, a buffer that weights go back through, gradients, the optimizer's
states, and where a step has several micro-batches the sums of the gradients. Held to counts of version 0.19.8.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainerd.memory.optimizers import Optimizer, state_of
from trainerd.memory.tape import BYTES, GRADIENTS, OPTIMIZER, STAGING, Tape, Tensor

NAME = "zero2"
_WEIGHT_BYTES = BYTES["fp32"]
_IN_LINE = 3  # in RAM, of all weights of a group: masters, the buffer they go back through, gradients
_MULTIPLE = 2  # numbers: what a group is filled up to


@dataclass(frozen=True)
class Buckets:
    """What of DeepSpeed's own configuration memory depends on (config/deepspeed.py)."""

    numbers: int = 5_000_000
    """Of each bucket, which is allocated whole."""
    copies: int = 1
    """Two where communication overlaps with computing."""
    pins: bool = True
    """Whether a GPU copies from and to the RAM by itself; torch rounds every piece of such memory up to a power of two."""


class Partitions(Optimizer):
    """As Optimizer, in DeepSpeed's hands."""

    def __init__(self, tape: Tape, name: str, buckets: Buckets, *, accumulates: bool) -> None:
        super().__init__(tape, name, on_host=True)
        self._buckets, self._accumulates = buckets, accumulates
        self._there: list[Tensor] = []
        """On the device: the buckets of this way back."""
        self._alone: Tensor | None = None
        """A gradient that is larger than a bucket."""
        self._waiting: list[int] = []
        tape.leaving = self._take

    def allocate(self) -> None:
        """Weights are copied into their line, group by group, and the masters from there; then all that rests."""
        tape, groups = self.tape, self._groups()
        with tape.counting_as(STAGING):
            for numbers in groups:
                line = tape.new((numbers,), "fp32")
                del line
        largest = max((p.numel for p in self.trainable), default=0)
        sums = [p.numel for p in self.trainable] if self._accumulates else []
        in_ram = [*(numbers for numbers in groups for _ in range(_IN_LINE)), largest, *sums]
        with tape.counting_as(OPTIMIZER):
            self._states.append(tape.new((largest,), "fp32"))
            for numbers in groups:
                for count, dtype in state_of(self.name, (numbers,)):
                    self._hold(count, dtype)
            self.moving_bytes = sum(self._taken(numbers * _WEIGHT_BYTES) for numbers in in_ram)
            if not self._elsewhere:
                self._states.append(tape.new((self.moving_bytes,), "uint8"))
        if self._elsewhere:
            self.host_bytes += self.moving_bytes
            self.pinned_bytes = self.moving_bytes if self._buckets.pins else 0

    def after_backward(self) -> None:
        """What still waits leaves, and the buckets are given back."""
        self._reduce()
        self._there.clear()

    def _groups(self) -> list[int]:
        """Numbers of those that decay and of those that do not (trainerd/engine/optimizers.py)."""
        found = [sum(p.numel for p in self.trainable if (len(p.shape) >= 2) is decays) for decays in (True, False)]
        return [-(-numbers // _MULTIPLE) * _MULTIPLE for numbers in found if numbers]

    def _taken(self, size_bytes: int) -> int:
        pins = self._buckets.pins and self._elsewhere
        return 1 << (size_bytes - 1).bit_length() if pins and size_bytes else size_bytes

    def _take(self, gradient: Tensor) -> bool:
        """One that is complete: copied into the bucket, or where it is too large for that, beside it."""
        tape, numbers = self.tape, gradient.numel
        with tape.counting_as(GRADIENTS):
            if not self._there:
                self._there = [tape.new((self._buckets.numbers,), "fp32") for _ in range(self._buckets.copies)]
            if sum(self._waiting) + numbers > self._buckets.numbers:
                self._reduce()
            if numbers > self._buckets.numbers:
                self._alone = tape.new((numbers,), "fp32")
        self._waiting.append(numbers)
        return True

    def _reduce(self) -> None:
        """Each leaves; the norm of each is computed in double precision."""
        for numbers in self._waiting:
            double = self.tape.new((numbers,), "fp64")
            del double
        self._waiting.clear()
        self._alone = None
