"""The tables of the memory estimate against torch itself, to the byte: operations, blocks, and whole training steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory.__main__ import counted, estimated
from benchmarks.memory.families import family
from tests.memory_oracle import TensorCount, allocator_changes, peak
from tests.toy import Toy
from trainerd.config.model import TrainConfig
from trainerd.engine import attention, optimizers
from trainerd.memory import kernels, layers, losses, ops
from trainerd.memory.optimizers import Optimizer
from trainerd.memory.recurrent import Gru
from trainerd.memory.tape import Tape
from trainerd.memory.tape import Tensor as Shadow
from trainerd.memory.timeline import Setup, of_model
from trainerd.tasks.cadence import blocks
from trainerd.tasks.cadence.model import MemoryLayer

PRECISIONS = ("fp32", "bf16")


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def real(given: list[Tensor], learned: list[Tensor], run: Callable[..., Tensor], precision: str) -> tuple[int, int]:
    """Peak and end of a forward and backward pass, beyond inputs and weights."""
    with TensorCount([*learned, *given]) as count:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total = run(*given, *learned).sum()
        total.backward()
        del total
    return count.peak - count.known, count.live - count.known


def shadow(given: list[Tensor], learned: list[Tensor], run: Callable[..., Shadow], precision: str) -> tuple[int, int]:
    """The same on tensors without contents."""
    tape = Tape("cpu", None if precision == "fp32" else precision)
    tape.adds_in_place = False
    made = [tape.parameter(*p.shape) for p in learned]
    inputs = [tape.input(*x.shape, dtype="int64" if x.dtype == torch.int64 else "fp32") for x in given]
    before = tape.peak = tape.live
    with tape.autocast():
        total = ops.total(run(*inputs, *made))
    tape.backward(total)
    del total
    return tape.peak - before, tape.live - before


X, INDEX, IMAGE = (5, 7, 32), (5, 7), (2, 3, 8, 8)
MATRIX, BACK = [(64, 32), (64,)], [(32, 64), (32,)]
NORM, CONV = [(32,), (32,)], [(6, 3, 3, 3), (6,), (6,), (6,)]
OPERATIONS: dict[str, tuple[list[tuple[int, ...]], Any, Any]] = {
    "linear, tanh": (MATRIX, lambda x, w, b: torch.tanh(functional.linear(x, w, b)), lambda x, w, b: ops.tanh(kernels.linear(x, w, b))),
    "mlp": (
        MATRIX + BACK,
        lambda x, w, b, v, c: functional.linear(functional.gelu(functional.linear(x, w, b)), v, c),
        lambda x, w, b, v, c: kernels.linear(ops.gelu(kernels.linear(x, w, b)), v, c),
    ),
    "swiglu": (
        [(64, 32), (32, 64)],
        lambda x, w, v: functional.linear(functional.silu(functional.linear(x, w)) * functional.linear(x, w), v),
        lambda x, w, v: kernels.linear(ops.mul(ops.silu(kernels.linear(x, w)), kernels.linear(x, w)), v),
    ),
    "layer norm, residual": (
        [*NORM, (32, 32), (32,)],
        lambda x, g, h, w, b: x + functional.linear(functional.layer_norm(x, (32,), g, h), w, b),
        lambda x, g, h, w, b: ops.add(x, kernels.linear(kernels.layer_norm(x, g, h), w, b)),
    ),
    "softmax": (
        MATRIX,
        lambda x, w, b: torch.softmax(functional.linear(x, w, b), -1),
        lambda x, w, b: ops.softmax(kernels.linear(x, w, b)),
    ),
    "square": (MATRIX, lambda x, w, b: functional.linear(x, w, b).pow(2), lambda x, w, b: kernels.square(kernels.linear(x, w, b))),
    "dropout": (
        MATRIX,
        lambda x, w, b: functional.dropout(functional.linear(x, w, b), 0.5),
        lambda x, w, b: ops.dropout(kernels.linear(x, w, b)),
    ),
}
IMAGES: dict[str, tuple[Any, Any]] = {
    "batch norm, max pool": (
        lambda x, c, d, w, b: functional.max_pool2d(
            functional.relu(functional.batch_norm(functional.conv2d(x, c, d, padding=1), None, None, w, b, True)), 2
        ),
        lambda x, c, d, w, b: kernels.pool(ops.relu(kernels.batch_norm(kernels.convolution(x, c, d, (8, 8)), w, b)), (4, 4), indices=True),
    ),
    "group norm, mean pool": (
        lambda x, c, d, w, b: functional.avg_pool2d(
            functional.relu(functional.group_norm(functional.conv2d(x, c, d, padding=1), 2, w, b)), 2
        ),
        lambda x, c, d, w, b: kernels.pool(
            ops.relu(kernels.group_norm(kernels.convolution(x, c, d, (8, 8)), w, b, 2)), (4, 4), indices=False
        ),
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_allocates_what_its_table_says(name: str, precision: str) -> None:
    """Peak and what is left, forward and backward, in fp32 and under autocast."""
    shapes, run, table = OPERATIONS[name]
    given, learned = [torch.randn(*X)], weights(*shapes)
    assert shadow(given, learned, table, precision) == real(given, learned, run, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", IMAGES)
def test_a_convolution_allocates_what_its_table_says(name: str, precision: str) -> None:
    """With its norm and pool."""
    run, table = IMAGES[name]
    given, learned = [torch.randn(*IMAGE)], weights(*CONV)
    assert shadow(given, learned, table, precision) == real(given, learned, run, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_tied_weight_is_counted_once(precision: str) -> None:
    """An embedding that is the last layer too."""
    given, learned = [torch.randint(0, 50, INDEX)], weights((50, 32))
    found = shadow(given, learned, lambda i, e: kernels.linear(ops.tanh(ops.embedding(i, e)), e), precision)
    assert found == real(given, learned, lambda i, e: functional.linear(torch.tanh(functional.embedding(i, e)), e), precision)


class _Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.inner, self.outer = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        samples, places, width = x.shape
        q, k, v = (t.view(samples, places, 4, 8).transpose(1, 2) for t in self.inner(x).chunk(3, -1))
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v
        joined: Tensor = self.outer(mixed.transpose(1, 2).reshape(samples, places, width))
        return joined


class _MathAttention(_Attention):
    """With train.attention=math."""

    def forward(self, x: Tensor) -> Tensor:
        with attention.for_trace("math"):
            return super().forward(x)


def _math_table(tape: Tape) -> Any:
    tape.attention = "math"
    return layers.SelfAttention(tape, 32, 4)


class _ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm3d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x.unsqueeze(2)))
        return y


class _ConvNormTable:
    def __init__(self, tape: Tape) -> None:
        self.conv, self.norm = layers.Convolution(tape, 3, 6, (3, 3, 3), stride=2, bias=False), layers.BatchNorm(tape, 6)

    def __call__(self, x: Shadow) -> Shadow:
        return self.norm(self.conv(ops.reshape(x, *x.shape[:2], 1, *x.shape[2:])))


class _SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 80, bias=False), nn.Linear(32, 80, bias=False)
        self.down = nn.Linear(80, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


def _swiglu_table(tape: Tape) -> Any:
    return layers.SwiGlu(tape, 32, 80)


def _by_hand_table(tape: Tape) -> Any:
    return layers.SelfAttention(tape, 32, 4, fused=False)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...]]] = {
    "attention": (lambda: _Attention(True), lambda tape: layers.SelfAttention(tape, 32, 4), (3, 6, 32)),
    "attention, math": (lambda: _MathAttention(True), _math_table, (3, 6, 32)),
    "attention, math, of one sample": (lambda: _MathAttention(True), _math_table, (1, 6, 32)),
    "attention, by hand": (lambda: _Attention(False), _by_hand_table, (3, 6, 32)),
    "attention, by hand, of one sample": (lambda: _Attention(False), _by_hand_table, (1, 6, 32)),
    "a strided convolution": (
        lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1),
        lambda tape: layers.Convolution(tape, 3, 6, (3, 3), stride=2),
        IMAGE,
    ),
    "a dilated convolution": (
        lambda: nn.Conv2d(3, 6, 3, padding=2, dilation=2),
        lambda tape: layers.Convolution(tape, 3, 6, (3, 3)),
        IMAGE,
    ),
    "convolution, batch norm": (_ConvNorm, _ConvNormTable, IMAGE),
    "swiglu": (_SwiGlu, _swiglu_table, (3, 6, 32)),
    "rms norm": (lambda: nn.RMSNorm(32), lambda tape: layers.Norm(tape, 32, root=True), (3, 6, 32)),
    "gru": (lambda: nn.GRU(24, 32, batch_first=True), lambda tape: Gru(tape, 24, 32), (4, 5, 24)),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_allocates_what_its_table_says(name: str, precision: str) -> None:
    """Modules against their counterparts in layers.py and recurrent.py."""
    make, build, shape = BLOCKS[name]
    module = make()
    given, learned = [torch.randn(*shape)], [*module.parameters(), *module.buffers()]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        made = module(x)
        result: Tensor = made[0] if isinstance(made, tuple) else made
        return result

    expected = real(given, learned, run, precision)
    tape = Tape("cpu", None if precision == "fp32" else precision)
    tape.adds_in_place = False
    table = build(tape)
    assert tape.live == sum(p.numel() * p.element_size() for p in learned)
    x = tape.input(*shape, dtype="fp32")
    before = tape.peak = tape.live
    with tape.autocast():
        total = ops.total(table(x))
    tape.backward(total)
    del total
    assert (tape.peak - before, tape.live - before) == expected


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_an_optimizer_keeps_what_its_table_says(name: str) -> None:
    """State per weight, after the first step."""
    learned = weights((64, 32), (64,), (8, 4, 3, 3))
    kinds: dict[str, Any] = {
        "adamw": lambda: torch.optim.AdamW(learned, fused=True),
        "adam": lambda: torch.optim.Adam(learned, fused=True),
        "sgd": lambda: torch.optim.SGD(learned, lr=0.1, momentum=0.9, fused=True),
        "adafactor": lambda: torch.optim.Adafactor(learned),
    }
    optimizer = kinds[name]()
    for p in learned:
        p.grad = torch.zeros_like(p)
    with TensorCount([*learned, *(p.grad for p in learned if p.grad is not None)]) as count:
        optimizer.step()
    tape = Tape("cpu")
    for p in learned:
        tape.parameter(*p.shape)
    before = tape.live
    table = Optimizer(tape, name)
    table.allocate()
    assert tape.live - before == count.live - count.known


STEPPED = [(name, kernel) for name in ("adamw", "adam", "sgd") for kernel in ("fused", "foreach", "loop")] + [("adafactor", "loop")]


@pytest.mark.parametrize(("name", "kernel"), STEPPED)
def test_an_optimizers_step_makes_what_its_table_says(name: str, kernel: str) -> None:
    """What comes and goes while it steps, with the engine's two groups: within a hundredth of the count, fused, in lists and one by one."""
    learned = weights((64, 32), (300, 200), (64,), (128, 64), (8, 4, 3, 3))
    groups = [{"params": [p for p in learned if p.ndim >= 2]}, {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0}]
    kernels_of = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
    more: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01, **kernels_of[kernel]}
    made = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}[name]
    optimizer = made(groups, **more, **({"momentum": 0.9} if name == "sgd" else {}))
    for p in learned:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    with TensorCount([*learned, *(p.grad for p in learned if p.grad is not None), *held]) as count:
        optimizer.step()
    tape = Tape("cpu")
    for p in learned:
        tape.parameter(*p.shape)
    table = Optimizer(tape, name, kernel)
    table.allocate()
    table.give_gradients()
    before = tape.peak = tape.live
    table.work()
    assert tape.peak - before == pytest.approx(count.peak - count.known, rel=0.01)


