"""What a CPU's kernels hold beside their tensors, convolutions above all: torch's allocator against the rules in the upper bound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory.scratch import SHAPES, Shape, foretold, held
from tests.memory_oracle import allocator_changes, peak
from tests.test_memory_fitting import bound
from tests.toy import Toy
from trainerd.engine.recorder import Recorder
from trainerd.engine.trace import trace
from trainerd.memory.estimate import estimate
from trainerd.memory.scratch import of_convolution, of_masked_select
from trainerd.memory.timeline import Setup


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.channels}-{shape.made} {shape.kernel}")
def test_no_convolution_holds_more_than_the_rule_says(shape: Shape, precision: str) -> None:
    """Forwards and back, of whatever stride, dilation and number of dimensions."""
    real, (tensors, rule) = held(shape, precision), foretold(shape, precision)
    assert tensors <= real <= tensors + rule


def test_most_of_what_the_rule_says_is_really_held() -> None:
    """Where nothing but pictures counts it is not a guess."""
    shape = Shape(8, 16, 16, 32, 3)
    real, (tensors, rule) = held(shape, "fp32"), foretold(shape, "fp32")
    if real < tensors + rule / 4:
        pytest.skip("this processor convolves without blocks")
    assert real - tensors > 0.8 * rule


def test_a_choice_by_a_mask_holds_its_places_and_the_mask_once_more() -> None:
    """What torch's allocator shows, and what a trace notes of it; the numbers chosen from are spread out, as combinations() has them."""
    chosen, mask = torch.arange(300).expand(300, 300), torch.rand(300, 300) > 0.99
    made = torch.masked_select(chosen, mask)
    real = peak(allocator_changes(lambda: torch.masked_select(chosen, mask)))
    assert real == pytest.approx(of_masked_select(chosen.numel()) + made.nbytes, abs=1024)
    with Recorder([]) as recorder:
        torch.masked_select(chosen, mask)
    assert list(recorder.trace(1).scratch) == [of_masked_select(chosen.numel())]


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 24, 3, padding=1), nn.Conv1d(24, 40, 3, padding=1)
        self.out = nn.Linear(40, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.relu(self.first(tokens.float().unsqueeze(1)))
        return self.out(torch.relu(self.second(x)).transpose(1, 2))


class PictureToy(Toy):
    model_kind = Pictures


def test_a_traced_models_convolutions_are_in_the_upper_bound(tmp_path: Path) -> None:
    """The largest one's, at any micro-batch; on a CPU alone, and not in the likely value."""
    task = PictureToy()
    model, mixed = bound(task, tmp_path)
    table = trace(task, model, task.train_samples, mixed, 32)
    setup = Setup("cpu", "fp32", 32, 32, heap="given back")
    places = int(task.train_samples.lengths.max()) - 1
    expected = of_convolution((32, 24, 1, places), (40, 24, 1, 3), (32, 40, 1, places), 4)
    assert table.timeline(setup).scratch_bytes == expected
    assert table.timeline(replace(setup, device="cuda")).scratch_bytes == 0
    alone = of_convolution((1, 24, 1, places), (40, 24, 1, 3), (1, 40, 1, places), 4)
    assert alone == 24 * 3 * places * 4 and table.timeline(setup.with_micro_batch(1)).scratch_bytes >= alone
    modes: Any = {mode: replace(some, steps=[replace(t, scratch=()) for t in some.steps]) for mode, some in table.modes.items()}
    modes = {mode: replace(some, held_out=[replace(t, scratch=()) for t in some.held_out]) for mode, some in modes.items()}
    without, found = estimate(replace(table, modes=modes), setup).ram, estimate(table, setup).ram
    assert found.point == without.point and found.upper == without.upper + expected
