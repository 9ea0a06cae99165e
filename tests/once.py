"""What is dear to make and the same for many tests: made once for all workers of a run, and looked at or copied by each. No tests here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from trainerd.contract.lock import FileLock

_SECONDS = 240


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` makes where it is told; by whoever needs it first, while the other workers wait. Nobody may write in it."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    root.mkdir(exist_ok=True)
    lock = FileLock(root / f"{name}.lock")
    assert lock.acquire(_SECONDS), f"nobody has made {name}"
    try:
        whole = root / f"{name}.whole"
        if not whole.exists():
            shutil.rmtree(root / name, ignore_errors=True)  # what somebody began in vain
            make(root / name)
            whole.touch()
    finally:
        lock.release()
    return root / name
