"""Where a CPU's kernels give something else than torch's rules for tensors without memory say: other types, and larger storages.

Each was found by holding a trace without memory against a real one, operation by operation (tests/test_memory_fakes.py). Must not
compute: only a recurrent kernel is asked, once for each shape and on zeros, how much it keeps for the way back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_MOST_ASKED_BYTES = 512 << 20


def mended(func: Any, given: tuple[Any, ...], result: Any) -> Any:
    """The result as the kernel would give it."""
    mend = _RULES.get(func)
    return result if mend is None else mend(given, result)


def _statistics(given: Any, result: Any) -> Any:
    """Norms keep mean and spread in the type of their weights, also of a lower input."""
    kept = [part.dtype for part in given[1:] if isinstance(part, Tensor)]
    return (result[0], *(part.to(kept[0]) if kept else part for part in result[1:]))


def _group_norm_backward(given: Any, result: Any) -> Any:
    to_input, *others = result
    return (None if to_input is None else to_input.to(given[1].dtype), *others)


def _summed(given: Any, result: Any) -> Any:
    """A loss of whole tensors is summed up where its terms are, and keeps their storage. Ends with the reduction: 0 for none."""
    reduction = next((part for part in given[2:] if isinstance(part, int)), 1)
    if reduction == 0:
        return result
    terms = math.prod(torch.broadcast_shapes(given[0].shape, given[1].shape))  # type: ignore[no-untyped-call]
    return result.new_empty(max(1, terms)).as_strided((), ())


def _folded(given: Any, result: Any) -> Any:
    """What is folded lies where it was unfolded."""
    return result.new_empty(max(result.numel(), given[0].numel())).as_strided(result.size(), result.stride())


def _recurrent(given: Any, result: Any) -> Any:
    """oneDNN keeps what it needs on the way back in a workspace whose size only it can tell; in an evaluation none."""
    *found, workspace = result
    operands = tuple((tuple(part.shape), part.dtype) for part in given[:7])
    size = _workspace(operands, *(tuple(part) if isinstance(part, list) else part for part in given[7:])) if given[-1] else None
    return (*found, None if size is None else workspace.new_empty(size))


@functools.cache
def _workspace(operands: tuple[tuple[tuple[int, ...], torch.dtype], ...], *others: Any) -> int:
    if sum(math.prod(shape) * dtype.itemsize for shape, dtype in operands) > _MOST_ASKED_BYTES:
        return 0
    tensors = (torch.zeros(shape, dtype=dtype) for shape, dtype in operands)
    given = (list(part) if isinstance(part, tuple) else part for part in others)
    return int(_aten.mkldnn_rnn_layer.default(*tensors, *given)[3].untyped_storage().nbytes())


def _recurrent_backward(given: Any, result: Any) -> Any:
    """The gradients of both biases are the same numbers, and two tensors."""
    return (*result[:4], result[4].new_empty(result[4].shape), *result[5:])


def _ctc_backward(given: Any, result: Any) -> Any:
    """Laid out as what it is the gradient of."""
    return torch.empty_like(given[1])


_RULES: dict[Any, Callable[[Any, Any], Any]] = {
    _aten.native_batch_norm.default: _statistics,
    _aten.native_layer_norm.default: _statistics,
    _aten.native_group_norm.default: _statistics,
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten.mse_loss.default: _summed,
    _aten.smooth_l1_loss.default: _summed,
    _aten.soft_margin_loss.default: _summed,
    _aten.binary_cross_entropy.default: _summed,
    _aten._ctc_loss_backward.default: _ctc_backward,
    _aten._ctc_loss_backward.Tensor: _ctc_backward,
    _aten.col2im.default: _folded,
    _aten.mkldnn_rnn_layer.default: _recurrent,
    _aten.mkldnn_rnn_layer_backward.default: _recurrent_backward,
}
