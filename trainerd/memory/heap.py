"""How a trainer's C library holds large blocks on a CPU, and what holes come of it. Must not set anything: engine/arenas.py does.

Kept in the heap, a step's tensors are used again by the next step and cost no page faults; but blocks of many sizes leave holes
between them. Given back, each is mapped anew, and no more is held than lives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

KEPT, GIVEN_BACK, UNKNOWN = "kept", "given back", ""
"""UNKNOWN: as the C library comes, or one that is not glibc's."""


@dataclass(frozen=True)
class Holes:
    """What the process holds beyond what lives: a share of what comes and goes, and so many bytes, of which a small training has less."""

    share: float = 0.0
    fixed_bytes: int = 0
    again: float | None = None
    """The share where blocks are computed again: the same little is taken and freed many times, in other sizes each time."""
    largest: int = 0
    """How many more of the largest block: where a few large ones of many sizes come and go, a step was seen to hold three more than live,
    in one run and not in the next."""

    def of(self, coming: float, checkpointing: str = "none", largest_bytes: float = 0) -> float:
        share = self.share if checkpointing == "none" or self.again is None else self.again
        return share * coming + min(self.fixed_bytes, _SMALL * coming) + min(self.largest * largest_bytes, coming)


_MIB = 1 << 20
_SMALL = 1.5
# By real trainings (docs/log.md: python -m benchmarks.memory.ram), kernels' scratch included.
LIKELY = {KEPT: Holes(0.1, again=0.6), GIVEN_BACK: Holes(), UNKNOWN: Holes(0.1, 32 * _MIB)}
MOST = {KEPT: Holes(0.6, 192 * _MIB, again=1.2, largest=3), GIVEN_BACK: Holes(0.08), UNKNOWN: Holes(0.4, 128 * _MIB, again=1.0)}


# torch asks for aligned blocks, and glibc cuts a few bytes off before and behind each. In its cache of small blocks they never grow
# together with the hole that the block leaves, which is too small for the next of its size then: a heap grew to three times what lived.
TUNABLES, _CACHED = "GLIBC_TUNABLES", "glibc.malloc.tcache_count"


def tunables(given: str | None) -> str:
    """The variable for a process that may keep its blocks; it is read once, when a process begins. What a person has set stays."""
    given = given or ""
    return given if _CACHED in given else ":".join(part for part in (given, f"{_CACHED}=0") if part)


def beginning(environment: Mapping[str, str], *, on_cpu: bool) -> dict[str, str]:
    """What a trainer begins with of this, for the supervisor that starts it and for whoever foretells it. `on_cpu`: it is known to train
    there; on a GPU it is not worth the cache."""
    return {**environment, TUNABLES: tunables(environment.get(TUNABLES))} if on_cpu and can_be_chosen() else dict(environment)


def can_keep(environment: Mapping[str, str]) -> bool:
    """Whether a process that began with this environment has no such cache; with one, what is kept has no bound that was measured."""
    return f"{_CACHED}=0" in environment.get(TUNABLES, "").split(":")


def can_be_chosen() -> bool:
    """Whether the C library of this machine is one that can be told (mallopt of glibc)."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return False
