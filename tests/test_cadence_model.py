"""CADENCE's models: causal, with gradients through the memory, the same whatever the padding and the micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trainerd.config.model import DataConfig
from trainerd.engine.dropout import SampleDropout, attach, lay_out
from trainerd.engine.task import TaskContext
from trainerd.tasks.cadence.dataset import TokenRows
from trainerd.tasks.cadence.model import Batch, GruMnModel, GruModel, MemoryLayer, QueryModel, build
from trainerd.tasks.cadence.prepare import prepare
from trainerd.tasks.cadence.settings import CadenceSettings, GruMnSettings, GruSettings
from trainerd.tasks.cadence.softmax import WordSoftmax
from trainerd.tasks.cadence.task import CadenceTask

NUM_OUTPUTS, NUM_TOKENS, NUM_CATEGORIES = 40, 43, 3
SETTINGS = {
    "gru": CadenceSettings(gru=GruSettings(word_embedding=12, category_embedding=5, hidden=16)),
    "gru-mn": CadenceSettings(
        model="gru-mn", gru_mn=GruMnSettings(embedding=12, hidden=[14, 10], attention=[6, 5], context=9, dropout=0.5)
    ),
    "stack": CadenceSettings(model="gru-mn", gru_mn=GruMnSettings(embedding=12, hidden=[14, 10], attention=[], context=9)),
}


@pytest.fixture(params=SETTINGS)
def model(request: pytest.FixtureRequest) -> QueryModel:
    torch.manual_seed(0)
    return build(SETTINGS[request.param], NUM_TOKENS, NUM_OUTPUTS, NUM_CATEGORIES).double()


def batch(lengths: list[int], seed: int = 0) -> Batch:
    """A micro-batch as the dataset makes them; padding holds arbitrary tokens."""
    rng = np.random.default_rng(seed)
    width = max(lengths)
    real = np.arange(width) < np.array(lengths)[:, None]
    tensors = (
        rng.integers(0, NUM_TOKENS, (len(lengths), width)), rng.integers(0, NUM_CATEGORIES, len(lengths)),
        np.flatnonzero(real), rng.integers(0, NUM_OUTPUTS, int(real.sum())),
    )  # fmt: skip
    return Batch(*(torch.from_numpy(array) for array in tensors))


def rows_of(whole: Batch, rows: list[int]) -> Batch:
    """Some rows of a micro-batch, padded no further than they need."""
    width = whole.inputs.shape[1]
    row, place = whole.places // width, whole.places % width
    lengths = torch.bincount(row, minlength=len(whole.inputs))[rows]
    short = int(lengths.max())
    places = torch.cat([number * short + torch.arange(int(length)) for number, length in enumerate(lengths)])
    targets = torch.cat([whole.targets[row == number] for number in rows])
    assert len(place) >= len(places)
    return Batch(whole.inputs[rows, :short], whole.categories[rows], places, targets)


def test_laptop_form_has_4_2_million_parameters() -> None:
    """One GRU layer of 256, embeddings 128 + 64, vocabulary 10,000: 4.2 million; the paper's form has its paper's sizes."""
    sizes = {}
    for name in ("gru", "gru-mn"):
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in build(CadenceSettings(model=name), 10_022, 10_012, 10).parameters())
    assert 4.15e6 < sizes["gru"] < 4.25e6
    assert 50e6 < sizes["gru-mn"] < 60e6


def test_no_output_depends_on_a_later_token(model: QueryModel) -> None:
    """Strictly causal: changing a token changes no score before it, and does change those after it."""
    model.eval()
    one = batch([7, 7, 7])
    before = model.logits(one).view(3, 7, -1)
    for place in range(7):
        inputs = one.inputs.clone()
        inputs[:, place] = (inputs[:, place] + 1) % NUM_TOKENS
        after = model.logits(one._replace(inputs=inputs)).view(3, 7, -1)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.isclose(after[:, place:], before[:, place:]).all(-1).any()


def test_category_matters_everywhere(model: QueryModel) -> None:
    """Another category gives other scores at every place."""
    model.eval()
    one = batch([5, 5])
    other = one._replace(categories=(one.categories + 1) % NUM_CATEGORIES)
    assert not torch.isclose(model.logits(one), model.logits(other)).all(-1).any()


@pytest.mark.parametrize("name", ["gru", "gru-mn", "stack"])
@torch.no_grad()
def test_step_by_step_is_as_all_at_once(name: str) -> None:
    """A search, which feeds one word at a time, sees what training saw; beams may be taken from any rows."""
    torch.manual_seed(1)
    model = build(SETTINGS[name], NUM_TOKENS, NUM_OUTPUTS, NUM_CATEGORIES).double().eval()
    one = batch([6, 6, 6, 6])
    whole, _ = model.run(one.inputs, one.categories)
    first, state = model.run(one.inputs[:, :2], one.categories)
    parts = [first]
    for place in range(2, 6):
        part, state = model.run(one.inputs[:, place : place + 1], one.categories, state)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), whole)
    picked = torch.tensor([3, 1, 1])
    _, state = model.run(one.inputs[:, :4], one.categories)
    chosen = [part.index_select(0, picked) for part in state]
    after, _ = model.run(one.inputs[picked, 4:5], one.categories[picked], chosen)
    assert torch.allclose(after[:, 0], whole[picked, 4])


@torch.no_grad()
@pytest.mark.parametrize("attention", [24, 0])
def test_step_by_step_under_autocast_is_near_all_at_once(attention: int) -> None:
    """In bfloat16 a single place goes another way than several, to the same values within its precision."""
    torch.manual_seed(1)
    layer, inputs = MemoryLayer(16, 32, attention), torch.randn(3, 6, 16)
    exact, _ = layer(inputs, None)
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = layer(inputs, None)
        state, parts = None, []
        for place in range(6):
            part, state = layer(inputs[:, place : place + 1], state)
            parts.append(part)
    assert whole.dtype == torch.bfloat16 and torch.allclose(torch.cat(parts, 1).float(), whole.float(), atol=1e-2)
    assert torch.allclose(whole.float(), exact, atol=3e-2)


def test_gradients_flow_through_the_memory() -> None:
    """The last output has a gradient on the first input through the tape alone, with every other way from the past cut."""
    torch.manual_seed(0)
    layer = MemoryLayer(6, 8, 4).double()
    with torch.no_grad():
        layer.from_past.weight[3 * 8 :] = 0  # what one attention hands to the next
    inputs = torch.randn(2, 9, 6, dtype=torch.double, requires_grad=True)
    states, _ = layer(inputs, None)
    states[:, -1].sum().backward()
    assert inputs.grad is not None and (inputs.grad.abs().sum((0, 2)) > 1e-6).all()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


def formulas(layer: MemoryLayer, inputs: torch.Tensor) -> torch.Tensor:
    """The paper's layer, written out place by place and left to autograd."""
    given, hidden = layer.from_input(inputs), layer.hidden
    tape: list[torch.Tensor] = []
    recall = given.new_zeros(len(inputs), given.shape[2] - 3 * hidden)
    for x in given.unbind(1):
        if tape and layer.key is not None and layer.score is not None:
            attend = x[:, 3 * hidden :] + recall
            scores = torch.stack([layer.score(torch.tanh(layer.key(h) + attend)) for h in tape])
            memory = (torch.softmax(scores.float() if scores.dtype.itemsize < 4 else scores, 0) * torch.stack(tape)).sum(0)
        else:
            memory = tape[-1] if tape else given.new_zeros(len(inputs), hidden)
        read = layer.from_past(memory)
        reset, update = torch.sigmoid(x[:, : 2 * hidden] + read[:, : 2 * hidden]).chunk(2, 1)
        new = torch.tanh(x[:, 2 * hidden : 3 * hidden] + reset * read[:, 2 * hidden : 3 * hidden])
        tape.append((1 - update) * new + update * memory)
        recall = read[:, 3 * hidden :]
    return torch.stack(tape, 1)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