def test_an_optimizer_on_the_host_keeps_what_its_table_says() -> None:
    """Beside its states, a copy of the weights and the sums of the gradients, which stay; where the device is a GPU, all of it on the
    host, two landings for the largest gradient more, and nothing on the device."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16))
    with TensorCount(model.parameters()) as count:
        optimizer, offload = optimizers.build_on_host(model, Toy(), TrainConfig(), torch.device("cpu"))
        for _ in range(2):
            model(torch.ones(2, 32)).sum().backward()
    assert optimizer.state
    held = {}
    for device in ("cpu", "cuda"):
        tape = Tape(device)
        for p in model.parameters():
            tape.parameter(*p.shape)
        before = tape.live
        table = Optimizer(tape, "adamw", on_host=True)
        table.allocate()
        table.give_gradients()
        held[device] = tape.live - before, table.host_bytes - table.pinned_bytes, table.pinned_bytes
    assert held["cpu"][0] == count.live - count.known
    weights_bytes = sum(p.numel() * 4 for p in model.parameters())
    assert held["cuda"] == (0, 2 * weights_bytes + 4 * 4, 2 * weights_bytes + 2 * 64 * 32 * 4)
    offload.close()


def test_gradients_that_leave_are_not_on_the_device_together() -> None:
    """Of eight layers' gradients, added up over two micro-batches, the peak on a GPU has one; without offload all of them."""

    def peak_of(offload: str) -> int:
        def build(tape: Tape) -> Any:
            return _Deep(tape)

        return of_model(build, Setup("cuda", "fp32", 1, 2, offload=offload)).peak

    layer = 256 * 256 * 4
    states = 8 * (2 * layer + 4)
    assert 7 * layer + states <= peak_of("none") - peak_of("optimizer") <= 9 * layer + states


