"""Activation checkpointing of the blocks a task declares: they are computed again on the way back, to the same bits.

full: a block keeps its inputs only. selective: it also keeps what is dear to compute (products, attention, recurrent layers), so
that only what is cheap is made again. Must not choose: the plan does.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from trainerd.contract.errors import ConfigError

NONE, SELECTIVE, FULL = "none", "selective", "full"
_STATISTICS_BYTES = 1 << 20  # larger buffers are tables and masks, which a forward pass does not change
_DEAR = frozenset(
    {
        "mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_convolution", "_cudnn_rnn", "miopen_rnn", "mkldnn_rnn_layer",
        "_scaled_mm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "gemm_4bit", "int8_scaled_mm", "int8_mixed_scaled_mm",
    }
)  # fmt: skip
"""Operations whose results a selective checkpoint keeps, where they are tensors of their own; the last line's are bitsandbytes'."""


def unnamed(mode: str) -> ConfigError:
    """What is said when blocks are to be computed again and the task names none."""
    message = f"train.activation_checkpointing is {mode}, but this task (with these settings) names no blocks to compute again."
    return ConfigError([message], "Leave it at auto, or give the task blocks(model): a list of its layers.")


def wrap(model: nn.Module, blocks: Sequence[nn.Module], mode: str) -> None:
    """Let every block of the model compute its activations again on the way back. Raises ConfigError for what cannot be."""
    if mode == NONE:
        return
    _check(model, blocks, mode)
    for block in blocks:
        block.forward = _Again(block, mode)


@contextmanager
def wrapped(model: nn.Module, blocks: Sequence[nn.Module], mode: str) -> Iterator[None]:
    """The same for a while."""
    before = [vars(block).get("forward") for block in blocks]
    wrap(model, blocks, mode)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def _check(model: nn.Module, blocks: Sequence[nn.Module], mode: str) -> None:
    if not blocks:
        raise unnamed(mode)
    inside = {id(module) for module in model.modules()}
    for number, block in enumerate(blocks):
        if not isinstance(block, nn.Module) or id(block) not in inside:
            raise ConfigError([f"blocks() returned {type(block).__name__} (number {number}), which is no module of the model."])
        nested = {id(module) for module in block.modules()} & {id(other) for other in blocks if other is not block}
        if nested or sum(other is block for other in blocks) > 1:
            message = f"blocks() returned {type(block).__name__} (number {number}) that is there twice, or holds another block."
            raise ConfigError([message], "Name each layer once, none inside another.")


class _Again:
    """A block's forward: while it learns, checkpointed; else as it was."""

    def __init__(self, block: nn.Module, mode: str) -> None:
        self._block = block
        self._forward = block.forward
        self._selective = mode == SELECTIVE

    def __call__(self, *given: Any, **named: Any) -> Any:
        if not (torch.is_grad_enabled() and self._block.training):
            return self._forward(*given, **named)
        forward = functools.partial(self._forward, **named) if named else self._forward
        return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=True, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around the first forward, and around the one on the way back."""
        statistics = _Statistics([b for b in self._block.buffers() if b.numel() * b.element_size() <= _STATISTICS_BYTES])
        if not self._selective:
            return statistics, statistics.as_before()
        kept: _Kept = {}
        return _Together(statistics, _Keeping(kept)), _Together(statistics.as_before(), _Reusing(kept))


class _Together(AbstractContextManager[None]):
    """Several contexts as one, entered in order."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self._contexts = contexts
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for context in self._contexts:
            self._stack.enter_context(context)

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]


class _Statistics(AbstractContextManager[None]):
    """A block's small buffers, around its forward: what it changes of them is computed with again as it was, and not changed twice."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = buffers
        self._before: list[tuple[Tensor, int, Tensor]] = []

    def __enter__(self) -> None:
        self._before = [(buffer, buffer._version, buffer.clone()) for buffer in self._buffers]

    def __exit__(self, *error: object) -> None:
        self._before = [entry for entry in self._before if entry[0]._version != entry[1]]

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Around computing again. Written by way of .data: batch norm has saved the buffer, and looks whether it was changed."""
        now = [(buffer, buffer.clone()) for buffer in self._buffers]
        for buffer, _, before in self._before:
            buffer.data.copy_(before)
        try:
            yield
        finally:
            for buffer, later in now:
                buffer.data.copy_(later)


@dataclass
class _Result:
    """What a dear operation gave; None once it has been overwritten. `versions` tell whether it is later."""

    value: Any
    versions: list[int]


_Kept = dict[str, "deque[_Result]"]


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _versions(value: Any) -> list[int]:
    return [int(tensor._version) for tensor in _tensors(value)]


def _alias(value: Any) -> Any:
    """The same bytes without history, and with the same count of changes (as torch's own selective checkpoint does it)."""
    if not isinstance(value, Tensor):
        return value
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return value.detach()


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the results of dear operations, in order.

    torch's own selective checkpoint believes what a recurrent cell has overwritten: its views (unsafe_chunk) count no changes. So
    operations that write are watched here.
    """

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._of_storage: dict[int, _Result] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _name(func)
        if name in _DEAR and not func._schema.is_mutable:
            alias = tree_map(_alias, result)
            entry = _Result(alias, _versions(alias))
            self._kept.setdefault(name, deque()).append(entry)
            self._of_storage.update((tensor.untyped_storage()._cdata, entry) for tensor in _tensors(alias))
        elif func._schema.is_mutable and self._of_storage:
            for tensor in written(func, args, kwargs or {}):
                entry_there = self._of_storage.pop(tensor.untyped_storage()._cdata, None)
                if entry_there is not None:
                    entry_there.value = None
        return result


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes into."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


class _Reusing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives them back in the same order. One that was overwritten meanwhile is computed again like the rest."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = self._kept.get(_name(func))
        if waiting and not func._schema.is_mutable:
            entry = waiting.popleft()
            if entry.value is not None and _versions(entry.value) == entry.versions:
                return entry.value
        return func(*args, **(kwargs or {}))
