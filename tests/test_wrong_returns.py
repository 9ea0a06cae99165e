"""What a task's methods must not return is said in words: which method, what came, and what it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy import Script, Toy, config
from trainerd.contract.errors import UsageError
from trainerd.engine.trainer import Trainer

_ONE = torch.zeros(())
_LOSSES = "must return ({name: (sum, weight)}, metrics)"


@pytest.mark.parametrize(
    ("method", "given", "came", "must"),
    [
        ("loss", 5, "5 (int)", _LOSSES),
        ("loss", None, "nothing (None)", _LOSSES),
        ("loss", torch.zeros(3), "a tensor of the shape [3]", _LOSSES),
        ("loss", ([1.0], {}), "a list of 1 as its losses", _LOSSES),
        ("loss", ({"tokens": _ONE}, {}), "a tensor of the shape [] for the loss 'tokens'", _LOSSES),
        ("loss", ({"tokens": (1.5, 1.0)}, {}), "1.5 (float) as the sum of the loss 'tokens'", _LOSSES),
        ("loss", ({"tokens": (_ONE, "1")}, {}), "'1' (str) as the weight of the loss 'tokens'", _LOSSES),
        ("loss", ({"tokens": (_ONE.clone().requires_grad_(), 1.0)}, None), "nothing (None) as metrics", _LOSSES),
        ("loss", ({"tokens": (_ONE.clone().requires_grad_(), 1.0)}, {"right": "all"}), "'all' (str) as the metric 'right'", _LOSSES),
        ("counts", 7, "7 (int)", "must return {name: N}"),
        ("counts", {"tokens": None}, "nothing (None) for 'tokens'", "must return {name: N}"),
        ("evaluate", None, "nothing (None)", "must return a dict of numbers"),
        ("evaluate", {"loss": "low"}, "'low' (str) for 'loss'", "must return a dict of numbers"),
        ("evaluate", {"loss": torch.zeros(2)}, "a tensor of the shape [2] for 'loss'", "must return a dict of numbers"),
    ],
)
def test_a_wrong_return_names_the_method_and_what_it_must_return(tmp_path: Path, method: str, given: Any, came: str, must: str) -> None:
    """A UsageError (exit 2), where it is first seen: not an error about unpacking."""
    task = type("Mine", (Toy,), {method: lambda self, *_: given})()
    with pytest.raises(UsageError) as error:
        Trainer(task, config(), home=tmp_path, link=Script()).train()
    said = str(error.value)
    assert said.startswith(f"{method}() of Mine returned {came}") and must in said and error.value.exit_code == 2


def test_loss_is_told_apart_in_an_evaluation_too(tmp_path: Path) -> None:
    """Right while it trains and wrong without gradients: the same words."""

    class Mine(Toy):
        def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
            return super().loss(model, batch, ctx) if ctx.training else {"tokens": 1.0}

    with pytest.raises(UsageError, match=r"loss\(\) of Mine returned a dict of 1\. It must return"):
        Trainer(Mine(), config(), home=tmp_path, link=Script()).train()


def test_an_error_inside_a_method_stays_what_it_is(tmp_path: Path) -> None:
    """Only what came back is judged."""

    class Mine(Toy):
        def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
            raise TypeError("of my own")

    with pytest.raises(TypeError, match="of my own"):
        Trainer(Mine(), config(), home=tmp_path, link=Script()).train()
