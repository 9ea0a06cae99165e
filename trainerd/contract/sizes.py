"""Sizes as people write them. Must not know what a size is a limit of."""

from __future__ import annotations

import re

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_LEAST_MEMORY_BYTES = 10**6


def parse_bytes(text: str) -> int:
    """Bytes in "3.5GB" (decimal), "3.5GiB" (binary) or "1024". Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 3.5GB or 800MB")
    unit = match[2].lower().rstrip("b")
    factor: int = 1024 ** ("kmgt".find(unit[0]) + 1) if unit.endswith("i") else _UNITS[unit]
    return int(float(match[1]) * factor)


def parse_memory(text: str) -> int:
    """The same of a memory: nobody means so few bytes as a bare number below a million. Raises ValueError."""
    found = parse_bytes(text)
    if found < _LEAST_MEMORY_BYTES and not text.strip().lower().endswith("b"):
        bare = text.strip()
        raise ValueError(f"{bare!r} is {found:,} bytes; write it with its unit, like 3.5GB or 800MB")
    return found
