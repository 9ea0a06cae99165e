"""Tensors without memory: a model and its batches with shapes, types and storages as they would be, and next to nothing computed.

torch's FakeTensorMode tells the shape of every result. It cannot tell what depends on values: which rows a mask takes, a number the
code asks for. So the values of small tensors are kept beside them as long as all they come from is known: the batch, places, masks,
what the samples' numbers decide. What comes of a weight is unknown. Must not know what it is used for.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from trainerd.engine import checkpointing, unlike

_KNOWN_BYTES = 4 << 20  # of one tensor: larger ones are activations, and masks of their size
_ALL_KNOWN_BYTES = 256 << 20
_DEVICE = torch.ops.prim.device.default
_MASKS = (torch.bool, torch.uint8)


class Undecided(RuntimeError):
    """The code goes on by a value that only computing would tell."""


class Fakes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it every operation works on tensors without memory; real ones it meets are taken for their shapes, and stay as they are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = _fake_mode()
        self._kept: dict[int, tuple[Any, torch.UntypedStorage]] = {}
        self._known_bytes = 0
        self._met: dict[int, Tensor] = {}
        self.guessed = 0
        """How often a number was asked for that is not known, and NaN was the answer."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in trace.py

    def copied(self, model: nn.Module) -> nn.Module:
        """The model without its memory: tied weights stay tied, what shares a storage shares one. Raises what deepcopy raises."""
        copies: dict[int, Any] = {}
        with _copying(self):
            for weight in model.parameters():
                if type(weight) is not nn.Parameter:
                    self._copy_packed(weight, copies)
            copied = copy.deepcopy(model, copies)
        away = any(tensor.device.type != "cpu" for tensor in (*copied.parameters(), *copied.buffers()))
        return copied.to("cpu") if away else copied

    def _copy_packed(self, weight: nn.Parameter, copies: dict[int, Any]) -> None:
        """A weight of a kind of its own, as bitsandbytes packs them: a plain one with what is noted on it."""
        bare = weight.detach().as_subclass(Tensor)
        copied = copies[id(weight)] = nn.Parameter(self._mode.from_tensor(bare), requires_grad=weight.requires_grad)
        for name, value in vars(weight).items():
            setattr(copied, name, copy.deepcopy(value, copies))
        copied.kind = type(weight)  # type: ignore[attr-defined]

    def forget(self) -> None:
        """Let go of what was kept for real tensors that it has met."""
        self._met.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is torch.ops.aten.lift_fresh.default and not isinstance(args[0], FakeTensor):
            return self._faked(args[0])
        if not all(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            args, kwargs = tree_map_only(Tensor, self._adopted, (args, kwargs))
        given = self._without_masks(func, args)
        try:
            with self._mode:
                result = func(*given, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            values = self._values_of(args, kwargs)
            if values is None:
                return self._guessed(func, args, error)
            return tree_map_only(Tensor, self._faked, func(*values[0], **values[1]))
        result = unlike.mended(func, given, result)
        self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keep the values of small results whose operands are known; what is written with unknown ones is unknown from then on."""
        writes = func._schema.is_mutable
        fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _key(leaf) not in self._kept]
        small = sum(leaf.untyped_storage().nbytes() for leaf in fresh) <= _KNOWN_BYTES
        if not writes and not (fresh and small):
            return
        values = self._values_of(args, kwargs)
        if values is not None:
            computed = func(*values[0], **values[1])
            for leaf, value in zip(tree_leaves(result), tree_leaves(computed), strict=True):
                if isinstance(leaf, Tensor):
                    self._keep(leaf, value)
        elif writes:
            for tensor in checkpointing.written(func, args, kwargs):
                self._drop(_key(tensor))

    def _values_of(self, args: Any, kwargs: Any) -> Any:
        """The same operands with their values; None when one is not known."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not all(_key(tensor) in self._kept for tensor in tensors):
            return None
        values = [self._value(tensor) for tensor in tensors]
        if any(value is None for value in values):
            return None
        waiting = iter(values)
        return tree_map_only(Tensor, lambda _: next(waiting), (args, kwargs))

    def _guessed(self, func: Any, given: Any, error: Exception) -> Any:
        """A float that is asked for goes into what is shown, as a rule: not a number. Nothing else is guessed."""
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and given[0].is_floating_point():
            self.guessed += 1
            return float("nan")
        if func is aten.masked_select.default and (mask := self._value(given[1])) is not None:
            shape = torch.broadcast_shapes(given[0].shape, mask.shape)  # type: ignore[no-untyped-call]
            return given[0].new_empty(int(mask.expand(shape).count_nonzero()))
        if func is aten._ctc_loss.Tensor and (lengths := self._value(given[3])) is not None:
            places, samples = given[0].shape[:2]
            return given[0].new_empty(samples), given[0].new_empty(samples, places, 2 * int(lengths.max()) + 1)
        raise Undecided(f"what it does depends on numbers that only computing would tell ({func})") from error

    def _without_masks(self, func: Any, given: Any) -> Any:
        """x[mask] takes as many rows as a known mask has: their numbers in its place, as torch itself expands it."""
        if func is not torch.ops.aten.index.Tensor:
            return given
        found: list[Any] = []
        for index in given[1]:
            mask = self._value(index) if index is not None and index.dtype in _MASKS else None
            if mask is None:
                found.append(index)
                continue
            rows = int(mask.count_nonzero())
            with self._mode:
                found += [torch.empty(rows, dtype=torch.int64) for _ in range(mask.ndim)]
        return (given[0], found)

    # Real tensors, and what is known of fake ones

    def _adopted(self, tensor: Tensor) -> Tensor:
        """For a real tensor that the code holds: the same one each time, until forget()."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.requires_grad and tensor.is_leaf:
            raise Undecided("it learns a weight that is not part of the model")
        found: Tensor = self._mode.from_tensor(tensor)
        if _key(found) not in self._met:  # only at first: what was written since lies in the one without memory
            self._met[_key(found)] = found
            self.learn(found, tensor)
        return found

    def _faked(self, tensor: Tensor) -> Tensor:
        found: Tensor = self._mode.from_tensor(tensor)
        self.learn(found, tensor)
        return found

    def learn(self, tensor: Tensor, original: Tensor) -> None:
        """What a tensor without memory stands for, where it is small."""
        storage = original.untyped_storage()
        if storage.nbytes() <= _KNOWN_BYTES and original.device.type == "cpu" and _key(tensor) not in self._kept:
            self._put(tensor, storage.clone())  # type: ignore[no-untyped-call]

    def _value(self, tensor: Tensor) -> Tensor | None:
        """Its values where they are known, on their own storage: what is written there is known as well."""
        found = self._kept.get(_key(tensor))
        if found is None or tensor.is_conj() or tensor.is_neg() or found[1].nbytes() != tensor.untyped_storage().nbytes():
            return None
        return torch.empty(0, dtype=tensor.dtype).set_(found[1], tensor.storage_offset(), tensor.size(), tensor.stride())

    def _keep(self, tensor: Tensor, value: Tensor) -> None:
        form = (value.dtype, value.size(), value.stride(), value.storage_offset(), value.untyped_storage().nbytes())
        if form != (tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.untyped_storage().nbytes()):
            self._drop(_key(tensor))
        elif _key(tensor) not in self._kept:
            self._put(tensor, value.untyped_storage())

    def _put(self, tensor: Tensor, value: torch.UntypedStorage) -> None:
        if self._known_bytes + value.nbytes() > _ALL_KNOWN_BYTES:
            return
        storage, key = tensor.untyped_storage(), _key(tensor)
        self._kept[key] = (weakref.ref(storage, lambda _: self._drop(key)), value)
        self._known_bytes += value.nbytes()

    def _drop(self, key: int) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self._known_bytes -= found[1].nbytes()


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _fake_mode() -> FakeTensorMode:
    """torch's own. The first one loads torch's compiler: a second, and 75 MB. None of so many new objects is garbage (process.py)."""
    if "torch._dynamo" in sys.modules or not gc.isenabled():
        return FakeTensorMode()
    gc.disable()
    try:
        mode = FakeTensorMode()
        gc.freeze()
        return mode
    finally:
        gc.enable()


def _copying(fakes: Fakes) -> Any:
    """Around a deepcopy: tensors lose their memory."""

    class Copying(FakeCopyMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(func, types, args, kwargs)
            if func is Tensor.__deepcopy__:
                fakes.learn(result, args[0])
            return result

    return Copying(fakes._mode)
