"""Out of memory costs no step."""

import pytest
import torch

from tests.toy import LEAVE, Script, Toy, ToyModel, config, lines, run, same, weights
from trainerd.engine import eager
from trainerd.engine.guard import is_out_of_memory

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError(),
    "linux": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    "windows": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


class _Fails(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ERRORS["cuda"]


class Hungry(Toy):
    """Runs out of memory at chosen steps, in the forward or the backward pass, while its micro-batch is above `fits`."""

    def __init__(self, where: str, fits: int, at=(4,), error=ERRORS["cuda"]):
        super().__init__()
        self.where, self.fits, self.at, self.error = where, fits, at, error
        self.sizes: list[int] = []

    def loss(self, model, batch, ctx):
        losses, metrics = super().loss(model, batch, ctx)
        if ctx.training and ctx.step in self.at:
            self.sizes.append(len(batch))
            if len(batch) > self.fits:
                if self.where == "forward":
                    raise self.error
                losses = {name: (_Fails.apply(value), weight) for name, (value, weight) in losses.items()}
        return losses, metrics


def _plain_losses(home):
    return [line["loss"] for line in lines(home) if "loss" in line]


@pytest.mark.parametrize("name", ERRORS)
def test_every_way_an_allocator_says_no_is_known(name):
    """On a GPU, on Linux, on Windows, from Python: each is an out-of-memory; another error is not."""
    assert is_out_of_memory(ERRORS[name])
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_out_of_memory_step_is_retried_in_smaller_parts(where, precision, tmp_path):
    """The same samples, half the micro-batch until it fits; every step is there, and the run goes on in that size."""
    asked = config({"precision": precision, "lr": 0.001})
    run(tmp_path / "ample", asked)
    task, link = Hungry(where, fits=2), Script()
    assert run(tmp_path / "tight", asked, link, task).outcome == "finished"
    assert task.sizes == [8, 4, 2, 2, 2, 2]
    losses = _plain_losses(tmp_path / "ample"), _plain_losses(tmp_path / "tight")
    assert losses[0][:4] == losses[1][:4] and len(losses[0]) == len(losses[1])
    assert losses[0] == pytest.approx(losses[1], rel=0.2)  # nn.Dropout draws anew for each part
    assert link.of("exact")[-1]["since_step"] == 5
    assert "the micro-batch is now 4" in link.of("exact")[-1]["because"]
    assert [e["micro_batch"] for e in link.of("plan")] == [8, 4, 2]
    assert len([e for e in link.of("note") if e["kind"] == "out_of_memory"]) == 2
    assert link.of("memory")[-1]["oom_recoveries"] == 2


class _WithoutDropout(ToyModel):
    def __init__(self):
        super().__init__()
        self.dropout.p = 0.0


def test_only_the_last_bits_know_of_an_out_of_memory(tmp_path):
    """Without random draws the retried run has the weights of the other one, up to rounding: nothing was counted twice."""
    calm, hungry = Toy(), Hungry("backward", fits=3)
    calm.model_kind = hungry.model_kind = _WithoutDropout
    run(tmp_path / "ample", config(), task=calm)
    run(tmp_path / "tight", config(), task=hungry)
    one, other = weights(tmp_path / "ample"), weights(tmp_path / "tight")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one if name != "seen")


def test_a_failed_window_leaves_no_trace(tmp_path):
    """Gradients, running statistics and random states are as before: a retry that need not split is the same run to the bit."""

    class Once(Toy):
        splittable = False
        failed = False

        def loss(self, model, batch, ctx):
            result = super().loss(model, batch, ctx)
            if ctx.training and ctx.step == 4 and not self.failed:
                self.failed = True
                raise ERRORS["cuda"]
            return result

    class Calm(Toy):
        splittable = False

    run(tmp_path / "ample", config(), task=Calm())
    task = Once()
    run(tmp_path / "tight", config(), task=task)
    assert task.failed and same(tmp_path / "ample", tmp_path / "tight")


