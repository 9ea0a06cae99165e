"""The optimizer on the CPU: a run is the same to the last bit, the device keeps no gradient, and a failure leaves no trace."""

import pytest
import torch
from torch import nn

from tests.toy import LEAVE, Script, Toy, config, run, same, weights
from trainerd.contract.errors import ConfigError
from trainerd.engine import eager, lanes, optimizers
from trainerd.engine.offload import Offload

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
VARIANTS = {
    "plain": {},
    "accumulated": {"micro_batch": 3, "eval_every_steps": 4},
    "clipped hard": {"micro_batch": 2, "max_grad_norm": 0.05},
    "not clipped": {"optimizer": "sgd", "max_grad_norm": None},
    "fp16": {"precision": "fp16", "micro_batch": 4},
    "bf16": {"precision": "bf16"},
    "adam": {"optimizer": "adam"},
    "adafactor": {"optimizer": "adafactor"},
}
ON_CPU = {"offload": "optimizer"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_the_same_to_the_last_bit(variant, tmp_path):
    """Where the device is the CPU itself: every loss, every norm and every weight, whatever accumulates, clips or scales."""
    run(tmp_path / "plain", config(VARIANTS[variant]))
    link = Script()
    run(tmp_path / "offloaded", config(VARIANTS[variant], memory=ON_CPU), link)
    assert link.of("plan")[-1]["offload"] == "optimizer"
    assert same(tmp_path / "plain", tmp_path / "offloaded")


@pytest.mark.parametrize("first", [None, "optimizer"])
def test_it_may_come_and_go_when_a_run_is_resumed(first, tmp_path):
    """A state has the same form with and without: left with one and gone on with the other, nothing differs."""
    asked = {name: config({"micro_batch": 3}, memory={"offload": name}) for name in ("none", "optimizer")}
    run(tmp_path / "whole", asked["none"])
    one, other = ("optimizer", "none") if first else ("none", "optimizer")
    assert run(tmp_path / "parts", asked[one], Script({9: LEAVE})).outcome == "left"
    link = Script()
    assert run(tmp_path / "parts", asked[other], link).outcome == "finished"
    assert link.of("plan")[0]["offload"] == other
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_step_of_no_finite_number_changes_nothing(tmp_path):
    """It is left out with the optimizer on the CPU as well, running statistics and all."""

    class Infinite(Toy):
        def loss(self, model, batch, ctx):
            losses, metrics = super().loss(model, batch, ctx)
            factor = float("inf") if ctx.training and ctx.step == 4 else 1.0
            return {name: (value * factor, weight) for name, (value, weight) in losses.items()}, metrics

    for name in ("none", "optimizer"):
        run(tmp_path / name, config(faults={"nan_steps": 2}, memory={"offload": name}), task=Infinite())
    assert same(tmp_path / "none", tmp_path / "optimizer")


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_out_of_memory_leaves_no_trace(where, part, tmp_path):
    """In the first or the second micro-batch, before or while gradients leave: the retried run is the one without offload."""

    class Once(Toy):
        parts = 0

        def loss(self, model, batch, ctx):
            losses, metrics = super().loss(model, batch, ctx)
            self.parts += ctx.training and ctx.step == 4
            if self.parts != part:
                return losses, metrics
            self.parts = 9
            if where == "forward":
                raise OOM
            model.mix.bias.register_hook(self._fail)  # the output's weight has its gradient by then
            return losses, metrics

        def _fail(self, gradient):
            if self.parts == 9:
                self.parts = 10
                raise OOM
            return gradient

    for name in ("none", "optimizer"):
        run(tmp_path / name, config({"micro_batch": 4}, memory={"offload": name}), task=Once())
    assert same(tmp_path / "none", tmp_path / "optimizer")


def test_an_optimizer_that_failed_half_way_is_not_retried(tmp_path, monkeypatch):
    """Its masters have changed and the weights have not: only a checkpoint helps, and a restart begins from there."""
    original, calls = eager.plain(torch.optim.AdamW).step, []

    def step(self, closure=None):
        calls.append(1)
        result = original(self, closure)
        if len(calls) == 6:
            raise OOM
        return result

    asked = config(memory=ON_CPU)
    run(tmp_path / "ample", asked)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(eager.plain(torch.optim.AdamW), "step", step)
        run(tmp_path / "tight", asked)
    run(tmp_path / "tight", asked)
    assert same(tmp_path / "ample", tmp_path / "tight")


def test_weights_that_a_task_changes_itself_stay_changed(tmp_path):
    """The master does not overwrite what somebody else has written into a weight."""

    class Clips(Toy):
        def loss(self, model, batch, ctx):
            with torch.no_grad():
                model.mix.weight.clamp_(-0.1, 0.1)
            return super().loss(model, batch, ctx)

    for name in ("none", "optimizer"):
        run(tmp_path / name, config(memory={"offload": name}), task=Clips())
    assert same(tmp_path / "none", tmp_path / "optimizer")


def test_an_eight_bit_state_is_not_moved():
    """It is small already, and its kernels belong to the device: refused, with what to choose."""
    asked = config({"optimizer": "adamw8bit"}, memory=ON_CPU)
    with pytest.raises(ConfigError, match=r"memory\.offload = optimizer.*adamw8bit.*choose one"):
        optimizers.build_on_host(nn.Linear(4, 4), Toy(), asked.train, torch.device("cpu"))


class _Late(lanes.QueuedLane):
    """A lane whose copies happen when they are waited for and not before, as the slowest of buses."""

    def __init__(self, largest_bytes):
        self.copied = 0
        super().__init__(largest_bytes)

    def _copy(self, target, source):
        target.fill_(float("nan")) if target.is_floating_point() else None
        kept = source.clone()
        source.fill_(7.0)  # whoever uses the memory of a gradient again must not change what arrives

        def wait():
            self.copied += 1
            target.copy_(kept)

        return wait


class _Early(lanes.QueuedLane):
    """A lane whose copies are there at once and only settled later, as a bus that was quicker than we looked."""

    def _copy(self, target, source):
        target.copy_(source)
        return lambda: None


def _late(model, kind=_Late):
    lane = kind(max(p.numel() * p.element_size() for p in model.parameters()))
    return lane, Offload(model.parameters(), lane)


def _model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))


