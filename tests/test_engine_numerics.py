"""The pure parts of the engine: order, schedules, accumulation, dropout, random states, optimizers, precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.toy import Script, Toy, ToyModel, config, lines, run, weights
from trainerd.config.model import TrainConfig
from trainerd.contract.errors import ConfigError, TrainerdError
from trainerd.engine import dropout, eager, optimizers, precision, rng, schedules
from trainerd.engine.batches import Batches, split
from trainerd.engine.dropout import SampleDropout
from trainerd.engine.step import weighted
from trainerd.engine.task import Task, TaskContext
from trainerd.machine import cpu

# The order of samples


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**32 - 1), st.booleans())
def test_an_epoch_is_every_sample_exactly_once(num_samples, batch_size, seed, bucketed):
    """Whatever the sizes, in every epoch, the last short batch included."""
    lengths = np.arange(num_samples) % 17 if bucketed else None
    batches = Batches(num_samples, batch_size, seed, lengths=lengths)
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        assert sorted(i for step in steps for i in batches.ids(step)) == list(range(num_samples))


def test_the_order_is_a_pure_function_of_seed_and_step():
    """Asked in any order, by any object, a step has the same samples; another seed or epoch has others."""
    lengths = np.random.default_rng(0).integers(1, 30, 500)
    one, other = (Batches(500, 16, 7, lengths=lengths) for _ in range(2))
    forward = [one.ids(step) for step in range(64)]
    assert forward == [other.ids(step) for step in reversed(range(64))][::-1]
    assert forward[:32] != forward[32:]
    assert forward[:32] != [Batches(500, 16, 8, lengths=lengths).ids(step) for step in range(32)]


def test_the_order_never_changes_between_versions():
    """A run begun with an older trainerd or numpy must find the same order: these numbers are frozen."""
    assert Batches(10, 4, 3).ids(0) == FROZEN_PLAIN
    assert Batches(10, 4, 3, lengths=np.array([5, 1, 4, 1, 5, 9, 2, 6, 5, 3])).ids(4) == FROZEN_BUCKETED


FROZEN_PLAIN = [5, 8, 9, 6]
FROZEN_BUCKETED = [7, 5]


def test_batches_of_like_length_pad_little():
    """Buckets leave less than a tenth of the padding that random batches have."""
    lengths = np.random.default_rng(0).integers(1, 30, 5000)

    def padding(batches):
        groups = [lengths[batches.ids(step)] for step in range(batches.steps_per_epoch)]
        return sum(int(group.max()) * len(group) - int(group.sum()) for group in groups)

    assert padding(Batches(5000, 32, 0, lengths=lengths)) < 0.1 * padding(Batches(5000, 32, 0))


def test_a_limit_takes_part_of_a_seeded_shuffle():
    """`--dataset-size` 20 of 100: always the same 20, spread over the data."""
    chosen = {i for step in range(5) for i in Batches(100, 4, 1, limit=20).ids(step)}
    assert len(chosen) == 20 and max(chosen) > 60
    assert chosen == {i for step in range(5, 10) for i in Batches(100, 4, 1, limit=20).ids(step)}


def test_split_keeps_every_sample():
    """Micro-batches are consecutive, the last may be short."""
    assert split([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


# The learning rate


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "polynomial"])
def test_the_rate_rises_to_its_peak_and_falls_towards_zero(name):
    """Warm-up ends at the peak; the last step still learns."""
    factors = [schedules.factor(name, step, 100, 10) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0 and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == 1.0 if name == "constant" else 0 < factors[-1] < 0.03


def test_a_warm_up_longer_than_the_run_is_no_error():
    """The rate then only rises."""
    assert schedules.factor("cosine", 4, 5, 10) == 0.5
    assert math.isfinite(schedules.factor("cosine", 10, 10, 10))


# Accumulation


class Exact(ToyModel):
    """In float64 and with dropout keyed by sample, so that only counting errors are left."""

    def __init__(self):
        super().__init__()
        self.dropout = SampleDropout(0.3)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_one_micro_batch_of_8_is_eight_of_1(micro_batch, tmp_path):
    """The sum over the window divided by the window's count: how it is split shows in rounding only, dropout included."""
    tasks = [Toy(), Toy()]
    for task in tasks:
        task.model_kind = Exact
    run(tmp_path / "one", config(), task=tasks[0])
    run(tmp_path / "many", config({"micro_batch": micro_batch}), task=tasks[1])
    losses = [[line["loss"] for line in lines(tmp_path / home) if "loss" in line] for home in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert all(torch.allclose(one[name], many[name], atol=1e-4) for name in one if name != "seen")


class Named(Toy):
    """Two losses; the second has items in few samples, in some steps in none."""

    def counts(self, batch):
        return {"tokens": int((batch[:, 1:] >= 0).sum()), "rare": int((batch[:, 0] == 3).sum())}

    def loss(self, model, batch, ctx):
        losses, _ = super().loss(model, batch, ctx)
        rare = model(batch[:, :1].clamp(min=0))[batch[:, 0] == 3]
        return {**losses, "rare": (rare.square().sum(), 0.5)}, {"size": len(batch)}


def test_names_are_weighted_and_divided_each_by_its_own_count(tmp_path):
    """Also when a micro-batch, or the whole step, has no item of a name."""
    losses = []
    for micro_batch in (8, 1):
        task = Named()
        task.model_kind = Exact
        run(tmp_path / str(micro_batch), config({"micro_batch": micro_batch}), task=task)
        losses.append([line["loss"] for line in lines(tmp_path / str(micro_batch)) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert lines(tmp_path / "8")[0]["metrics"] == {"size": 8.0}


def test_the_loss_is_the_sum_over_names_of_weight_times_mean(tmp_path):
    """As one would compute it by hand for the whole batch; a name without items adds nothing."""
    losses = {"a": (torch.tensor(6.0), 1.0), "b": (torch.tensor(8.0, dtype=torch.bfloat16), 0.5), "c": (torch.tensor(0.0), 9.0)}
    assert weighted(losses, {"a": 3, "b": 2, "c": 0}).item() == 4.0
    with pytest.raises(TrainerdError, match="no loss"):
        weighted({}, {})


def test_a_loss_that_is_not_counted_is_an_error(tmp_path):
    """The message names it."""

    class Uncounted(Toy):
        def counts(self, batch):
            return {"words": 1}

    with pytest.raises(TrainerdError, match="'tokens', which counts"):
        run(tmp_path, config(), task=Uncounted())


def test_a_task_that_cannot_be_split_is_not_split(tmp_path):
    """A micro-batch smaller than the batch is refused for it."""

    class Whole(Toy):
        splittable = False

    with pytest.raises(ConfigError, match="cannot be split"):
        run(tmp_path, config({"micro_batch": 2}), task=Whole())


# Dropout keyed by sample


def _attached(p=0.3, seed=1, num_modules=1):
    ctx = TaskContext(torch.device("cpu"), torch.float32, seed, None, None)  # type: ignore[arg-type]
    modules = nn.ModuleList(SampleDropout(p) for _ in range(num_modules))
    dropout.attach(modules, ctx)
    return ctx, modules


def test_the_mask_depends_on_the_sample_and_on_nothing_else_of_the_batch():
    """Order, neighbours and padding do not matter; seed, epoch, module, sample, position and unit do."""
    ctx, (first, second) = _attached(num_modules=2)
    ctx.sample_ids = [5, 6, 7]
    whole = first(torch.ones(3, 9, 32))
    ctx.sample_ids = [7, 5]
    part = first(torch.ones(2, 4, 32))
    assert torch.equal(part[0], whole[2, :4]) and torch.equal(part[1], whole[0, :4])
    assert not torch.equal(second(torch.ones(2, 4, 32)), part)
    assert not torch.equal(part[0, 0], part[0, 1])
    ctx.epoch = 1
    assert not torch.equal(first(torch.ones(2, 4, 32)), part)


def test_gathered_rows_get_the_mask_of_their_place():
    """A model that computes only where there is a token draws the same as one that computes everywhere."""
    ctx, (module,) = _attached()
    ctx.sample_ids = [11, 12, 13]
    x = torch.ones(3, 6, 16)
    real = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    rows, positions = real.nonzero(as_tuple=True)
    assert torch.equal(module(x)[real], module(x[real], rows, positions))


def test_the_mask_is_fair():
    """The share that is dropped is p, for every unit and every row; neighbours are independent; the mean is kept."""
    for p in (0.1, 0.3, 0.8):
        ctx, (module,) = _attached(p)
        ctx.sample_ids = list(range(1000, 1512))
        kept = (module(torch.ones(512, 16, 64)) > 0).double()
        spread = math.sqrt(p * (1 - p))
        assert kept.mean().item() == pytest.approx(1 - p, abs=5 * spread / math.sqrt(kept.numel()))
        for dims, count in (((0, 1), 512 * 16), ((1, 2), 16 * 64), ((0, 2), 512 * 64)):
            assert (kept.mean(dims) - (1 - p)).abs().max() < 5.5 * spread / math.sqrt(count)
        centred = (kept - (1 - p)).flatten(0, 1) / spread
        between_units = (centred.T @ centred / len(centred))[~torch.eye(64).bool()] * math.sqrt(len(centred))
        assert between_units.abs().max() < 6 and between_units.std().item() == pytest.approx(1, abs=0.1)
    assert module(torch.ones(512, 16, 64)).mean().item() == pytest.approx(1, rel=0.05)


def test_sample_dropout_draws_from_no_random_state_and_lets_gradients_through():
    """Kept units get 1/(1-p), dropped ones nothing; the global state does not move; in eval mode nothing happens."""
    ctx, (module,) = _attached()
    ctx.sample_ids = [1, 2]
    before = torch.get_rng_state()
    x = torch.ones(2, 3, 8, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(before, torch.get_rng_state())
    assert module.eval()(x) is x


def test_units_that_are_known_are_numbered_before_the_first_step():
    """The mask is the same, and the step keeps nothing new; where they are not known, or others come, they are numbered then."""
    ctx, (module,) = _attached()
    known = SampleDropout(0.3, 8)
    dropout.attach(known, ctx)
    ctx.sample_ids = [3, 4]
    x = torch.ones(2, 5, 8)
    for one in (module, known):
        dropout.lay_out(one, x.device)
    laid_out = known._units
    assert module._units is None and torch.equal(module(x), known(x)) and known._units is laid_out
    assert known(torch.ones(2, 5, 6)).shape == (2, 5, 6) and known._units is not laid_out


def test_rows_without_a_sample_are_an_error():
    """A layout that cannot be keyed says what to pass."""
    ctx, (module,) = _attached()
    ctx.sample_ids = [1, 2]
    with pytest.raises(ValueError, match="pass `samples`"):
        module(torch.ones(5, 8))
    assert SampleDropout(0.5)(torch.ones(4, 4)).shape == (4, 4)  # not attached: plain dropout
    with pytest.raises(ValueError, match="below 1"):
        SampleDropout(1.0)


# Random states


def test_random_states_survive_a_checkpoint(tmp_path):
    """python, numpy and torch go on as if nothing had been; torch.load(weights_only=True) reads the document."""
    import random

    rng.seed(5)
    random.gauss(0, 1), np.random.normal()  # both keep a second number back
    torch.save(rng.to_document(rng.take()), tmp_path / "rng.pt")
    expected = random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(2)
    rng.seed(99)
    rng.put_back(rng.from_document(torch.load(tmp_path / "rng.pt", weights_only=True)))
    found = random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(2)
    assert found[:4] == expected[:4] and torch.equal(found[4], expected[4])


# Optimizers and precision


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "adafactor"])
def test_allocating_the_optimizers_state_changes_nothing(name):
    """Before the first step every state exists, every weight is as it was, and the first step is the usual one."""
    rng.seed(1)
    models = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    asked = TrainConfig(optimizer=name, lr=0.01, weight_decay=0.1, precision="fp32")
    built = optimizers.build(models[0], Toy(), asked)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert len(built.state) == 4
    bare = getattr(torch.optim, type(built).__name__)(_groups(models[1]), lr=0.01)
    for model, optimizer in zip(models, (built, bare), strict=True):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1 if group["params"][0].ndim == 2 else 0.0
            if name == "sgd":
                group["momentum"] = 0.9
        for _ in range(3):
            model(torch.ones(2, 4) * 2).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adafactor])