@pytest.mark.parametrize("attention", [3, 0])
@pytest.mark.parametrize("places", [1, 2, 6])
def test_memory_layer_is_the_papers_formula(places: int, attention: int, device: str) -> None:
    """Attention over past states and gates give what the formulas give, and the gradient by hand is theirs; without gradients, too."""
    torch.manual_seed(2)
    layer = MemoryLayer(5, 4, attention).double().to(device)
    inputs = torch.randn(3, places, 5, dtype=torch.double, device=device, requires_grad=True)
    wanted, (states, _) = formulas(layer, inputs), layer(inputs, None)
    with torch.no_grad():
        assert torch.allclose(wanted, states, rtol=1e-13, atol=1e-15) and torch.equal(layer(inputs, None)[0], states)
    over, learns = torch.randn_like(wanted), [inputs, *layer.parameters()]
    grads = (torch.autograd.grad(made, learns, over, allow_unused=True, materialize_grads=True) for made in (wanted, states))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("attention", [6, 0])
def test_memory_layer_under_autocast_is_as_near_as_autograd(attention: int) -> None:
    """In bfloat16 the gradient by hand is no farther from the exact one than that of the formulas, and float32 for the weights."""
    torch.manual_seed(3)
    layer, inputs = MemoryLayer(16, 24, attention), torch.randn(8, 7, 16)
    learns = list(layer.parameters())

    def gradient(low: bool, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            made = run()
        found = torch.autograd.grad(made.float().square().sum(), learns)
        assert all(grad.dtype == torch.float32 for grad in found)
        return torch.cat([grad.flatten() for grad in found])

    exact = gradient(False, lambda: formulas(layer, inputs))
    beside, by_hand = (gradient(True, run) for run in (lambda: formulas(layer, inputs), lambda: layer(inputs, None)[0]))
    assert (by_hand - exact).norm() < 1.1 * (beside - exact).norm() + 1e-3 * exact.norm()


def test_no_gradient_is_lost_silently_in_a_search() -> None:
    """Going on from a state while gradients are wanted is refused: none would flow to what was before."""
    layer = MemoryLayer(5, 4, 3)
    with torch.no_grad():
        _, state = layer(torch.randn(2, 3, 5), None)
    with pytest.raises(RuntimeError, match="no_grad"):
        layer(torch.randn(2, 1, 5), state)


def test_without_attention_a_layer_is_torchs_gru() -> None:
    """With an empty attention the layer is an ordinary GRU, to the last bits of float64."""
    torch.manual_seed(3)
    layer, reference = MemoryLayer(5, 7, 0).double(), nn.GRU(5, 7, batch_first=True).double()
    with torch.no_grad():
        for name, own in (("ih", layer.from_input), ("hh", layer.from_past)):
            getattr(reference, f"weight_{name}_l0").copy_(own.weight)
            getattr(reference, f"bias_{name}_l0").copy_(own.bias)
    inputs = torch.randn(3, 6, 5, dtype=torch.double)
    assert torch.allclose(layer(inputs, None)[0], reference(inputs)[0])


def gradients(model: QueryModel, parts: list[Batch], ids: list[list[int]], ctx: TaskContext) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a window of micro-batches, as the engine computes them."""
    task = CadenceTask()
    total = sum(task.counts(part)["loss"] for part in parts)
    model.zero_grad()
    value = 0.0
    for part, ctx.sample_ids in zip(parts, ids, strict=True):
        summed, weight = task.loss(model, part, ctx)[0]["loss"]
        (weight * summed / total).backward()
        value += float(summed.detach()) / total
    return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_one_batch_of_eight_is_eight_of_one(model: QueryModel, tmp_path: Path) -> None:
    """Whatever the micro-batch, padding and order of rows: the same loss and gradients, dropout included."""
    ctx = TaskContext(torch.device("cpu"), torch.float32, 0, tmp_path, DataConfig())
    attach(model, ctx)
    lay_out(model, ctx.device)
    drops = [module for module in model.modules() if isinstance(module, SampleDropout)]
    laid_out = [drop._units for drop in drops]
    whole = batch([7, 3, 5, 1, 7, 2, 4, 6])
    ids = [11, 5, 42, 7, 19, 3, 8, 100]
    one, grads = gradients(model, [whole], [ids], ctx)
    assert drops and None not in laid_out and all(drop._units is known for drop, known in zip(drops, laid_out, strict=True))
    eight, split = gradients(model, [rows_of(whole, [row]) for row in range(8)], [[i] for i in ids], ctx)
    mixed_rows = [[3, 0, 6], [1], [7, 2, 5, 4]]
    mixed, shuffled = gradients(model, [rows_of(whole, rows) for rows in mixed_rows], [[ids[r] for r in rows] for rows in mixed_rows], ctx)
    assert one == pytest.approx(eight, rel=1e-13) == pytest.approx(mixed, rel=1e-13)
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        assert torch.allclose(grad, split[name], rtol=1e-10, atol=1e-14) and torch.allclose(grad, shuffled[name], rtol=1e-10, atol=1e-14)
    ctx.epoch = 1
    assert gradients(model, [whole], [ids], ctx)[0] != one  # dropout was there


@pytest.mark.parametrize("num_tokens", [1, 255, 256, 600])
def test_sliced_loss_is_cross_entropy(num_tokens: int) -> None:
    """Loss and gradients are those of torch's cross-entropy, also through a scale; without gradients too."""
    torch.manual_seed(0)
    layer = WordSoftmax(6, 50).double()
    hidden = torch.randn(num_tokens, 6, dtype=torch.double, requires_grad=True)
    targets = torch.randint(0, 50, (num_tokens,))
    expected = nn.functional.cross_entropy(layer(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.37, [hidden, layer.weight, layer.bias])
    got = torch.autograd.grad(layer.loss(hidden, targets) * 0.37, [hidden, layer.weight, layer.bias])
    for one, other in zip(wanted, got, strict=True):
        assert torch.allclose(one, other)
    with torch.no_grad():
        assert torch.isclose(layer.loss(hidden, targets), expected)


def test_all_logits_at_once_is_a_setting() -> None:
    """memory.logits=full: torch's own loss, and the same gradients."""
    torch.manual_seed(0)
    layer = WordSoftmax(6, 50).double()
    hidden, targets = torch.randn(30, 6, dtype=torch.double, requires_grad=True), torch.randint(0, 50, (30,))
    found = []
    for layer.chunked in (True, False):
        loss = layer.loss(hidden, targets)
        assert (type(loss.grad_fn).__name__ == "NllLossBackward0") is not layer.chunked
        found.append(torch.autograd.grad(loss, [hidden, layer.weight, layer.bias]))
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(*found, strict=True))


def test_sliced_loss_in_bfloat16_is_near() -> None:
    """Under autocast the loss stays within bfloat16's precision of the exact one, and weights' gradients are float32."""
    torch.manual_seed(0)
    layer = WordSoftmax(32, 500)
    hidden, targets = torch.randn(200, 32, requires_grad=True), torch.randint(0, 500, (200,))
    exact = layer.loss(hidden, targets)
    with torch.autocast("cpu", torch.bfloat16):
        near = layer.loss(hidden, targets)
    near.backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert float(near.detach()) == pytest.approx(float(exact.detach()), rel=2e-3)


def test_sliced_loss_says_what_it_cannot() -> None:
    """A second backward through the same loss is refused in words; an impossible target is not infinite."""
    layer = WordSoftmax(2, 3)
    loss = layer.loss(torch.ones(1, 2), torch.tensor([0]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-1e4, 0.0, 0.0]))
    assert torch.isfinite(layer.loss(torch.ones(1, 2), torch.tensor([0])))


