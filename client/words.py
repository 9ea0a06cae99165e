"""Numbers as a person reads them: sizes, times, shares, bars. Must not know what they measure. Unknown is "n/a", never 0."""

from __future__ import annotations

import math
import time
from typing import Any

from trainerd.contract.sizes import compared

NOT_KNOWN = "n/a"
_REASONABLE = 1e18


def known(value: Any) -> bool:
    """Whether this is a number one can show: a damaged file may hold anything."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < _REASONABLE


def clean(text: Any, limit: int = 500) -> str:
    """Text from a file without what would move the cursor or colour the screen."""
    shown = str(text)[:limit]
    return "".join(c if c.isprintable() else " " for c in shown)


def size(value: Any) -> str:
    """Bytes in decimal units, as in the configuration."""
    if not known(value):
        return NOT_KNOWN
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(amount) < 999.5 or unit == "TB":
            return f"{amount:.0f} {unit}" if unit in ("B", "kB") or abs(amount) >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return NOT_KNOWN


def sizes(*values: float) -> list[str]:
    """Sizes that are set against the last of them: finer where one that is not it would read alike."""
    return compared(*values, shown=size)


def count(value: Any) -> str:
    """A whole number with thousands set apart."""
    return f"{value:,.0f}" if known(value) else NOT_KNOWN


def number(value: Any) -> str:
    """A measured value with about four digits."""
    if not known(value):
        return NOT_KNOWN
    amount = float(value)
    if amount != 0 and not 1e-4 <= abs(amount) < 1e6:
        return f"{amount:.2e}"
    digits = 3 - math.floor(math.log10(abs(amount))) if amount else 3
    return f"{amount:.{min(max(digits, 0), 5)}f}"


def percent(value: Any) -> str:
    """A share from 0 to 1."""
    return f"{value * 100:.1f} %" if known(value) else NOT_KNOWN


def duration(value: Any) -> str:
    """A time span: "45 s", "3 min 12 s", "2 h 05 min", "3 d 4 h"."""
    if not known(value):
        return NOT_KNOWN
    seconds = max(0, round(value))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
    return f"{count(seconds // 86400)} d {seconds % 86400 // 3600} h"


def ago(at: Any, now: float) -> str:
    """How long since `at`, in UTC seconds."""
    return f"{duration(now - at)} ago" if known(at) else NOT_KNOWN


def moment(at: Any, now: float) -> str:
    """A time of day here, with the date when it is another day."""
    try:
        there, here = time.localtime(at), time.localtime(now)
    except (OverflowError, OSError, ValueError, TypeError):
        return NOT_KNOWN
    same_day = there[:3] == here[:3]
    return time.strftime("%H:%M" if same_day else "%d %b %H:%M", there)


def share(part: Any, whole: Any) -> float | None:
    """part / whole within 0 to 1; None when either is unknown."""
    if not known(part) or not known(whole) or whole <= 0:
        return None
    return float(min(max(part / whole, 0.0), 1.0))


def bar(fraction: float | None, width: int, fancy: bool) -> str:
    """A progress bar of `width` characters between brackets."""
    filled = round((fraction or 0.0) * width)
    full, empty = ("█", "░") if fancy else ("#", ".")
    return f"[{full * filled}{empty * (width - filled)}]"