def test_gradients_of_a_broken_window_are_not_counted_twice(tmp_path):
    """The first part went through its backward pass, the second did not fit: both are computed anew."""

    class Second(Toy):
        model_kind = _WithoutDropout
        parts = 0

        def loss(self, model, batch, ctx):
            self.parts += ctx.training and ctx.step == 4
            if self.parts == 2:
                self.parts = 3
                raise ERRORS["cuda"]
            return super().loss(model, batch, ctx)

    calm, task = Toy(), Second()
    calm.model_kind = _WithoutDropout
    run(tmp_path / "ample", config({"optimizer": "sgd", "lr": 1.0}), task=calm)
    run(tmp_path / "tight", config({"optimizer": "sgd", "lr": 1.0, "micro_batch": 4}), task=task)
    one, other = weights(tmp_path / "ample"), weights(tmp_path / "tight")
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one if name != "seen")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_optimizer_may_run_out_of_memory_too(precision, tmp_path, monkeypatch):
    """Before it has changed a weight the step is tried again; the run loses nothing, and the scaler is not confused."""
    original, calls = eager.plain(torch.optim.AdamW).step, []

    def step(self, closure=None):
        calls.append(1)
        if len(calls) == 6:
            raise ERRORS["cuda"]
        return original(self, closure)

    run(tmp_path / "ample", config())
    monkeypatch.setattr(eager.plain(torch.optim.AdamW), "step", step)
    link = Script()
    assert run(tmp_path / "tight", config({"precision": precision}), link).outcome == "finished"
    assert len(_plain_losses(tmp_path / "ample")) == len(_plain_losses(tmp_path / "tight"))
    assert link.of("memory")[-1]["oom_recoveries"] == 1


def test_an_optimizer_that_failed_half_way_is_not_retried(tmp_path, monkeypatch):
    """Once a weight has changed only a checkpoint is safe: the error is raised, and a restart begins from there."""
    original, calls = eager.plain(torch.optim.AdamW).step, []

    def step(self, closure=None):
        calls.append(1)
        result = original(self, closure)
        if len(calls) == 6:
            raise ERRORS["cuda"]
        return result

    run(tmp_path / "ample", config())
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(eager.plain(torch.optim.AdamW), "step", step)
        run(tmp_path / "tight", config())
    run(tmp_path / "tight", config())
    assert same(tmp_path / "ample", tmp_path / "tight")


def test_one_sample_that_does_not_fit_is_an_error(tmp_path):
    """When nothing is left to halve, the error says what happened, after one more try."""
    task = Hungry("forward", fits=0)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, config(), task=task)
    assert task.sizes == [8, 4, 2, 1, 1]


def test_other_errors_are_not_taken_for_out_of_memory(tmp_path):
    """A mistake in a task is raised as it is, at once."""
    task = Hungry("forward", fits=0, error=RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(tmp_path, config(), task=task)
    assert task.sizes == [8]


def test_the_smaller_micro_batch_survives_a_resume(tmp_path):
    """What was learned about the memory is in the checkpoint, and so is since when the run is not exact."""
    run(tmp_path, config(), Script({9: LEAVE}), Hungry("forward", fits=4))
    link = Script()
    run(tmp_path, config(), link)
    assert link.of("plan")[0]["micro_batch"] == 4
    assert link.of("exact")[0] == {"event": "exact", "now": False, "since_step": 5, "because": "out of memory; the micro-batch is now 4"}


def test_workers_follow_a_smaller_micro_batch(tmp_path):
    """What the loader's workers had prefetched in the old size is thrown away, and no sample is lost or doubled."""
    task, inline = Hungry("forward", fits=2), Hungry("forward", fits=2)
    run(tmp_path / "workers", config({"num_workers": 1}), task=task)
    run(tmp_path / "inline", config(), task=inline)
    assert task.sizes == inline.sizes
    assert same(tmp_path / "workers", tmp_path / "inline")


def test_an_evaluation_may_run_out_of_memory(tmp_path):
    """It is done again in smaller parts, and said."""

    class HungryEvaluation(Toy):
        def loss(self, model, batch, ctx):
            if not ctx.training and len(batch) > 4:
                raise ERRORS["linux"]
            return super().loss(model, batch, ctx)

    link = Script()
    assert run(tmp_path, config(), link, HungryEvaluation()).outcome == "finished"
    assert "in an evaluation" in link.of("exact")[-1]["because"]