def test_dimensions_are_settings_and_the_model_can_be_replaced(tmp_path: Path) -> None:
    """A library user subclasses the model and hands it to the task."""

    class Wider(GruModel):
        """One more layer on the output."""

        def __init__(self, *sizes: int, settings: GruSettings) -> None:
            super().__init__(*sizes, settings)
            self.more = nn.Linear(settings.hidden, settings.hidden)

        def features(self, hidden: torch.Tensor, categories: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.more(hidden))

    wide = Wider(NUM_TOKENS, NUM_OUTPUTS, NUM_CATEGORIES, settings=GruSettings(hidden=8))
    wide(batch([3, 2])).backward()
    assert wide.more.weight.grad is not None
    assert isinstance(build(SETTINGS["gru-mn"], NUM_TOKENS, NUM_OUTPUTS, NUM_CATEGORIES), GruMnModel)


def test_micro_batches_are_the_rows(tmp_path: Path) -> None:
    """A micro-batch holds every token of its rows once, in place, with the next one as its target; single rows give the same."""
    prepare(CadenceSettings(), DataConfig(size=300), 0, tmp_path, lambda *what: None)
    task = CadenceTask()
    task.bind(TaskContext(torch.device("cpu"), torch.float32, 0, tmp_path, DataConfig()))
    rows = task.dataset("train")
    assert isinstance(rows, TokenRows)
    ids = [5, 0, 17, 200, 3]
    made = task.collate(rows.__getitems__(ids))
    for number, index in enumerate(ids):
        row = torch.from_numpy(rows[index].astype(np.int64))
        mine = made.places // made.inputs.shape[1] == number
        assert torch.equal(made.inputs.flatten()[made.places[mine]], row[:-1]) and torch.equal(made.targets[mine], row[1:])
        assert made.categories[number] == rows.categories[index]
    again = task.collate([rows[index] for index in ids])
    assert all(torch.equal(one, other) for one, other in zip(made[1:], again[1:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(made, task.collate(list(rows.__getitems__(ids))), strict=True))
    assert len(rows.__getitems__(ids)[1:3]) == 2 and task.length(rows[5]) == rows.lengths[5]
    assert task.counts(made) == {"loss": int(rows.lengths[ids].sum())}
