"""A curve drawn with characters: braille dots, or stars where there are none. Must not know what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # rows top to bottom, then left and right


def draw(values: Sequence[float], width: int, height: int, braille: bool) -> list[str]:
    """`height` lines of `width` characters; each column is the mean of the values that fall on it. Blank without values."""
    if width < 1 or height < 1:
        return []
    across, down = (width * 2, height * 4) if braille else (width, height)
    columns = _columns(values, across)
    cells = [[0] * width for _ in range(height)]
    low, high = (min(columns), max(columns)) if columns else (0.0, 0.0)
    spread = (high - low) or 1.0
    for x, value in enumerate(columns):
        y = round((high - value) / spread * (down - 1))
        if braille:
            cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
        else:
            cells[y][x] = 1
    return ["".join(_character(cell, braille) for cell in row) for row in cells]


def _character(cell: int, braille: bool) -> str:
    if not cell:
        return " "
    return chr(0x2800 + cell) if braille else "*"


def _columns(values: Sequence[float], across: int) -> list[float]:
    """`across` values: means over equal stretches where there are more, straight lines between them where there are fewer."""
    total = len(values)
    if total < 2 or across < 2:
        return list(values[:across])
    if total <= across:
        return [_between(values, x * (total - 1) / (across - 1)) for x in range(across)]
    edges = [i * total // across for i in range(across + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _between(values: Sequence[float], position: float) -> float:
    left = min(int(position), len(values) - 2)
    return values[left] + (values[left + 1] - values[left]) * (position - left)
