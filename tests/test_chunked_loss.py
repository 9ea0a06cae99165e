"""The loss without its table of logits: torch's own loss and gradients, within its bound, however it is cut and used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.memory_oracle import TensorCount
from trainerd.engine import chunked
from trainerd.engine.chunked import linear_cross_entropy
from trainerd.memory import losses
from trainerd.memory.chunks import MOST_BYTES, Cut, cut
from trainerd.memory.tape import Tape

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS, WIDTH = 330, 24
CUTS = {"all words": Cut(64, 10**9), "some words": Cut(48, 100)}
Loss = Callable[..., Tensor]


@pytest.fixture(params=CUTS)
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cut]:
    """Both ways of cutting, in pieces small enough that there are several."""
    found = CUTS[request.param]
    monkeypatch.setattr(chunked, "cut", lambda *_: found)
    yield found


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """torch's own."""
    return functional.cross_entropy(functional.linear(hidden, weight, bias).flatten(0, -2), targets.flatten(), reduction="sum")


def given(tokens: int = 200, dtype: torch.dtype = torch.float64, *, bias: bool = True, ignored: bool = False) -> list[Any]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True)
    weight = (torch.randn(WORDS, WIDTH, dtype=dtype) * WIDTH**-0.5).requires_grad_()
    targets = torch.randint(0, WORDS, (tokens,))
    if ignored:
        targets[::3] = -100
    return [hidden, weight, torch.randn(WORDS, dtype=dtype, requires_grad=True) if bias else None, targets]


def found(loss: Loss, parts: list[Any], autocast: torch.dtype | None = None) -> list[Tensor]:
    """The loss and the gradients of what was given, through a scale."""
    learned = [t for t in parts[:3] if t is not None and t.requires_grad]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        value = loss(*parts)
    return [value.detach(), *torch.autograd.grad(value * 0.37, learned)]


def apart(one: Tensor, other: Tensor) -> float:
    """The relative difference of two tensors, by their norms."""
    return float((one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-300))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_loss_and_gradients_are_torchs(either: Cut, dtype: torch.dtype, bound: float) -> None:
    """With and without bias, with ignored tokens, for one token and for many."""
    for bias, ignored, tokens in itertools.product((True, False), (True, False), (2, 200)):
        parts = given(tokens, dtype, bias=bias, ignored=ignored)
        for one, other in zip(found(plain, parts), found(linear_cross_entropy, parts), strict=True):
            assert apart(one, other) <= bound and one.dtype == other.dtype


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_near_as_torchs(either: Cut, low: torch.dtype) -> None:
    """No further from the exact gradients than the plain loss under autocast, which makes its weight's gradient in one low product."""
    parts = given(dtype=torch.float32)
    exact, theirs, ours = found(plain, parts), found(plain, parts, low), found(linear_cross_entropy, parts, low)
    for truth, one, other in zip(exact, theirs, ours, strict=True):
        assert other.dtype == torch.float32
        assert apart(truth, other) <= 1.5 * apart(truth, one) + 1e-6


def test_the_weights_gradient_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand equal parts, each far below a bfloat16's last place of their sum, are not lost."""
    monkeypatch.setattr(chunked, "cut", lambda *_: Cut(1, 10**9))
    hidden, weight = torch.ones(1000, 8), torch.zeros(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, None, torch.zeros(1000, dtype=torch.int64)).backward()
    assert weight.grad is not None and torch.equal(weight.grad[0], torch.full((8,), -750.0))


@pytest.mark.parametrize("hidden_type", [torch.bfloat16, torch.float32])
def test_a_low_hidden_keeps_its_type_and_survives_a_scale(either: Cut, hidden_type: torch.dtype) -> None:
    """What autocast has made low goes in and its gradient comes out so; fp16's scale is not itself rounded to a low type."""
    parts = given(dtype=torch.float32, ignored=True)
    parts[0] = parts[0].detach().to(hidden_type).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_cross_entropy(*parts)
    (value * (1 + 2**-10)).backward()
    assert parts[0].grad.dtype == hidden_type
    with torch.autocast("cpu", torch.float16):
        half = parts[0].detach().half().requires_grad_()
        value = linear_cross_entropy(half, *parts[1:])
    (value * 131072.0 / 2**14).backward()
    assert torch.isfinite(half.grad).all() and apart(parts[0].grad * 8, half.grad) < 0.01


