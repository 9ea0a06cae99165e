"""The last step of start_training.sh and .bat: the words typed become a client command, in this process.

Must not know what any command does: no words are the menu, a preset's name alone means `start` with it.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
SCRIPT = ROOT / "run_optimized_training.py"
PRESETS = ("quick", "standard", "extended")


def command(words: list[str]) -> list[str]:
    """The client's arguments for what was typed behind start_training."""
    if not words:
        return ["menu"]
    if words[0] in PRESETS:
        return ["start", "--preset", *words]
    return words


def main() -> None:
    sys.argv = [str(SCRIPT), *command(sys.argv[1:])]
    sys.path[0] = str(ROOT)
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except ModuleNotFoundError as error:
        if os.environ.get("TRAINERD_PYTHON"):
            remedy = f"TRAINERD_PYTHON names {sys.executable}: install trainerd's requirements there, or unset TRAINERD_PYTHON."
        else:
            remedy = "Install again: start_training reinstall"
        print(f"trainerd cannot start: {error.name} is not installed. {remedy}", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    main()
