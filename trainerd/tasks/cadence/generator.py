"""The built-in data: queries to a made-up shop, with a long tail and typos, so that a first run needs no download. No torch.

Row n is a pure function of n: the data are the same on every machine and Python, any part can be made alone, and a seed only
decides in which order they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeVar

from trainerd.tasks.cadence.catalogue import SHELVES, Shelf

VERSION = 1
"""Part of the data's fingerprint: raise it when a row changes."""

TOTAL_ROWS = 400_000
DEFAULT_ROWS = 300_000
TYPO_SHARE = 0.04

_SALT = 0x5CADE9CE
_NAMES = list(SHELVES)
_KEYS = "qwertyuiopasdfghjklzxcvbnm"
_T = TypeVar("_T")


def order(count: int, seed: int) -> Iterator[int]:
    """The first `count` row numbers of the seeded shuffle of all rows (a lazy Fisher-Yates: a larger count only goes on)."""
    rng, moved = Random(seed), dict[int, int]()
    for here in range(min(count, TOTAL_ROWS)):
        there = here + int(rng.random() * (TOTAL_ROWS - here))
        yield moved.get(there, there)
        moved[there] = moved.pop(here, here)


def row(number: int) -> tuple[str, str]:
    """Category and text of row `number`. Only random() is drawn: it alone is the same in every version of Python."""
    rng = Random(number * 0x9E3779B1 + _SALT)
    category = _head(rng, _NAMES, 1.3)
    text = _query(rng, SHELVES[category])
    if rng.random() < TYPO_SHARE:
        text = _typo(rng, text)
    return category, " ".join(text.split())


def _query(rng: Random, shelf: Shelf) -> str:
    form = rng.random()
    if form < 0.62:  # a product by name: brand, line, what it is, qualifiers
        brand = _head(rng, list(shelf.brands))
        parts = [brand]
        if rng.random() < 0.78:
            parts.append(_head(rng, shelf.brands[brand]))
        if rng.random() < 0.30:
            parts.append(_head(rng, shelf.kinds))
        return " ".join(parts + _traits(rng, shelf, 2.1))
    if form < 0.86:  # a kind of product
        kind = _head(rng, shelf.kinds)
        traits = _traits(rng, shelf, 1.8)
        split = int(rng.random() * (len(traits) + 1))
        parts = [*traits[:split], kind, *traits[split:]]
        end = rng.random()
        if end < 0.30:
            parts.append("for " + _head(rng, shelf.uses))
        elif end < 0.55:
            parts.append(f"under {_head(rng, shelf.prices, 1.5)}")
        return " ".join(parts)
    if form < 0.95:  # something that goes with a product
        brand = _head(rng, list(shelf.brands))
        parts = [brand, _head(rng, shelf.brands[brand]), _head(rng, shelf.extras)]
        return " ".join(parts + _traits(rng, shelf, 0.6))
    brand = _head(rng, list(shelf.brands))  # the tail: a model number copied from somewhere
    return f"{brand} {_model_number(rng)}" + (f" {_head(rng, shelf.kinds)}" if rng.random() < 0.4 else "")


def _traits(rng: Random, shelf: Shelf, mean: float) -> list[str]:
    """Qualifiers from different groups, on average about `mean`, in the order of the groups more often than not."""
    share = mean / len(shelf.traits)
    taken = [_head(rng, group) for group in shelf.traits if rng.random() < share]
    return taken if rng.random() < 0.7 else taken[::-1]


def _head(rng: Random, things: Sequence[_T], steepness: float = 2.0) -> _T:
    """One of the things, the first far more often than the last."""
    return things[int(len(things) * rng.random() ** steepness)]


def _model_number(rng: Random) -> str:
    letters = "".join(_KEYS[int(rng.random() * 26)] for _ in range(2))
    return f"{letters}{'-' if rng.random() < 0.3 else ''}{int(rng.random() * 9000) + 100}{_KEYS[int(rng.random() * 26)]}"


def _typo(rng: Random, text: str) -> str:
    """The text with one slip of the finger: a letter lost, doubled, swapped with the next, or hit beside."""
    at = int(rng.random() * max(len(text) - 1, 1))
    slip = rng.random()
    if slip < 0.3:
        return text[:at] + text[at + 1 :] or text
    if slip < 0.55:
        return text[:at] + text[at] + text[at:]
    if slip < 0.8:
        return text[:at] + text[at + 1 : at + 2] + text[at] + text[at + 2 :]
    return text[:at] + _KEYS[int(rng.random() * 26)] + text[at + 1 :]
