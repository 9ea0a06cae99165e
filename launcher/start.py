"""The last step of start_training.sh and .bat: the words typed become a client command, in this process.

Must not know what any command does: no words are the menu, a preset's name alone means `start` with it.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
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


def main() -> int:
    missing = lacking()
    if missing:
        print(f"TRAINERD_PYTHON names {sys.executable}, which has no {', '.join(missing)}.", file=sys.stderr)
        print(f"What to do: install them there ({ROOT / 'pyproject.toml'} lists all), or unset TRAINERD_PYTHON.", file=sys.stderr)
        return _EXIT_USAGE
    sys.path[0] = str(ROOT)
    sys.argv[0] = str(ROOT / ("start_training.bat" if sys.platform == "win32" else "start_training.sh"))  # hints name it
    from client.main import main as client

    return client(command(sys.argv[1:]), checkout=ROOT)


if __name__ == "__main__":
    sys.exit(main())
