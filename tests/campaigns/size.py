"""How large a campaign is, and how it tells what it found. No tests here."""

from __future__ import annotations

import os


def of(name: str, whole: int) -> int:
    """TRAINERD_CAMPAIGN_<NAME> in the environment, else the whole campaign."""
    return int(os.environ.get(f"TRAINERD_CAMPAIGN_{name}", whole))


def tell(line: str) -> None:
    """One summary line, also where pytest keeps the output."""
    print(f"\ncampaign: {line}", flush=True)
    path = os.environ.get("TRAINERD_CAMPAIGN_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as log:
            log.write(line + "\n")