def _gradients(model, parts):
    for part in parts:
        model(part).square().sum().backward()
    return [p.grad for p in model.parameters()]


def test_gradients_that_arrive_late_are_added_up_all_the_same():
    """Three micro-batches over a lane that copies as late as it may, with two landings for six weights: the sums are those of
    torch, to the bit; and at no time does the device keep a gradient."""
    parts = [torch.randn(4, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    expected = _gradients(_model(), parts)
    model = _model()
    lane, offload = _late(model)
    assert _gradients(model, parts) == [None] * 6
    offload.arrive()
    assert lane.copied == 18
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(offload.master(p).grad, gradient)


@pytest.mark.parametrize("kind", [_Late, _Early])
def test_a_step_that_is_broken_off_is_forgotten_on_the_way_too(kind):
    """Gradients still under way are not added to those of the next try."""
    parts = [torch.randn(4, 5, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    expected = _gradients(_model(), parts[:1])
    model = _model()
    _, offload = _late(model, kind)
    _gradients(model, [parts[1], parts[1]])
    offload.forget()
    _gradients(model, parts[:1])
    offload.arrive()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(offload.master(p).grad, gradient)


def test_closed_it_leaves_the_weights_to_themselves():
    """A library user may train the same model again without."""
    model = _model()
    _, offload = _late(model)
    offload.close()
    assert all(gradient is not None for gradient in _gradients(model, [torch.ones(2, 5)]))


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("more", [{"micro_batch": 3}, {"precision": "bf16"}, {"precision": "fp16", "micro_batch": 4}])
def test_on_a_gpu_it_is_the_same_run_within_rounding(more, tmp_path):
    """A CPU's AdamW rounds differently than a GPU's: after 21 steps the weights agree to 1e-4; and it resumes to the last bit."""
    run(tmp_path / "plain", config(more))
    run(tmp_path / "offloaded", config(more, memory=ON_CPU))
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "offloaded")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one if name != "seen")
    assert run(tmp_path / "left", config(more, memory=ON_CPU), Script({9: LEAVE})).outcome == "left"
    run(tmp_path / "left", config(more, memory=ON_CPU))
    assert same(tmp_path / "offloaded", tmp_path / "left")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
def test_on_a_gpu_only_the_weights_stay():
    """Between two micro-batches the device holds the weights and nothing of gradients or states; the host memory is pinned."""
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)]).cuda()
    held = torch.cuda.memory_allocated()
    offload = Offload(model.parameters(), lanes.lane_of(torch.device("cuda"), 4 << 20))
    for _ in range(2):
        model(torch.ones(1, 1024, device="cuda")).sum().backward()
    offload.arrive()
    torch.cuda.synchronize()
    assert offload.is_pinned and torch.cuda.memory_allocated() - held < 24 << 20
    assert all(torch.isfinite(offload.master(p).grad).all() for p in model.parameters())
    offload.close()
