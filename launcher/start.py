"""The last step of start_training.sh and .bat: the words typed become a client command, in this process.

Must not know what any command does: no words are the menu, a preset's name alone means `start` with it.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = f"{ROOT}/run_optimized_training.py"
PRESETS = ("quick", "standard", "extended")
_NEEDED = ("click", "pydantic", "psutil", "rich", "torch", "tokenizers")
_EXIT_USAGE = 2


def command(words: list[str]) -> list[str]:
    """The client's arguments for what was typed behind start_training."""
    if not words:
        return ["menu"]
    if words[0] in PRESETS:
        return ["start", "--preset", *words]
    return words


def lacking() -> list[str]:
    """What a Python named by TRAINERD_PYTHON lacks; the .venv has its stamp instead."""
    return [name for name in _NEEDED if find_spec(name) is None] if os.environ.get("TRAINERD_PYTHON") else []


def main() -> None:
    missing = lacking()
    if missing:
        print(f"TRAINERD_PYTHON names {sys.executable}, which has no {', '.join(missing)}.", file=sys.stderr)
        print(f"What to do: install them there ({ROOT}/pyproject.toml lists all), or unset TRAINERD_PYTHON.", file=sys.stderr)
        sys.exit(_EXIT_USAGE)
    sys.argv = [SCRIPT, *command(sys.argv[1:])]
    sys.path[0] = ROOT
    runpy.run_path(SCRIPT, run_name="__main__")


if __name__ == "__main__":
    main()
