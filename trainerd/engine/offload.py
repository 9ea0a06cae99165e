"""The optimizer on the CPU while the weights are on the device: its own copy of them, its states, and the gradients, added up there.

A gradient leaves the device as soon as it is complete. What clips, scales, counts and steps sees ordinary tensors of a CPU, so
accumulation, clipping and the scaler work as always, and a state has the form it has without. Must not step: the loop does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainerd.engine.lanes import Arena, Lane

_NUM_COPIES = 2  # on the host, of every weight: the optimizer's own, and its gradient's sum


class Offload:
    """For every weight of the device a master on the host, which the optimizer is made of; and what goes between them."""

    def __init__(self, weights: Iterable[nn.Parameter], lane: Lane) -> None:
        self._weights = list(weights)
        self._lane = lane
        self._arena = Arena(_NUM_COPIES * sum(Arena.taken(w) for w in self._weights), lane)
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._versions: dict[nn.Parameter, int] = {}
        for weight in self._weights:
            master = nn.Parameter(self._arena.like(weight))
            master.data.copy_(weight.data)
            self._masters[weight], self._sums[weight] = master, self._arena.like(weight)
            self._versions[weight] = weight._version
        self._hooks = [w.register_post_accumulate_grad_hook(self._take) for w in self._weights]  # type: ignore[no-untyped-call]

    @property
    def is_pinned(self) -> bool:
        """Whether the system let us pin the memory: copies to and from a GPU wait for each other otherwise."""
        return self._arena.is_pinned

    def master(self, weight: nn.Parameter) -> nn.Parameter:
        """What the optimizer has in place of the weight."""
        return self._masters[weight]

    def weight(self, master: nn.Parameter) -> nn.Parameter:
        """The weight that a master stands for."""
        return next(weight for weight, own in self._masters.items() if own is master)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """After each of its steps the weights become what their masters are."""
        optimizer.register_step_post_hook(self._give)

    def arrive(self) -> None:
        """Before anything looks at the gradients: wait for the last of them; and take over weights that somebody else has changed
        (a checkpoint that was put back, a task that clips its weights)."""
        self._lane.wait()
        with torch.no_grad():
            for weight, master in self._masters.items():
                if weight._version != self._versions[weight]:
                    master.copy_(weight)
                    self._versions[weight] = weight._version

    def forget(self) -> None:
        """The step is broken off: what is under way must not be added to the next one's gradients, whose first replaces what is there."""
        self._lane.wait()
        for weight, master in self._masters.items():
            weight.grad = master.grad = None

    def close(self) -> None:
        """Leave the weights to themselves, and let go of pinned memory."""
        self._lane.wait()
        for hook in self._hooks:
            hook.remove()
        self._lane.close()
        self._arena.close()

    def _take(self, weight: Tensor) -> None:
        """A gradient is complete: it is on its way, and the device keeps nothing of it."""
        assert isinstance(weight, nn.Parameter)
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        master, total = self._masters[weight], self._sums[weight]
        if master.grad is None:
            self._lane.put(total, gradient)
            master.grad = total
        else:
            self._lane.add(total, gradient)

    def _give(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for weight, master in self._masters.items():
                if master.grad is not None:
                    self._lane.send(weight, master)
                    self._versions[weight] = weight._version
