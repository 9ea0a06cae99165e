"""The truth that the memory estimate is held against, counted on CPU tensors, in bytes. No tests here.

Two counts of the same step: of tensors (a dispatch mode sees every result of every operation and when its storage dies), and
of torch's CPU allocator (its profiler, kernels' scratch included). While a dispatch mode is active torch adds no gradient in
place, so the first count belongs to a Tape with `adds_in_place = False`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorCount(TorchDispatchMode):
    """Counts storages from their first sight to their end. `log` holds (operation, change, live)."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.log: list[tuple[str, int, int]] = []
        self._operation = "before"
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._meet(tensor)
        self.known = self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operation = func.__name__
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._meet(leaf)
        return result

    def _meet(self, tensor: torch.Tensor) -> None:
        if tensor.is_meta:
            return  # a size without bytes
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self._change(-size)

        self._seen[key] = weakref.ref(storage, gone)
        self._change(size)

    def _change(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.log.append((self._operation, size, self.live))


class InsideCount(TensorCount):
    """The same, and what the operations of bitsandbytes make inside: those are Python, and torch shows their results alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "bitsandbytes":
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))


def allocator_changes(run: Callable[[], Any]) -> list[int]:
    """The bytes of every allocation (positive) and release (negative) of torch's CPU allocator, in order, while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def peak(changes: list[int]) -> int:
    """The most that was held at once, beyond what was there before."""
    live = highest = 0
    for change in changes:
        live += change
        highest = max(highest, live)
    return highest


class Budget(TensorCount):
    """A device with so many bytes: what passes them is an out-of-memory, as torch's allocators raise it, and what it was for dies."""

    def __init__(self, budget_bytes: int, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(known)
        self.budget_bytes = budget_bytes
        self.refused = 0

    def _change(self, size: int) -> None:
        super()._change(size)
        if size > 0 and self.live > self.budget_bytes:
            self.refused += 1
            raise torch.OutOfMemoryError(f"Out of memory: {size} bytes more are {self.live} of {self.budget_bytes} (counted).")


class FailsAt(TensorCount):
    """Every allocation is counted, and the one with this number is an out-of-memory, once. `operation` is what it was for."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.allocations, self.operation = number, 0, ""

    def _change(self, size: int) -> None:
        super()._change(size)
        if size <= 0:
            return
        self.allocations += 1
        if self.allocations == self.number:
            self.operation = self._operation
            raise torch.OutOfMemoryError(f"Out of memory at allocation {self.number}, {self._operation}.")
