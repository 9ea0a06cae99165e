"""8-bit AdamW: it resumes to the last bit, its loss stays near AdamW's, and what a machine cannot compute is refused in words."""

import warnings

import pytest
import torch
from torch import nn

from tests.toy import LEAVE, Script, Toy, config, lines, run, same
from trainerd.contract.errors import ConfigError, TrainerdError
from trainerd.engine import optimizers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from trainerd.engine import eightbit

_WIDTH = 96
_GAP = 0.003  # of AdamW's loss, at any step; measured with four seeds: 0.0007 to 0.0009


class _Wide(nn.Module):
    """Matrices of more than 4,096 numbers, which are kept in 8 bits, and smaller ones, which are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, _WIDTH)
        self.mix = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(_WIDTH, _WIDTH))
        self.out = nn.Linear(_WIDTH, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.out(x + self.mix(x))


class _Task(Toy):
    model_kind = _Wide


def _asked(name="adamw8bit", **train):
    return config({"optimizer": name, "lr": 0.003, **train})


@pytest.mark.parametrize("more", [{}, {"precision": "fp16", "micro_batch": 4}])
def test_it_resumes_to_the_last_bit(more, tmp_path):
    """Through our checkpoints, which hold only tensors and plain values: left early or late, nothing differs."""
    asked, whole = _asked(**more), Script()
    assert run(tmp_path / "whole", asked, whole, _Task()).outcome == "finished"
    assert whole.of("plan")[-1]["optimizer"] == "adamw8bit"
    for look in (3, whole.looks // 2):
        home = tmp_path / f"left-{look}"
        assert run(home, asked, Script({look: LEAVE}), _Task()).outcome == "left"
        assert run(home, asked, task=_Task()).outcome == "finished"
        assert same(tmp_path / "whole", home)


def test_its_loss_stays_near_that_of_adamw(tmp_path):
    """The same run with both: at no step do the losses differ by more than 0.3 %."""
    curves = []
    for name in ("adamw", "adamw8bit"):
        run(tmp_path / name, _asked(name, epochs=12, lr=0.0003), task=_Task())
        curves.append([line["loss"] for line in lines(tmp_path / name) if "loss" in line])
    exact, eight_bit = curves
    assert exact[-1] < exact[0] * 0.6, "it must have learned something, or there is nothing to compare"
    assert exact != eight_bit, "one of them was not 8-bit"
    assert max(abs(a - b) / a for a, b in zip(exact, eight_bit, strict=True)) <= _GAP


def test_a_state_is_put_back_into_the_memory_it_has():
    """Paged memory must stay paged: no tensor of the state is replaced by another, and the values are those saved."""
    one, other = (_filled(seed) for seed in (1, 2))
    before = {id(t) for state in other.state.values() for t in state.values() if isinstance(t, torch.Tensor)}
    other.load_state_dict(one.state_dict())
    after = [t for state in other.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert {id(t) for t in after} == before
    for a, b in zip(one.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def _filled(seed):
    torch.manual_seed(seed)
    learned = [nn.Parameter(torch.randn(80, 80)), nn.Parameter(torch.randn(80))]
    made = eightbit.make("adamw8bit", [{"params": learned}], 1e-3, 0.01)
    for _ in range(seed):
        for p in learned:
            p.grad = torch.randn_like(p)
        made.step()
    return made


def test_a_state_of_another_form_is_refused_in_words():
    """Of other weights, or written by a version of bitsandbytes that kept it differently."""
    made = _filled(1)
    for spoil in (_without_a_tensor, _of_another_shape, _of_another_model):
        with pytest.raises(TrainerdError, match=r"does not fit.*bitsandbytes"):
            made.load_state_dict(spoil(_filled(1).state_dict()))


def _without_a_tensor(saved):
    eightbit._flat(saved["state"][0])
    saved["state"][0] = {"step": 1}
    return saved


def _of_another_shape(saved):
    saved["state"][0] = {**eightbit._flat(saved["state"][0]), "state1": torch.zeros(3, dtype=torch.uint8)}
    return saved


def _of_another_model(saved):
    saved["param_groups"][0]["params"] = [0]
    return saved


def test_a_step_that_failed_half_way_is_noticed(tmp_path, monkeypatch):
    """Its kernels change weights behind torch's back; that a step has begun is known from its counters, and it is not done twice."""
    original, calls = eightbit.EightBit.update_step, []

    def update_step(self, group, parameter, *where):
        calls.append(where)
        if len(calls) != 22:  # the first of seven weights in the fourth step
            return original(self, group, parameter, *where)
        self.state[parameter]["step"] += 1
        parameter.data.mul_(0.5)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run(tmp_path / "ample", _asked(), task=_Task())
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(eightbit.EightBit, "update_step", update_step)
        run(tmp_path / "tight", _asked(), task=_Task())
    run(tmp_path / "tight", _asked(), task=_Task())
    assert same(tmp_path / "ample", tmp_path / "tight")


def test_paging_needs_a_gpu():
    """On a CPU bitsandbytes would quietly do without; here that is an error, with what to set instead."""
    model = _Wide()
    with pytest.raises(ConfigError, match=r"paged_adamw8bit: needs an NVIDIA GPU.*train\.optimizer=adamw8bit"):
        optimizers.build(model, _Task(), _asked("paged_adamw8bit").train)


@pytest.mark.parametrize("how", ["raises", "does nothing"])
def test_a_bitsandbytes_that_cannot_is_refused_before_the_first_step(how, monkeypatch):
    """A version without a kernel for this device, or whose kernel does nothing, is found out by a step of its own."""

    def step(self, closure=None):
        if how == "raises":
            raise NotImplementedError("Could not run 'bitsandbytes::optimizer_update_8bit_blockwise' on the 'CPU' backend")

    monkeypatch.setattr(eightbit.AdamW8bit, "step", step)
    with pytest.raises(ConfigError, match=r"cannot compute it on this CPU \(.+\)\. Update bitsandbytes"):
        optimizers.build(_Wide(), _Task(), _asked().train)


def test_windows_is_told_that_paging_saves_nothing(monkeypatch):
    """No prefetch and no more memory than the GPU has; elsewhere, and without paging, nothing is said."""
    monkeypatch.setattr(eightbit.sys, "platform", "win32")
    assert "saves nothing" in (optimizers.warning(_asked("paged_adamw8bit").train) or "")
    assert optimizers.warning(_asked().train) is None
    monkeypatch.setattr(eightbit.sys, "platform", "linux")
    assert optimizers.warning(_asked("paged_adamw8bit").train) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw8bit"])
def test_it_resumes_to_the_last_bit_on_a_gpu(name, tmp_path):
    """As on a CPU; a paged state is paged after the resume as well."""
    asked, whole = _asked(name, precision="bf16"), Script()
    run(tmp_path / "whole", asked, whole, _Task())
    assert run(tmp_path / "left", asked, Script({whole.looks // 2: LEAVE}), _Task()).outcome == "left"
    assert run(tmp_path / "left", asked, task=_Task()).outcome == "finished"
    assert same(tmp_path / "whole", tmp_path / "left")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
def test_a_paged_state_stays_paged():
    """Large states lie in managed memory before and after a state is put back."""
    learned = [nn.Parameter(torch.randn(400, 400, device="cuda"))]
    made = eightbit.make("paged_adamw8bit", [{"params": learned}], 1e-3, 0.01)
    learned[0].grad = torch.randn_like(learned[0])
    made.step()
    made.load_state_dict(made.state_dict())
    assert all(getattr(made.state[learned[0]][name], "is_paged", False) for name in ("state1", "state2"))
