"""Deterministic kernels for the time of a training, and the record of whether the run is still exact. Must not train.

Exact means: bit for bit the run that nothing ever interrupted, with the same plan. It can only be lost, by a named cause.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_INDUCTOR, _INDUCTOR_CONFIG = "TORCHINDUCTOR_DETERMINISTIC", "torch._inductor.config"
# What torch says about an operation without a deterministic kernel, when it only warns.
_MARK = "does not have a deterministic implementation"


class Exactness:
    """now, since_step, because: as the status shows them. `send` tells the supervisor."""

    def __init__(self, send: Callable[..., None]) -> None:
        self._send = send
        self.now: bool = True
        self.since_step: int | None = None
        self.because: str | None = None

    def lost(self, step: int, because: str) -> None:
        """From this step on the last bits may differ. Only the first cause is kept."""
        if self.now:
            self.now, self.since_step, self.because = False, step, because
            self.tell()

    def tell(self) -> None:
        self._send("exact", **self.document())

    def document(self) -> dict[str, Any]:
        return {"now": self.now, "since_step": self.since_step, "because": self.because}

    def restore(self, document: dict[str, Any]) -> None:
        self.now, self.since_step, self.because = document["now"], document["since_step"], document["because"]


def arrange_cublas(mode: bool | str) -> None:
    """cuBLAS reads this when its first handle is made; the supervisor sets it, a library user's process may not have."""
    if mode is not False and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        os.environ.setdefault(_CUBLAS, ":4096:8")


@contextmanager
def deterministic(mode: bool | str, on_operation: Callable[[str], None]) -> Iterator[None]:
    """`True`: an operation without a deterministic kernel is an error. "auto": it is named to `on_operation`, once each.
    `False`: nothing changes. What was set before is set again afterwards.
    """
    if mode is False:
        yield
        return
    before = (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.set_deterministic_debug_mode("error" if mode is True else "warn")
    # Filling every new tensor with NaN finds programs that read uninitialised memory; it costs every step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with _deterministic_compiler(), _named_operations(on_operation):
            yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[2], before[3]


@contextmanager
def _deterministic_compiler() -> Iterator[None]:
    """torch.compile, too: by its setting where it is loaded, else by the variable it reads when it is.

    torch.use_deterministic_algorithms() would load it for that: a second of every restart, and most trainings compile nothing.
    """
    given = os.environ.get(_INDUCTOR)
    before = getattr(sys.modules.get(_INDUCTOR_CONFIG), "deterministic", given == "1")
    os.environ[_INDUCTOR] = "1"
    _tell_inductor(True)
    try:
        yield
    finally:
        _tell_inductor(before)
        os.environ.pop(_INDUCTOR)
        if given is not None:
            os.environ[_INDUCTOR] = given


def _tell_inductor(deterministic: bool) -> None:
    loaded = sys.modules.get(_INDUCTOR_CONFIG)
    if loaded is not None:
        loaded.deterministic = deterministic  # type: ignore[attr-defined]


@contextmanager
def _named_operations(on_operation: Callable[[str], None]) -> Iterator[None]:
    """torch tells through Python's warnings; every other warning passes as it would have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{_MARK}")
        pass_on = warnings.showwarning
        named: set[str] = set()

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            text = str(message)
            if _MARK not in text:
                pass_on(message, *rest, **more)
                return
            operation = text.split(_MARK)[0].strip()
            if operation not in named:
                named.add(operation)
                on_operation(operation)

        warnings.showwarning = show
        yield
