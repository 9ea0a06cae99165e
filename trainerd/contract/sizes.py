"""Sizes as people write them. Must not know what a size is a limit of."""

from __future__ import annotations

import re
from collections.abc import Callable

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_LEAST_MEMORY_BYTES = 10**6
_MOST_BYTES = 10**18
_SHOWN_LETTERS = 40
_FINER: tuple[Callable[[float], str], ...] = (
    lambda num_bytes: f"{num_bytes / 1e6:,.0f} MB",
    lambda num_bytes: f"{num_bytes / 1e3:,.0f} kB",
    lambda num_bytes: f"{num_bytes:,.0f} bytes",
)
_SHOWN = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def parse_bytes(text: str) -> int:
    """Bytes in "3.5GB" (decimal), "3.5GiB" (binary) or "1024". Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 3.5GB or 800MB")
    unit = match[2].lower().rstrip("b")
    factor: int = 1024 ** ("kmgt".find(unit[0]) + 1) if unit.endswith("i") else _UNITS[unit]
    if (found := float(match[1]) * factor) > _MOST_BYTES:
        raise ValueError(f"{text[:_SHOWN_LETTERS]!r} is more than any machine has; write it like 3.5GB or 800MB")
    return int(found)


def written(num_bytes: float) -> str:
    """Bytes as a person reads them, in decimal units: "1.2 GB", "400 TB"."""
    for unit, name in _SHOWN:
        if num_bytes >= unit:
            amount = num_bytes / unit
            return f"{amount:,.0f} {name}" if amount >= 99.5 else f"{amount:.1f} {name}"
    return f"{num_bytes:.0f} bytes"


def in_gigabytes(num_bytes: float) -> str:
    """As sentences about a machine's memory have it."""
    return f"{num_bytes / 1e9:.1f} GB"


def compared(*values: float, shown: Callable[[float], str] = in_gigabytes) -> list[str]:
    """Sizes that are set against the last of them: with so many digits that none reads as it which is not it."""
    limit = values[-1]
    tried = [[writing(value) for value in values] for writing in (shown, *_FINER)]
    apart = (found for found in tried if all(one != found[-1] or value == limit for one, value in zip(found, values, strict=True)))
    return next(apart, tried[-1])


def parse_memory(text: str) -> int:
    """The same of a memory: nobody means none, nor so few bytes as a bare number below a million. Raises ValueError."""
    found, bare = parse_bytes(text), text.strip()
    if found == 0:
        raise ValueError(f"{bare!r} is no memory at all; write it like 3.5GB or 800MB")
    if found < _LEAST_MEMORY_BYTES and not bare.lower().endswith("b"):
        said = bare if "." in bare and bare[-1].isdigit() else f"{found:,}"
        raise ValueError(f"{bare!r} is {said} bytes; write it with its unit, like 3.5GB or 800MB")
    return found