def test_what_needs_no_gradient_gets_none(either: Cut) -> None:
    """A frozen weight, a hidden that is an input, an evaluation: the same numbers, and nothing made for the others."""
    parts = given(ignored=True)
    value, *whole = found(plain, parts)
    for place in range(3):
        some = [t if t is None or not isinstance(t, Tensor) or number in (place, 3) else t.detach() for number, t in enumerate(parts)]
        assert apart(found(linear_cross_entropy, some)[1], whole[place]) < 1e-13
    with torch.no_grad():
        quiet = linear_cross_entropy(*parts)
    assert not quiet.requires_grad and apart(value, quiet) < 1e-13


def test_a_tied_weight_takes_both_gradients(either: Cut) -> None:
    """An embedding that is the last layer too, under a checkpoint and without: bit for bit the same, and torch's."""
    torch.manual_seed(1)
    embedding = nn.Embedding(WORDS, WIDTH, dtype=torch.float64)
    words, targets = torch.randint(0, WORDS, (9, 11)), torch.randint(0, WORDS, (9, 11))

    def run(loss: Loss, again: bool) -> Tensor:
        def body(x: Tensor) -> Tensor:
            return loss(torch.tanh(x), embedding.weight, None, targets)

        embedding.zero_grad()
        x = embedding(words)
        (checkpoint(body, x, use_reentrant=False) if again else body(x)).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad.clone()

    ours = run(linear_cross_entropy, False)
    assert torch.equal(ours, run(linear_cross_entropy, True)) and apart(run(plain, False), ours) < 1e-13


def test_nothing_to_learn_from_is_a_loss_of_nothing(either: Cut) -> None:
    """No token at all, or only ignored ones: 0, and gradients of 0."""
    for parts in (given(0), given(5)):
        parts[3] = torch.full_like(parts[3], -100)
        value, *gradients = found(linear_cross_entropy, parts)
        assert value == 0 and all(bool((g == 0).all()) for g in gradients)


def test_an_impossible_target_costs_what_it_costs(either: Cut) -> None:
    """A chance too small for a number: the loss is still the distance of the logits."""
    hidden, weight = torch.ones(3, 1), torch.tensor([[-1e4], [0.0], [1.0]], requires_grad=True)
    targets = torch.tensor([0, 1, 0])
    expected = plain(hidden, weight, None, targets).item()
    assert linear_cross_entropy(hidden, weight, None, targets).item() == pytest.approx(expected, rel=1e-7)


def test_mistakes_are_named() -> None:
    """A second way back, types that differ, lengths that differ, a word that is not there."""
    parts = given(4)
    value = linear_cross_entropy(*parts)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        value.backward()
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(torch.autograd.grad(linear_cross_entropy(*parts), parts[0], create_graph=True)[0].sum(), parts[1])
    with pytest.raises(TypeError, match="without autocast both must be of one type"):
        linear_cross_entropy(parts[0].float(), *parts[1:])
    with pytest.raises(ValueError, match="hidden has 4 tokens"):
        linear_cross_entropy(*parts[:3], parts[3][:3])
    for wrong in (WORDS, -1):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            linear_cross_entropy(*parts[:3], torch.full((4,), wrong))


def beyond(tokens: int, width: int, low: bool) -> int:
    """The most that is held at once at 50,000 words, inputs, the loss and gradients left out."""
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.zeros(50_000, width, requires_grad=True)
    bias, targets = torch.zeros(50_000, requires_grad=True), torch.zeros(tokens, dtype=torch.int64)
    inputs = [hidden, weight, bias, targets]
    with TensorCount(inputs) as count, torch.autocast("cpu", torch.bfloat16, enabled=low):
        value = linear_cross_entropy(*inputs)
    gradients = sum(t.numel() * t.element_size() for t in (hidden, weight, bias))
    assert count.live - count.known == gradients + value.element_size()
    return count.peak - count.known - gradients


