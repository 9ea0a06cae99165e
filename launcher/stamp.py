"""The stamp of a complete environment: what it was made from. Run as a script: exit 0 when there is nothing to install.

Runs before every command, so it imports next to nothing. Must not change anything but the stamp.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAME = "trainerd-installed.json"
_MADE_FROM = ("pyproject.toml", "launcher/torch_build.py")  # the requirements, and the version of torch
_EXIT_NOT_READY = 1


def wanted(extras: list[str]) -> dict[str, object]:
    """What the stamp of an environment says that is complete for this checkout as it is now, and for this Python."""
    digest = hashlib.sha256()
    for name in _MADE_FROM:
        with open(f"{ROOT}/{name}", "rb") as file:
            digest.update(file.read().replace(b"\r\n", b"\n"))
    return {"python": list(sys.version_info[:2]), "extras": extras, "requirements": digest.hexdigest()}


def ready(venv: str | os.PathLike[str], extras: list[str]) -> bool:
    """Whether the environment is complete."""
    try:
        with open(f"{os.fspath(venv)}/{NAME}", "rb") as file:
            stamp = json.load(file)
        return all(stamp.get(key) == value for key, value in wanted(extras).items())
    except (OSError, ValueError, AttributeError):
        return False


def write(venv: str | os.PathLike[str], extras: list[str], torch: str) -> None:
    """Declare the environment complete; `torch` is what it holds, for people and doctor."""
    with open(f"{os.fspath(venv)}/{NAME}", "w", encoding="utf-8") as file:
        json.dump({**wanted(extras), "torch": torch}, file)


if __name__ == "__main__":
    sys.exit(0 if ready(f"{ROOT}/.venv", []) else _EXIT_NOT_READY)
