"""Makes a line of parts fit a width: whole parts go, the least important first; a word is never cut. Must not know what the parts say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DOT = " · "


@dataclass(frozen=True)
class Part:
    """A piece of a line. Of two, the one with the higher `rank` goes first; `before` parts it from what stands before it."""

    text: str
    rank: int = 0
    before: str = DOT


def joined(parts: Sequence[Part], width: int | None = None) -> str:
    """The parts in one line of at most `width` characters; the most important one stays, however narrow it is. Empty parts are left out."""
    kept = [part for part in parts if part.text]
    while width is not None and len(kept) > 1 and len(_line(kept)) > width:
        least = max(range(len(kept)), key=lambda place: (kept[place].rank, place))
        del kept[least]
    return _line(kept)


def shortened(text: str, width: int, sign: str = "...") -> str:
    """The words of a text that fit, and a sign that there are more; a word longer than the whole width is cut after all."""
    if len(text) <= width:
        return text
    room = max(width - len(sign), 0)
    head = text[: room + 1].rpartition(" ")[0]
    if len(head.rstrip()) * 2 < room:  # one long word, a path: its beginning says more than nothing
        head = text[:room]
    return (head.rstrip() + sign)[:width]


def beside(texts: Sequence[str], width: int, gap: str = "     ") -> str:
    """Texts beside each other where they fit, else below each other: what is to be typed is not broken."""
    line = gap.join(texts)
    return line if len(line) <= width else "\n".join(texts)


def _line(parts: Sequence[Part]) -> str:
    return "".join(part.text if place == 0 else part.before + part.text for place, part in enumerate(parts))
