"""Errors a person meets say what to do: where they are raised, and for what the system refuses. Must not need a trainer."""

from __future__ import annotations

import ast
import errno
from pathlib import Path

import pytest

from trainerd.contract import errors
from trainerd.contract.errors import remedy

ROOT = Path(__file__).resolve().parents[1]
# Each problem of a configuration carries its own remedy.
KINDS = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.TrainerdError)}
KINDS -= {"ConfigError"}
# Read by programs only: what is wrong with a request file, and what a supervisor tells a trainer on the way up.
NOT_FOR_PERSONS = {"trainerd/contract/requests.py", "trainerd/supervisor/opening.py", "trainerd/supervisor/stopping.py"}
NOT_FOR_PERSONS |= {"trainerd/engine/entry.py"}
# What another process said goes on as it is: it ends with its own remedy.
PASSED_ON = {"client/follow.py", "trainerd/engine/selftest/trial.py"}


def made(path: Path) -> list[ast.Call]:
    """Every error of ours that a file makes."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in KINDS]


@pytest.mark.parametrize("top", ["trainerd", "client", "launcher"])
def test_every_error_says_what_to_do(top: str) -> None:
    """No error that a person can meet is made without its second sentence: what to do."""
    silent = [
        f"{name}:{call.lineno}: {ast.unparse(call)[:90]}"
        for path in sorted((ROOT / top).rglob("*.py"))
        for name in [path.relative_to(ROOT).as_posix()]
        if name not in NOT_FOR_PERSONS
        for call in made(path)
        if len(call.args) < 2 and not any(word.arg in ("hint", None) for word in call.keywords)
        if not (name in PASSED_ON and isinstance(call.args[0], ast.Call | ast.Name | ast.Attribute))
    ]
    assert not silent, "\n".join(silent)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EMFILE, errno.ENOMEM, errno.ENOENT, errno.EIO])
def test_what_the_system_refuses_has_a_remedy(code: int) -> None:
    """Whatever the system refuses, there is a sentence for the person; a full disk and a missing right get their own."""
    words = remedy(OSError(code, "refused"))
    assert words.endswith(".")
    assert ("Free some space" in words) == (code == errno.ENOSPC)
    assert ("permissions" in words) == (code in (errno.EACCES, errno.EROFS))
