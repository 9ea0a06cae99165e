"""A frozen base that does not fit: the weights of its blocks stay in host memory, and each block gets a copy only while it computes.

On the way back a checkpointed block is computed again, and gets its copy again; autograd keeps that until the block's gradients
are made. Between, the weights in the model are those of the host: who uses one outside of its block gets torch's own error about
two devices, never a wrong number. Must not choose what is computed again: checkpointing.py does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from trainerd.engine import packed
from trainerd.engine.lanes import pin, unpin
from trainerd.memory.forecast import nothing_to_stream


@dataclass(frozen=True)
class _Weight:
    """One frozen weight of a block, and every place in it where it is used."""

    home: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]
    is_packed: bool = False
    """Of a layer in 4 or 8 bits, whose scales stay on the device."""


class Copies:
    """Makes copies for the device, at once: the device is the CPU itself."""

    ahead = False
    """Whether the next block's copies are begun while this one computes."""

    def begin(self, homes: Sequence[Tensor]) -> list[Tensor]:
        """The copies, maybe under way."""
        return [home.clone() for home in homes]

    def finish(self, copies: Sequence[Tensor]) -> None:
        """From here on they may be computed with."""


class CudaCopies(Copies):
    """On a stream of their own, beside the one that computes."""

    ahead = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, homes: Sequence[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(self._stream):
            return [home.to(self._device, non_blocking=True) for home in homes]

    def finish(self, copies: Sequence[Tensor]) -> None:
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(computing)


class Stream:
    """The blocks of one model, their frozen weights at home on the host. `close()` makes it an ordinary model again."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, copies: Copies | None = None) -> None:
        """Raises ConfigError when there is nothing to stream. Everything else of the model is moved to the device."""
        self._copies = copies or (CudaCopies(device) if device.type == "cuda" else Copies())
        self._blocks = [_frozen(model, block) for block in blocks]
        if not any(self._blocks):
            raise nothing_to_stream()
        self.bytes = [sum(_size(w.home) for w in weights) for weights in self._blocks]
        """Of each block's frozen weights."""
        self._next: tuple[int, list[Tensor]] | None = None
        self._last, self._direction = 0, 1
        self._pinned: list[Tensor] = []
        self._move_rest(model, device)
        if device.type == "cuda":
            self._pin()
        self._packed = [module for weights in self._blocks for weight in weights if weight.is_packed for module, _ in weight.places]
        for layer in self._packed:
            packed.replace_forward(layer, device)
        self._forwards = [block.forward for block in blocks]
        for number, block in enumerate(blocks):
            block.forward = _Streamed(self, number, block.forward)
        self._modules = list(blocks)

    @property
    def is_pinned(self) -> bool:
        """Whether all of it is in memory that a GPU copies from by itself: what is mapped from a file is not."""
        return len(self._pinned) == sum(map(len, self._blocks))

    def close(self) -> None:
        """The blocks compute with what they hold; pinned memory is let go of."""
        self._next = None
        for block, forward in zip(self._modules, self._forwards, strict=True):
            block.forward = forward
        for layer in self._packed:
            packed.restore_forward(layer)
        for home in self._pinned:
            unpin(home)
        self._pinned.clear()

    @contextmanager
    def there(self, number: int) -> Iterator[None]:
        """While the block computes, its frozen weights are copies on the device."""
        weights = self._blocks[number]
        copies = self._fetched(number)
        for weight, copy in zip(weights, copies, strict=True):
            held = packed.held(copy, weight.home)
            for module, name in weight.places:
                setattr(module, name, held)
        del copies
        try:
            yield
        finally:
            for weight in weights:
                for module, name in weight.places:
                    setattr(module, name, weight.home)

    def _fetched(self, number: int) -> list[Tensor]:
        """This block's copies; those of the block that comes after it are begun."""
        waiting, self._next = self._next, None
        copies = waiting[1] if waiting is not None and waiting[0] == number else self._begin(number)
        del waiting
        self._copies.finish(copies)
        after = self._after(number)
        if self._copies.ahead and after is not None:
            self._next = (after, self._begin(after))
        return copies

    def _begin(self, number: int) -> list[Tensor]:
        return self._copies.begin([packed.plain(weight.home) for weight in self._blocks[number]])

    def _after(self, number: int) -> int | None:
        """Up on the way there, down on the way back, which begins where the way there has ended. An evaluation has none: after it the next
        pass begins with a jump back."""
        back = self._last - number
        if back == 0:
            self._direction = 1 if number == 0 else -1
        elif back < 0:
            self._direction = 1
        elif self._direction == -1 or (back == 1 and len(self._blocks) > 2):
            self._direction = -1
        self._last = number
        after = number + self._direction
        return after if 0 <= after < len(self._blocks) else None

    def _move_rest(self, model: nn.Module, device: torch.device) -> None:
        """What is not streamed goes to the device, each module's own parts one by one: model.to() would take all of it."""
        streamed = {id(weight.home) for weights in self._blocks for weight in weights}
        for module in model.modules():
            own = {name: p for name, p in module._parameters.items() if p is not None and id(p) in streamed}
            for name in own:
                module._parameters[name] = None
            if any(t.device != device for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module._apply(lambda t: t.to(device), recurse=False)  # type: ignore[no-untyped-call]
            for name, p in own.items():
                setattr(module, name, p)  # not past the module: a recurrent one keeps a list of its own
        packed.settle(model, device)

    def _pin(self) -> None:
        for weights in self._blocks:
            for weight in weights:
                numbers = packed.plain(weight.home)
                if not pin(numbers):
                    return
                self._pinned.append(numbers)


def streamable(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """What of the model would stay on the host."""
    return [weight.home for block in blocks for weight in _frozen(model, block)]


@contextmanager
def streamed(model: nn.Module, blocks: Sequence[nn.Module], *, ahead: bool) -> Iterator[None]:
    """A model on the CPU that computes for a while as if its base were streamed, `ahead` as to a GPU: for a trace of what that holds."""
    copies = Copies()
    copies.ahead = ahead
    stream = Stream(model, blocks, torch.device("cpu"), copies)
    try:
        yield
    finally:
        stream.close()


class _Streamed:
    """A block's forward with its weights there."""

    def __init__(self, stream: Stream, number: int, forward: Any) -> None:
        self._stream, self._number, self._forward = stream, number, forward

    def __call__(self, *given: Any, **named: Any) -> Any:
        with self._stream.there(self._number):
            return self._forward(*given, **named)


def _frozen(model: nn.Module, block: nn.Module) -> list[_Weight]:
    """The block's frozen weights that nothing outside of it uses: plain ones, and bitsandbytes' packed ones."""
    everywhere = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    homes: dict[int, nn.Parameter] = {}
    is_packed: dict[int, bool] = {}
    for module in block.modules():
        for name, p in module._parameters.items():
            if p is None or p.requires_grad:
                continue
            of_packed = packed.is_weight(module, name)
            if of_packed or _is_plain(p):
                homes[id(p)], is_packed[id(p)] = p, of_packed
                places.setdefault(id(p), []).append((module, name))
    return [_Weight(home, tuple(places[key]), is_packed[key]) for key, home in homes.items() if len(places[key]) == everywhere[key]]


def _is_plain(weight: nn.Parameter) -> bool:
    """What is of a kind of its own may have parts that would stay behind; of one without memory its copy has told the kind (fakes.py)."""
    kind: type[Tensor] = type(weight)
    if kind is FakeTensor:
        kind = getattr(weight, "kind", nn.Parameter)
    return kind is nn.Parameter and weight.is_floating_point()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
