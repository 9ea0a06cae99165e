"""Activation checkpointing: the same run to the byte in every mode, less memory, and nothing computed again that is dear."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.memory_oracle import TensorCount
from tests.toy import LEAVE, Script, Toy, config, lines, run, same
from trainerd.contract.errors import ConfigError
from trainerd.engine import checkpointing
from trainerd.engine.checkpointing import FULL, NONE, SELECTIVE
from trainerd.engine.dropout import SampleDropout

WIDTH = 16


class Block(nn.Module):
    """Whatever may go wrong: both dropouts, running statistics of its own, one of which it computes with, and batch norm's, a GRU that
    works in place, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gru, self.norm = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.BatchNorm1d(WIDTH)
        self.global_drop, self.drop = nn.Dropout(0.2), SampleDropout(0.2)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.calls = 0

    def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        self.calls += 1
        self.seen += 1
        self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        x = x * (1 + self.mean)
        q, k, v = (t.unsqueeze(1) for t in self.inner(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        x = x + self.drop(torch.tanh(self.outer(mixed))) * scale
        x = x + self.global_drop(self.gru(x)[0])
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Blocky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.out(x)


class BlockyToy(Toy):
    model_kind = Blocky

    def blocks(self, model: nn.Module) -> Any:
        return list(model.blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_mode_is_the_same_run(precision: str, tmp_path: Path) -> None:
    """Losses, gradients' norms, weights, running statistics and what is drawn later: to the byte, over micro-batches and a resume."""
    asked = {"precision": precision, "micro_batch": 3, "epochs": 1, "eval_every_steps": 4}
    for mode in (NONE, SELECTIVE, FULL):
        link = Script({4: LEAVE}) if mode == FULL else Script()
        chosen = config({**asked, "activation_checkpointing": mode})
        run(tmp_path / mode, chosen, link, BlockyToy())
        if mode == FULL:
            again = Script()
            run(tmp_path / mode, chosen, again, BlockyToy())
            link = again
        assert link.of("plan")[0]["activation_checkpointing"] == mode
    assert len([line for line in lines(tmp_path / NONE) if "loss" in line]) == 7
    assert same(tmp_path / NONE, tmp_path / FULL) and same(tmp_path / NONE, tmp_path / SELECTIVE)


def learned(mode: str) -> tuple[Blocky, torch.Tensor]:
    torch.manual_seed(0)
    model = Blocky().train()
    checkpointing.wrap(model, list(model.blocks), mode)
    return model, torch.arange(12).view(4, 3)


class _Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_selective_computes_nothing_dear_again() -> None:
    """No attention and no product of a linear layer a second time, but for those that the GRU has changed in place; full, all of them."""
    found = {}
    for mode in (NONE, SELECTIVE, FULL):
        model, tokens = learned(mode)
        with _Operations() as operations:
            model(tokens).sum().backward()
        found[mode] = operations.counts
        assert [block.calls for block in model.blocks] == ([1, 1] if mode == NONE else [2, 2])  # type: ignore[comparison-overlap]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert found[NONE][attention] == found[SELECTIVE][attention] == 2 and found[FULL][attention] == 4
    assert found[NONE]["addmm"] < found[SELECTIVE]["addmm"] < found[FULL]["addmm"]
    assert found[SELECTIVE]["tanh"] > found[NONE]["tanh"]


def test_less_is_held(tmp_path: Path) -> None:
    """Every tensor counted: full below selective below none."""
    peaks = {}
    for mode in (NONE, SELECTIVE, FULL):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Tanh(), nn.Linear(256, 64)) for _ in range(4)))
        checkpointing.wrap(model, list(model), mode)
        x = torch.randn(512, 64)
        with TensorCount([*model.parameters(), x]) as count:
            model(x).sum().backward()
        peaks[mode] = count.peak - count.known
    assert peaks[FULL] < 0.6 * peaks[NONE] and peaks[FULL] < peaks[SELECTIVE] < 0.85 * peaks[NONE]


def test_a_result_that_is_changed_in_place_later_is_computed_again() -> None:
    """What a selective checkpoint has kept and somebody overwrote afterwards is not believed."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.linear(x)
            return y, torch.sin(y)

    found = []
    for mode in (NONE, SELECTIVE):
        torch.manual_seed(0)
        model = Linear()
        checkpointing.wrap(model, [model], mode)
        y, wave = model(torch.ones(2, 4))
        if mode == SELECTIVE:
            with torch.no_grad():
                y.add_(5.0)
        wave.sum().backward()
        found.append(model.linear.weight.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]


def test_what_is_written_into_a_buffer_is_not_kept() -> None:
    """A product with out= gives a part of somebody's buffer, which is not held until the way back; the gradient is the same."""

    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            made = x.new_full((64, *x.shape), torch.nan)
            for part in made:
                torch.mm(x, x, out=part)
            ctx.save_for_backward(made)
            return made.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.saved_tensors[0].sum(0)

    class Squaring(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return Squares.apply(x)  # type: ignore[no-untyped-call]

    found = []
    for mode in (NONE, SELECTIVE):
        model, x = Squaring(), torch.ones(8, 8, requires_grad=True)
        checkpointing.wrap(model, [model], mode)
        with TensorCount([x]) as count:
            made = model(x)
        assert (count.live - count.known > 64 * 8 * 8 * 4) is (mode == NONE)
        made.backward()
        found.append(x.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]


def test_without_learning_nothing_is_computed_again() -> None:
    """In an evaluation a block is as it was; unwrapped, it is so for good."""
    model, tokens = learned(FULL)
    model.eval()
    model(tokens).sum().backward()
    with torch.no_grad():
        model.train()(tokens)
    assert [block.calls for block in model.blocks] == [2, 2]  # type: ignore[comparison-overlap]
    plain = Blocky()
    with checkpointing.wrapped(plain, list(plain.blocks), FULL):
        assert "forward" in vars(plain.blocks[0])
    assert "forward" not in vars(plain.blocks[0])


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    """A task without blocks, blocks that are none of the model's, that hold each other, or that are there twice."""
    for mode in (SELECTIVE, FULL):
        with pytest.raises(ConfigError, match=rf"activation_checkpointing is {mode}, but this task .* names no blocks") as raised:
            run(tmp_path, config({"activation_checkpointing": mode}))
        assert raised.value.exit_code == 2
    model = Blocky()
    first = model.blocks[0]
    for blocks, words in (
        ([], "names no blocks"),
        ([nn.Linear(2, 2)], "no module of the model"),
        ([first, first], "twice"),
        ([model, first], "holds another"),
        (["layer"], "returned str"),
    ):
        with pytest.raises(ConfigError, match=words):
            checkpointing.wrap(model, blocks, FULL)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("mode", [SELECTIVE, FULL])
def test_on_a_gpu_the_gradients_are_the_same(mode: str) -> None:
    """Through both dropouts and the device's random state, and with less held."""
    found = []
    for chosen in (NONE, mode):
        model, tokens = learned(chosen)
        model, tokens = model.cuda(), tokens.cuda()
        torch.cuda.manual_seed(3)
        torch.cuda.reset_peak_memory_stats()
        model(tokens).sum().backward()
        after = torch.rand(1, device="cuda")
        found.append([*(p.grad for p in model.parameters()), after, *(b for b in model.buffers())])
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in zip(*found, strict=True))  # type: ignore[arg-type]
