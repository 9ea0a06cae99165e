"""The file tree of the README, made from the first sentence of every file: `python -m tests.readme_tree` prints it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = ("start_training.sh", "start_training.bat", "run_optimized_training.py", "optimized_train.py", "memory_optimizer.py", "run_tests.py")
FOLDERS = ("launcher", "client", "trainerd")
WIDTH = 132


def first_sentence(path: Path) -> str:
    """What a file says it does, in its first sentence."""
    if path.suffix != ".py":
        return {".sh": "Install on the first start, then the menu or a command (Linux)", ".bat": "The same on Windows"}[path.suffix]
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.][^.])\.(?:\s|$)", text, maxsplit=1)[0].rstrip(".:")
    return sentence


def tree() -> str:
    """The tree's lines: name, then what it is."""
    lines = [_line(name, ROOT / name, 0) for name in TOP]
    for folder in FOLDERS:
        lines += _folder(ROOT / folder, 0)
    return "\n".join(lines)


def _folder(folder: Path, depth: int) -> list[str]:
    files = [p for p in sorted(folder.glob("*.py")) if p.name != "__init__.py"]
    folders = [p for p in sorted(folder.iterdir()) if (p / "__init__.py").exists()]
    lines = [_line(folder.name + "/", folder / "__init__.py", depth)]
    lines += [_line(p.name, p, depth + 1) for p in files]
    for inner in folders:
        lines += _folder(inner, depth + 1)
    return lines


def _line(name: str, path: Path, depth: int) -> str:
    text = f"{'  ' * depth}{name}".ljust(30) + first_sentence(path)
    return text if len(text) <= WIDTH else text[: WIDTH - 1].rsplit(" ", 1)[0].rstrip(",;:") + " …"


if __name__ == "__main__":
    print(tree())
