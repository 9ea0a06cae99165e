"""Dropout keyed by sample: the mask is a pure function of (seed, epoch, sample, module, position, unit).

So it is the same whatever the padding, the micro-batch and the order of samples. Must not draw from any random state.
Costs less than nn.Dropout on a CPU: a few integer operations per unit in place of a random number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainerd.engine.task import TaskContext

_MASK31 = (1 << 31) - 1
_A, _B, _C = -7046029254386353131, -4658895280553007687, -7723592293110705685  # splitmix64's odd constants, as signed
_D, _E = -1640531527, 739041389  # odd 32-bit constants: 2^32/phi, and one with well spread bits


class SampleDropout(nn.Module):
    """In place of nn.Dropout. `x` is (samples, positions, …, units) or (samples, units); only positions may be padded.

    A model that gathers rows of several samples says whose they are: forward(x, samples, positions) with x (rows, units),
    `samples` the place in the micro-batch and `positions` the place in the sample of each row. A module that is called
    twice for the same sample and position drops the same units; use two modules for two draws.
    Outside a training of the engine it behaves like nn.Dropout.
    """

    def __init__(self, p: float = 0.5, units: int | None = None) -> None:
        """`units`: how many there are in a row, where that is known; then nothing is left to be kept in the midst of a first step."""
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"dropout p must be at least 0 and below 1, not {p}")
        self.p, self.units = p, units
        self._ctx: TaskContext | None = None
        self._place = 0
        self._units: Tensor | None = None

    def forward(self, x: Tensor, samples: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self._ctx is None:
            return nn.functional.dropout(x, self.p, True)
        rows = self._rows(x, samples, positions)
        mixed = rows.unsqueeze(-1) ^ self._unit_keys(x, rows.ndim)
        mixed *= _D
        mixed ^= mixed >> 15
        mixed *= _E
        keep = (mixed >= _threshold(self.p)).to(x.dtype)
        keep *= 1.0 / (1.0 - self.p)
        return x * keep.view_as(x)

    def _rows(self, x: Tensor, samples: Tensor | None, positions: Tensor | None) -> Tensor:
        """One well mixed 32-bit key per (sample, position)."""
        assert self._ctx is not None
        ctx = self._ctx
        ids = torch.tensor(ctx.sample_ids, dtype=torch.int64, device=x.device)
        if samples is None and x.shape[0] != len(ids):
            message = f"SampleDropout got {x.shape[0]} rows for {len(ids)} samples; pass `samples` (and `positions`) for gathered rows."
            raise ValueError(message)
        stream = (ctx.seed * 0x9E3779B1 + ctx.epoch * 0x85EBCA77 + self._place * 0xC2B2AE3D) & _MASK31
        keys = _mix(_mix(ids * _A + stream) + stream)
        if samples is not None:
            keys = keys[samples] if positions is None else _mix(keys[samples] + (positions + 1) * _C)
        elif x.ndim >= 3:
            keys = _mix(keys.unsqueeze(1) + torch.arange(1, x.shape[1] + 1, device=x.device) * _C)
        return keys.to(torch.int32)

    def _unit_keys(self, x: Tensor, dims: int) -> Tensor:
        """One key per unit, the same in every row; kept, because it never changes."""
        num_units = x[(0,) * dims].numel() if x.numel() else 1
        if self._units is None or self._units.numel() != num_units or self._units.device != x.device:
            self._units = _unit_keys(num_units, x.device)
        return self._units

    def extra_repr(self) -> str:
        return f"p={self.p}"


def attach(model: nn.Module, ctx: TaskContext) -> None:
    """Tie every SampleDropout of the model to the context that names the samples. Done by the engine."""
    for place, module in enumerate(m for m in model.modules() if isinstance(m, SampleDropout)):
        module._ctx, module._place = ctx, place + 1


def lay_out(model: nn.Module, device: torch.device) -> None:
    """The keys of units, before the first step: what is made in the midst of one and stays, keeps a GPU's allocator from using the
    rest of its segment as one piece, so that each later step would find other holes than the first."""
    for module in model.modules():
        if isinstance(module, SampleDropout) and module.p and module.units is not None:
            module._units = _unit_keys(module.units, device)


def _unit_keys(number: int, device: torch.device) -> Tensor:
    return _mix(torch.arange(1, number + 1, device=device) * _A).to(torch.int32)


def _mix(value: Tensor) -> Tensor:
    """Spread every bit over the whole word (splitmix64's finaliser, with sign-extending shifts)."""
    value = (value ^ (value >> 30)) * _B
    value = (value ^ (value >> 27)) * _C
    return value ^ (value >> 31)


def _threshold(p: float) -> int:
    """Signed 32-bit numbers are below it with probability p."""
    return round(p * 2**32) - 2**31
