"""Whether a training keeps something from step to step: RAM that grows with the steps, beyond what was foretold. Must not measure or act.

A step comes back to where the one before began; what grows evenly, far beyond every phase of the estimate, is kept by the task: losses
with their graphs, a list that nobody empties.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainerd.contract.sizes import written

_MOST_LOOKS = 64
_FEWEST_LOOKS = 4
_FAR_BEYOND = 2.0
"""Times what was foretold: an estimate may be wrong by much, but hardly by this."""
_GROWN_SHARE = 0.5  # of what was foretold, since the first step
_EVENLY = 0.5
"""The later half grows at least this share as fast as all of it: what settles is no leak."""


@dataclass(frozen=True)
class Leak:
    """How much is kept in each step, what the training held when it began, and what was foretold."""

    step_bytes: float
    own_bytes: int
    first_bytes: int
    foretold_bytes: int

    @property
    def words(self) -> str:
        """For a person."""
        beyond = f"{self.own_bytes / self.foretold_bytes:.1f} times what was foretold"
        return f"its RAM grows by {written(self.step_bytes)} a step, to {written(self.own_bytes)} by now, {beyond}"

    @property
    def needs_bytes(self) -> int:
        """What one that starts anew needs: nothing of what was kept."""
        return min(self.own_bytes, max(self.first_bytes, self.foretold_bytes))


class Growth:
    """Remembers, thinned out, at which step how much was held."""

    def __init__(self) -> None:
        self._looks: list[tuple[int, int]] = []

    def seen(self, step: int, own_bytes: int) -> None:
        """One look, at the first of a step."""
        if self._looks and step <= self._looks[-1][0]:
            return
        self._looks.append((step, own_bytes))
        if len(self._looks) > _MOST_LOOKS:
            del self._looks[2::2]  # the first two stay: where it began

    def leak(self, foretold_bytes: int | None) -> Leak | None:
        """What is kept from step to step, if it is that; None where nothing was foretold, or it may be something else."""
        looks = self._looks[1:]  # the first is from before a step
        if foretold_bytes is None or len(looks) < _FEWEST_LOOKS:
            return None
        (first, began), (half, middle), (last, own) = looks[0], looks[len(looks) // 2], looks[-1]
        if own <= foretold_bytes * _FAR_BEYOND or own - began < foretold_bytes * _GROWN_SHARE:
            return None
        each = (own - began) / (last - first)
        if (own - middle) / (last - half) < each * _EVENLY:
            return None
        return Leak(each, own, began, foretold_bytes)
