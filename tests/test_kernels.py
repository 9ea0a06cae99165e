"""Attention's kernel, torch.compile and fused optimizers: what was asked for is what computes, or it is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_checkpointing import BlockyToy, _Operations
from tests.toy import LEAVE, Script, Toy, config, lines, run, weights
from trainerd.config.model import RunConfig
from trainerd.contract.errors import ConfigError
from trainerd.engine import attention, compiling, optimizers
from trainerd.memory import forecast
from trainerd.tasks.cadence.blocks import table
from trainerd.tasks.cadence.settings import CadenceSettings

CPU = torch.device("cpu")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Counting(BlockyToy):
    """Counts the operations of its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = _Operations()

    def loss(self, model: nn.Module, batch: Any, ctx: Any) -> Any:
        with self.operations:
            return super().loss(model, batch, ctx)


def test_the_kernel_that_was_asked_for_computes(tmp_path: Path) -> None:
    """flash and math do what they say, give the same within rounding, and are kept by a resume; auto is the fastest that can."""
    found = {}
    for name in ("auto", "flash", "math"):
        task = Counting()
        asked = config({"max_steps": 4, "attention": name})
        run(tmp_path / name, asked, Script({3: LEAVE}), task)
        link = Script()
        run(tmp_path / name, asked, link, task)
        assert link.of("plan")[0]["record"]["attention"] == name
        assert (task.operations.counts[FLASH] > 0) is (name != "math") and (task.operations.counts["bmm"] > 0) is (name == "math")
        found[name] = [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
    assert found["auto"] == found["flash"] == pytest.approx(found["math"], rel=1e-5)
    assert attention.chosen(CPU, torch.float32) == "flash"


def test_a_kernel_that_cannot_is_refused(tmp_path: Path) -> None:
    """Another one is never taken silently: neither where the device has no such kernel, nor where the model's shapes forbid it."""
    with pytest.raises(ConfigError, match="attention is efficient, but torch has no such kernel on cpu for float32") as raised:
        run(tmp_path / "efficient", config({"attention": "efficient"}))
    assert raised.value.exit_code == 2
    with pytest.raises(ConfigError, match="cannot compute this model's attention"), attention.kernel("flash", CPU, torch.float32):
        raise RuntimeError("No available kernel. Aborting execution.")
    with pytest.raises(RuntimeError, match="another"), attention.kernel("flash", CPU, torch.float32):
        raise RuntimeError("another")
    assert attention.chosen(CPU, torch.float32) == "flash"


def test_a_compiled_training_says_that_no_estimate_covers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is compiled, the warning is given, weights keep their names; a resume keeps it, and says that last bits may differ."""
    monkeypatch.setattr(compiling, "_BACKEND", "eager")
    asked, link = config({"max_steps": 5, "compile": True}), Script({4: LEAVE})
    run(tmp_path / "compiled", asked, link)
    assert link.of("plan")[0]["record"]["compile"] is True
    assert any("not in the memory estimate" in event["text"] for event in link.of("warning"))
    again = Script()
    run(tmp_path / "compiled", config({"max_steps": 5}), again)
    assert again.of("plan")[0]["record"]["compile"] is True and "torch.compile" in str(again.of("exact"))
    run(tmp_path / "plain", config({"max_steps": 5}))
    one, other = weights(tmp_path / "compiled"), weights(tmp_path / "plain")
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)


def test_plan_says_that_a_compiled_training_is_not_covered() -> None:
    """Among what is assumed; and nothing is computed again beside it."""
    asked = RunConfig.model_validate({"task": "cadence", "train": {"compile": True, "batch_size": 64}, "settings": {"model": "gru-mn"}})
    mn = table(CadenceSettings.model_validate(asked.settings))
    answer = forecast.answer(asked, forecast.Place("cuda", 10**9, "bf16"), mn)
    assert any("torch.compile" in words for words in answer.estimate.assumed) and answer.setup.checkpointing == "none"
    plain = forecast.answer(RunConfig(task="cadence"), forecast.Place("cuda", 10**10, "bf16"), mn)
    assert not any("torch.compile" in words for words in plain.estimate.assumed)


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, with what is missing; and not together with blocks that are computed again."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler on this machine") as raised:
        run(tmp_path / "none", config({"compile": True}))
    assert raised.value.exit_code == 2
    with pytest.raises(ConfigError, match="computed again"):
        run(tmp_path / "both", config({"compile": True, "activation_checkpointing": "full"}), task=BlockyToy())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a C++ compiler on a busy machine
@pytest.mark.filterwarnings("ignore")  # torch itself warns while it compiles
def test_compiled_by_inductor_it_learns_the_same(tmp_path: Path) -> None:
    """With torch's real compiler, where there is one: the losses of an ordinary run within rounding."""
    if compiling.what_is_missing(CPU) is not None:
        pytest.skip("there is no C++ compiler")
    for name, on in (("compiled", True), ("plain", False)):
        run(tmp_path / name, config({"max_steps": 4, "compile": on}), task=BlockyToy())
    found = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("compiled", "plain")]
    assert found[0] == pytest.approx(found[1], rel=0.05)  # inductor draws nn.Dropout's masks in its own way


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_an_optimizer_is_fused(name: str) -> None:
    """One kernel per step, without the copies of the weights that torch's default makes on a GPU; the plan says so."""
    made = optimizers.build(nn.Linear(4, 4), Toy(), config({"optimizer": name}).train)
    assert all(group["fused"] is True for group in made.param_groups) and optimizers.kernel(made) == f"{name} (fused)"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("name", ["flash", "efficient", "math"])
def test_every_kernel_is_there_on_a_gpu(name: str) -> None:
    """In bfloat16 each is what computes; flash has no float32, and that is said."""
    gpu = torch.device("cuda")
    with attention.kernel(name, gpu, torch.bfloat16):
        assert attention.chosen(gpu, torch.bfloat16) == name
    if name == "flash":
        with pytest.raises(ConfigError, match="no such kernel on cuda for float32"), attention.kernel(name, gpu, torch.float32):
            pass