class _Deep:
    def __init__(self, tape: Tape) -> None:
        self.layers = [layers.Linear(tape, 256, 256, bias=False) for _ in range(8)]

    def micro_batch(self, tape: Tape, samples: int) -> Shadow:
        return tape.input(samples, 256, dtype="fp32")

    def loss(self, batch: Shadow) -> Shadow:
        for layer in self.layers:
            batch = layer(batch)
        return ops.total(batch)

    def evaluate(self, tape: Tape, samples: int, *, worst: bool) -> None:
        return


def test_an_eight_bit_optimizer_keeps_and_unpacks_what_its_table_says() -> None:
    """Its states to the byte; and on a CPU five copies of the largest parameter while it steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eightbit = pytest.importorskip("trainerd.engine.eightbit")
    learned = [nn.Parameter(p.detach()) for p in weights((300, 200), (64,), (128, 64))]
    with TensorCount(learned) as count:
        optimizer = eightbit.make("adamw8bit", [{"params": learned}], 1e-3, 0.01)
    for p in learned:
        p.grad = torch.zeros_like(p)
    tape = Tape("cpu")
    for p in learned:
        tape.parameter(*p.shape)
    before = tape.live
    table = Optimizer(tape, "adamw8bit")
    table.allocate()
    assert tape.live - before == count.live - count.known
    tape.peak = held = tape.live
    table.work()
    assert tape.peak - held == pytest.approx(peak(allocator_changes(optimizer.step)), rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_paged_states_lie_where_bitsandbytes_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, for a CPU has none: its own code asks for pages from 100,000 numbers on, and those are RAM; all else is the device's."""
    eightbit = pytest.importorskip("trainerd.engine.eightbit")
    paged: list[Tensor] = []

    def pages(*shape: int, dtype: torch.dtype, device: Any) -> Tensor:
        paged.append(torch.zeros(*shape, dtype=dtype))
        return paged[-1]

    functions = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functions, "get_paged", pages)
    monkeypatch.setattr(functions, "fill", lambda *given: None)
    learned = [nn.Parameter(torch.empty(*shape, device="meta")) for shape in ((400, 250), (250, 399), (4096,), (64,), (500, 300))]
    optimizer = eightbit.PagedEightBit([{"params": learned}], lr=1e-3)
    optimizer.allocate()
    states = {id(t): t for state in optimizer.state.values() for t in eightbit._flat(state).values() if isinstance(t, Tensor)}
    tape = Tape("cuda")
    for p in learned:
        tape.parameter(*p.shape)
    before = tape.live
    table = Optimizer(tape, "paged_adamw8bit")
    table.allocate()
    assert len(paged) == 4 and table.host_bytes == sum(t.numel() for t in paged)
    on_device = [t for t in states.values() if all(t is not other for other in paged)]
    assert tape.live - before == sum(t.numel() * t.element_size() for t in on_device)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loss_in_pieces_never_holds_all_logits(precision: str) -> None:
    """With twice as many tokens the logits held stay those of one piece."""

    def logits(tokens: int) -> int:
        tape = Tape("cpu", None if precision == "fp32" else precision)
        weight, bias = tape.parameter(5000, 32), tape.parameter(5000)
        x = tape.parameter(tokens, 32)
        with tape.autocast():
            loss = losses.linear_cross_entropy(x, weight, bias, tape.input(tokens))
        tape.backward(loss)
        del loss
        return max(size for size, kind in zip(tape.sizes, tape.kinds, strict=True) if kind == "logits")

    assert logits(4096) == logits(512) <= 256 * 5000 * 4


