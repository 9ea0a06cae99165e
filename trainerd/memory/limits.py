"""What a limit means in bytes on this machine. Must not measure anything: the total is given."""

from __future__ import annotations

from trainerd.contract.sizes import parse_bytes

AUTO_SHARE = 0.875
"""14 GB of 16, 3.5 GB of 4: what is left is for the person at the machine."""


def resolve_limit(text: str, total_bytes: int) -> int:
    """Bytes in "auto" (87.5 % of the total), "80%" or "3.5GB"; never more than there is. Raises ValueError."""
    text = text.strip()
    if text == "auto":
        return int(total_bytes * AUTO_SHARE)
    if text.endswith("%"):
        percent = float(text[:-1])
        if not 0 < percent <= 100:
            raise ValueError(f"{text!r} is not between 0 % and 100 %")
        return int(total_bytes * percent / 100)
    return min(parse_bytes(text), total_bytes)
