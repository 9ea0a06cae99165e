"""What an optimizer keeps per weight, and what its step allocates. Must not know which one is chosen, nor why.

`kernel`: "fused" makes nothing, "foreach" makes lists as large as the parameters, "loop" works through one parameter at a time. Fused
is what the engine takes where torch has it: not for complex numbers, and then foreach on a GPU, a loop on a CPU.
Eight-bit states are bitsandbytes' (blocks of 256, tensors below 4,096 numbers stay in fp32); paged ones lie on the host from
100,000 numbers on.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainerd.memory.tape import BYTES, GRADIENTS, OPTIMIZER, Tape, Tensor

_EIGHT_BIT_LEAST, _EIGHT_BIT_BLOCK, _EIGHT_BIT_TABLES = 4096, 256, 2 * 256 * 4
_PAGED_LEAST = 100_000
_MASTERS, _LANDINGS = 2, 2  # an optimizer on the host: its weights and its gradients; and where those of a GPU land
_ALIGNED = 64  # bytes: where each part of it begins (trainerd/engine/lanes.py)
_EIGHT_BIT_COPIES, _SMALL_COPIES = 5, 3  # in fp32, of one parameter, while a CPU computes its step
NAMES = ("adamw", "adam", "sgd", "adafactor", "adamw8bit", "paged_adamw8bit")


class Optimizer:
    """The states of one optimizer on a tape; `host_bytes` is what lies in host memory instead, `pinned_bytes` the part a GPU copies from
    and to by itself, `state_bytes` the states alone, wherever they are.

    `on_host`: the optimizer is on the CPU (trainerd/engine/offload.py). `moving_bytes` are then its own copy of the weights, the
    sums of the gradients, and where they land: pinned memory, when the device is a GPU.
    """

    def __init__(self, tape: Tape, name: str, kernel: str | None = None, *, on_host: bool = False) -> None:
        if name not in NAMES:
            raise ValueError(f"no memory table for the optimizer {name!r}; there is {', '.join(NAMES)}")
        self.tape, self.name, self.on_host = tape, name, on_host
        self.kernel = kernel or _kernel(tape)
        self.host_bytes = self.pinned_bytes = self.moving_bytes = self.state_bytes = 0
        self._elsewhere = on_host and tape.device != "cpu"
        tape.leaving = _gone if on_host else None
        self._states: list[Tensor] = []

    @property
    def trainable(self) -> list[Tensor]:
        return [p for p in self.tape.parameters if p.requires_grad]

    def allocate(self) -> None:
        """All states at once, as the engine does before the first step, and the gradients of zeros that takes."""
        tape, eight_bit = self.tape, "8bit" in self.name
        if not eight_bit:
            self.give_gradients()
        with tape.counting_as(OPTIMIZER):
            self._allocate_masters()
            for p in self.trainable:
                for number, dtype in state_of(self.name, p.shape, p.dtype):
                    self._hold(number, dtype)
            if eight_bit:
                self._hold(_EIGHT_BIT_TABLES, "uint8")
                return
        self.work()
        self.zero_grad()

    def _allocate_masters(self) -> None:
        if not self.on_host:
            return
        sizes = [-(-p.storage.size // _ALIGNED) * _ALIGNED for p in self.trainable]
        self.moving_bytes = _MASTERS * sum(sizes)
        if self._elsewhere:
            self.moving_bytes += _LANDINGS * max(sizes, default=0)
            self.pinned_bytes = self.moving_bytes
            self.host_bytes += self.moving_bytes
        else:
            self._states.append(self.tape.new((self.moving_bytes,), "uint8"))

    def give_gradients(self) -> None:
        """As if a micro-batch had gone before."""
        if self.on_host:
            return
        with self.tape.counting_as(GRADIENTS):
            for p in self.trainable:
                p.grad = self.tape.new(p.shape, p.dtype)

    def _hold(self, number: int, dtype: str) -> None:
        paged = self.name == "paged_adamw8bit" and dtype == "uint8" and number >= _PAGED_LEAST
        self.state_bytes += number * BYTES[dtype]
        if self._elsewhere or paged:
            self.host_bytes += number * BYTES[dtype]
        else:
            self._states.append(self.tape.new((number,), dtype))

    def after_backward(self) -> None:
        """What goes when the way back has been gone."""

    def work(self) -> None:
        """What the step itself allocates and frees."""
        tape, trainable = self.tape, self.trainable
        if self._elsewhere:
            return
        with tape.counting_as(OPTIMIZER):
            if self.name == "adafactor":
                for group in _groups(trainable):
                    _adafactor(tape, group)
            elif "8bit" in self.name:
                _unpacked(tape, trainable)
            elif self.kernel == "fused":
                return
            elif self.kernel == "foreach":
                for group in _groups(trainable):
                    lists = [tape.new(p.shape, p.dtype) for p in group]
                    del lists
            else:
                for group in _groups(trainable):
                    _loop(tape, group, self.name)

    def clip(self) -> None:
        """The norm of each gradient, and of all together."""
        if self._elsewhere:
            return
        norms = [self.tape.new((), "fp32") for _ in self.trainable]
        together = self.tape.new((len(norms),), "fp32")
        del norms, together

    def zero_grad(self) -> None:
        for p in self.trainable:
            p.grad = None


def state_of(name: str, shape: Sequence[int], dtype: str = "fp32") -> list[tuple[int, str]]:
    """(numbers, type) of each state tensor of one parameter: of the parameter's own type, but for the count and for eight bits."""
    numbers = 1
    for n in shape:
        numbers *= n
    if name in ("adamw", "adam"):
        return [(1, "fp32"), (numbers, dtype), (numbers, dtype)]
    if name == "sgd":
        return [(numbers, dtype)]
    if name == "adafactor":
        if len(shape) < 2:
            return [(1, "fp32"), (numbers, dtype)]
        return [(1, "fp32"), (numbers // shape[-1], dtype), (numbers // shape[-2], dtype)]
    if numbers < _EIGHT_BIT_LEAST:
        return [(numbers, "fp32"), (numbers, "fp32")]
    blocks = -(-numbers // _EIGHT_BIT_BLOCK)
    return [(numbers, "uint8"), (numbers, "uint8"), (blocks, "fp32"), (blocks, "fp32")]


def _gone(gradient: Tensor) -> bool:
    """It is on its way to the host, and the device keeps nothing of it."""
    return True


def _kernel(tape: Tape) -> str:
    """What the engine will take (trainerd/engine/optimizers.py)."""
    if not any(p.requires_grad and p.dtype.startswith("complex") for p in tape.parameters):
        return "fused"
    return "loop" if tape.device == "cpu" else "foreach"


def _unpacked(tape: Tape, trainable: Sequence[Tensor]) -> None:
    """A CPU unpacks the states of one parameter after the other; a GPU's kernel works on them as they are."""
    for p in trainable if tape.device == "cpu" else ():
        copies = [tape.new(p.shape, "fp32") for _ in range(_EIGHT_BIT_COPIES if p.numel >= _EIGHT_BIT_LEAST else _SMALL_COPIES)]
        del copies


def _groups(trainable: Sequence[Tensor]) -> list[list[Tensor]]:
    """As the engine makes them: what decays, and what does not. Each is stepped by itself."""
    return [[p for p in trainable if len(p.shape) >= 2], [p for p in trainable if len(p.shape) < 2]]


def _loop(tape: Tape, group: Sequence[Tensor], name: str) -> None:
    """One parameter after the other: what was made for the one before is held until its successor is there."""
    held: Tensor | None = None
    for p in group:
        decayed = tape.new(p.shape, p.dtype) if name in ("adam", "sgd") and len(p.shape) >= 2 else None  # its gradient with an L2 decay
        if name != "sgd":
            root = tape.new(p.shape, p.dtype)
            scaled = tape.new(p.shape, p.dtype)
            del root
            held = scaled
        del decayed
    del held


def _adafactor(tape: Tape, group: Sequence[Tensor]) -> None:
    """torch.optim.Adafactor, one parameter at a time: the update, and that of the parameter before; of a vector its square as well."""
    held: Tensor | None = None
    for p in group:
        squared = tape.new(p.shape, p.dtype) if len(p.shape) < 2 else None
        update = tape.new(p.shape, p.dtype)
        held = update
        del squared, update
    del held