@pytest.mark.parametrize("places", [9, 60])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("attention", [0, 24])
def test_cadences_memory_layer_is_its_table(attention: int, precision: str, places: int) -> None:
    """Alone, at its highest (of few places with the weights' gradients, of many on the way back) and in the end."""
    layer, x = MemoryLayer(20, 40, attention), torch.randn(6, places, 20)
    with TensorCount([*layer.parameters(), x]) as count:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total = layer(x, None)[0].sum()
        total.backward()
        del total
    tape = Tape("cpu", None if precision == "fp32" else precision)
    tape.adds_in_place = False
    table, given = blocks.MemoryLayer(tape, 20, 40, attention), tape.input(6, places, 20, dtype="fp32")
    before = tape.peak = tape.live
    with tape.autocast():
        counted = ops.total(table(given))
    tape.backward(counted)
    del counted
    assert (tape.peak - before, tape.live - before) == (count.peak - count.known, count.live - count.known)


@pytest.mark.parametrize("attention", [0, 24])
def test_cadences_memory_layer_computes_what_its_table_says(attention: int) -> None:
    """The work of both ways: what torch counts of it, and what it does not count: products in place, and attention's sums."""
    layer, x = MemoryLayer(20, 40, attention), torch.randn(6, 60, 20)
    with FlopCounterMode(display=False) as count:
        layer(x, None)[0].sum().backward()
    in_place = 2 * 6 * 60 * 40 * (3 * 40 + attention) + 2 * 6 * 59 * 40 * attention
    sums = 2 * 6 * (60 * 59 // 2) * (3 * attention + 40) if attention else 0
    tape = Tape("cpu")
    table, given = blocks.MemoryLayer(tape, 20, 40, attention), tape.input(6, 60, 20, dtype="fp32")
    tape.backward(ops.total(table(given)))
    assert tape.flops == pytest.approx(count.get_total_flops() + in_place + sums, rel=1e-3)


STEPS = ["gpt full 2", "gpt selective 2", "gpt-math none 1", "llama-lora full 2", "convnet full 2", "cnn3d full 2"]
STEPS += ["gru none 2", "gru-mn none 2"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_peaks_where_the_table_says(name: str, precision: str) -> None:
    """Whole models with optimizer and accumulation: to the byte, and within the bound."""
    called, again, samples = name.split()
    parts = family(called, again)
    guess, most = estimated(parts, int(samples), precision, 2, in_place=False)
    truth = counted(parts, int(samples), precision, 2)
    assert guess == truth < most


FEW = ["gpt-few selective fp32 4", "gpt-few full fp32 1", "gpt-few full bf16 4", "llama-few none bf16 1", "llama-few selective fp32 1"]
FEW += ["llama-few full bf16 1", "gru-mn full fp32 1", "gru-mn selective fp32 1"]


@pytest.mark.parametrize("name", FEW)
def test_a_step_peaks_inside_a_block_where_the_table_says(name: str) -> None:
    """Of few words the highest point is not at the logits: what is computed again begins when something of it is needed and ends at the
    last tensor that is saved; what was computed and dropped on the way there keeps nothing; a kept product that nobody asks for waits
    for the block's end; and a tensor that was given away is held by the module that got it, or not at all."""
    called, again, precision, accumulation = name.split()
    parts = family(called, again)
    guess, most = estimated(parts, 1, precision, int(accumulation), in_place=False)
    truth = counted(parts, 1, precision, int(accumulation))
    assert guess == truth < most
