"""The name a person probably meant. Must not know what is named."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one, or None when none is close."""
    by_lower = {k.lower(): k for k in known}
    begun = [k for k in by_lower if name and k.startswith(name.lower())]
    if len(begun) == 1:
        return by_lower[begun[0]]
    found = get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None
