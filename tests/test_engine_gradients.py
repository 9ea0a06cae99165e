"""A weight that nothing ever teaches: the run stops at once and names it, unless the task says that this may be."""

import pytest
import torch
from torch import nn

from tests.toy import Script, Toy, config, run
from trainerd.contract.errors import UsageError


class _Forgets(Toy):
    """A model with parts that loss() does not reach."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.box, self.event = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1, bias=False)

        def forward(self, x):
            return self.used(x)

    model_kind = Parts

    def counts(self, batch):
        return {"tokens": len(batch)}

    def loss(self, model, batch, ctx):
        return {"tokens": (model(torch.ones(len(batch), 8)).square().sum(), 1.0)}, {}


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_a_weight_that_would_never_be_learned_stops_the_run(offload, tmp_path):
    """After the first backward pass, with its name and what to do; nothing has been trained then."""
    link = Script()
    names = r"3 of 5 trainable weights have no gradient: box\.weight.*event\.weight.*sometimes_unused"
    with pytest.raises(UsageError, match=names) as said:
        run(tmp_path, config(memory={"offload": offload}), link, _Forgets())
    assert all(event["step"] == 0 for event in link.of("progress"))
    assert "box.bias" in str(said.value) and "used" not in str(said.value).split("gradient:")[1].split(".")[0]


def test_a_task_may_say_which_weights_some_batches_do_not_use(tmp_path):
    """By name or by pattern: experts, heads without a target in the first batch."""

    class Says(_Forgets):
        sometimes_unused = ("box.*", "event.weight")

    assert run(tmp_path, config(), task=Says()).outcome == "finished"