def test_an_optimizer_without_the_compiler_is_torchs_own(kind):
    """Bit for bit the same steps and state, its state loaded into the other kind included, under a name of its own."""
    results = []
    for made, other in ((kind, eager.plain(kind)), (eager.plain(kind), kind)):
        rng.seed(3)
        model, state = nn.Linear(5, 5), {}
        for part in (made, other):  # the second goes on from the first one's state
            optimizer = part(model.parameters(), lr=0.1)
            assert type(optimizer).__name__ == kind.__name__ and isinstance(optimizer, kind)
            if part is other:
                optimizer.load_state_dict(state)
            for _ in range(3):
                model(torch.rand(2, 5)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            state = optimizer.state_dict()
        results.append((model.weight.clone(), state))
    assert torch.equal(results[0][0], results[1][0]) and str(results[0][1]) == str(results[1][1])


def _groups(model):
    trainable = list(model.parameters())
    return [{"params": [p for p in trainable if p.ndim >= 2]}, {"params": [p for p in trainable if p.ndim < 2]}]


def test_biases_and_norms_do_not_decay():
    """Only matrices do."""
    built = optimizers.build(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), Toy(), TrainConfig(weight_decay=0.1))
    decay = {tuple(p.shape): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert decay == {(4, 4): 0.1, (4,): 0.0}


def test_a_task_may_bring_its_own_groups():
    """lr_scale multiplies the scheduled rate."""

    class Grouped(Toy):
        def parameter_groups(self, model):
            return [{"params": [model.weight], "lr_scale": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]

    built = optimizers.build(nn.Linear(2, 2), Grouped(), TrainConfig())
    optimizers.set_lr(built, 0.5)
    assert [group["lr"] for group in built.param_groups] == [0.05, 0.5]


def test_nothing_to_train_is_an_error():
    """A model that is frozen altogether."""
    with pytest.raises(TrainerdError, match="no trainable parameter"):
        optimizers.build(nn.Linear(2, 2).requires_grad_(False), Toy(), TrainConfig())


@pytest.mark.parametrize("capable", [True, False])
def test_auto_is_what_the_machine_computes_natively(capable, monkeypatch):
    """bf16 where the processor has it, fp32 where not; and a slow choice is named."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable, "amx_bf16": False, "avx512_fp16": False})
    device = torch.device("cpu")
    assert precision.resolve("auto", device) == ("bf16" if capable else "fp32")
    assert precision.resolve("fp16", device) == "fp16"
    assert (precision.slow_here("bf16", device) is None) == capable
    assert "no fp16" in precision.slow_here("fp16", device)
    assert precision.slow_here("fp32", device) is None
    monkeypatch.setattr(cpu, "computes", lambda name: capable if name == "bf16" else False)
    for name in ("bf16", "fp16", "fp32", "auto"):
        assert cpu.slow(name) == (None if name == "auto" else precision.slow_here(name, device)), "plan says it in other words"


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_the_client_says_no_other_than_torch_of_this_processor(name):
    """Where the system tells, without torch, what the processor computes, it is what torch finds in it."""
    told = name != "fp32" and cpu.computes(name) is not None
    assert cpu.slow(name) == (precision.slow_here(name, torch.device("cpu")) if told else None)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_weights_and_gradients_stay_in_float32(name, tmp_path):
    """Only the arithmetic is in half precision."""
    seen = set()

    class Looks(Toy):
        def loss(self, model, batch, ctx):
            assert ctx.dtype != torch.float32
            seen.update(p.grad.dtype for p in model.parameters() if p.grad is not None)
            seen.update(p.dtype for p in model.parameters())
            return super().loss(model, batch, ctx)

    run(tmp_path, config({"precision": name, "epochs": 1, "micro_batch": 2}), Script(), Looks())
    assert seen == {torch.float32}


def test_an_overflow_under_fp16_skips_the_step_and_halves_the_scale(tmp_path):
    """The first scale is too large for the toy's gradients: some steps are skipped, the run learns all the same."""
    run(tmp_path, config({"precision": "fp16", "epochs": 6}))
    found = [line for line in lines(tmp_path) if "loss" in line]
    assert found[-1]["loss"] < found[0]["loss"]


def test_the_base_of_every_task_asks_for_what_it_needs():
    """What must be written says so."""
    task = Task()
    for call in (task.model, lambda: task.dataset("train"), lambda: task.counts(None), lambda: task.loss(None, None, None)):
        with pytest.raises(NotImplementedError):
            call()