@pytest.mark.parametrize(("tokens", "width", "low"), [(520, 8, False), (520, 8, True), (140, 320, True), (140, 320, False)])
def test_its_own_tensors_stay_below_64_mib(tokens: int, width: int, low: bool) -> None:
    """At 50,000 words every allocation is counted; narrow and wide, in fp32 and under autocast, and as many with fewer tokens."""
    most = beyond(tokens, width, low)
    assert most <= MOST_BYTES
    assert most - beyond(tokens - 256, width, low) <= 256 if tokens > 256 else True


def test_the_cut_keeps_the_bound_for_every_shape() -> None:
    """Arithmetic for layers nobody runs in a test: any vocabulary and width, on a CPU and a GPU."""
    for device, words, width, dtype in itertools.product(
        ("cpu", "cuda"), (1000, 10_012, 50_000, 151_936, 262_144), (64, 512, 1024, 2048), ("fp32", "bf16")
    ):
        pieces = cut(device, words, width, dtype, 4)
        size, some = (4, min(pieces.words, words)) if dtype == "fp32" else (2, min(pieces.words, words))
        table = pieces.tokens * some * (size + 4) + pieces.tokens * width * (size + 8) * (some < words)
        copies = 0 if size == 4 else 2 * some * width * size
        assert table + copies <= MOST_BYTES, (device, words, width, dtype, pieces)
        assert pieces.tokens >= 16


@pytest.mark.parametrize("low", [False, True])
def test_the_estimate_knows_what_it_allocates(either: Cut, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory table's peak is the counted one, within the few bytes per token it leaves out."""
    monkeypatch.setattr(losses, "cut", lambda *_: either)
    hidden, weight = torch.randn(200, 64, requires_grad=True), torch.zeros(3000, 64, requires_grad=True)
    bias, targets = torch.zeros(3000, requires_grad=True), torch.zeros(200, dtype=torch.int64)
    with TensorCount([hidden, weight, bias, targets]) as count:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            value = linear_cross_entropy(hidden, weight, bias, targets, ignore_index=None)
        value.backward()
    tape = Tape("cpu", "bf16" if low else None)
    made = [tape.parameter(200, 64), tape.parameter(3000, 64), tape.parameter(3000)]
    before = tape.live
    with tape.autocast():
        loss = losses.linear_cross_entropy(*made, tape.input(200))
    tape.backward(loss)
    assert tape.peak - before == pytest.approx(count.peak - count.known, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("low", [False, True])
def test_on_a_gpu_it_is_the_same_within_its_bound(low: bool) -> None:
    """Against torch's own on the device, and torch's own count of what is held beyond inputs and gradients."""
    torch.manual_seed(0)
    tokens, width = 4096, 256
    weight = torch.randn(50_000, width, device="cuda") * width**-0.5
    given = [torch.randn(tokens, width, device="cuda").requires_grad_(), weight.requires_grad_(), torch.zeros(50_000, device="cuda")]
    targets = torch.randint(0, 50_000, (tokens,), device="cuda")

    def run(loss: Loss) -> tuple[list[Tensor], int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            value = loss(*given, targets)
        found = [value.detach(), *torch.autograd.grad(value, given[:2])]
        return found, torch.cuda.max_memory_allocated() - before

    run(linear_cross_entropy)  # cuBLAS takes its workspace
    (ours, held), (theirs, _) = run(linear_cross_entropy), run(plain)
    assert held - sum(t.numel() * t.element_size() for t in given[:2]) <= MOST_BYTES + (1 << 20)
    assert all(apart(one, other) <= (1e-2 if low else 1e-5) for one, other in zip(theirs, ours, strict=True))
