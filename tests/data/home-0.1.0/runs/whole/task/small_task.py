"""The task of the selftest: tiny, with every part a resume must bring back. Must not be in the catalogue: it reaches the
trainer as a person's own file does, by the same door.

Each step's metrics name the very samples the model was fed, so that the committed history itself tells of a doubled or
skipped one.
"""

import time

import torch
from torch import nn

from trainerd.engine.dropout import SampleDropout
from trainerd.engine.task import Task

NUM_SAMPLES, NUM_HELD_OUT = 48, 16
_WIDTH = 24


class Model(nn.Module):
    """Dropout of both kinds (drawn from the global state, and keyed by sample), and a running statistic in the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, _WIDTH)
        self.drawn, self.keyed = nn.Dropout(0.2), SampleDropout(0.1)
        self.outer = nn.Linear(_WIDTH, 1)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(_WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.inner(x))
        if self.training:
            self.mean.lerp_(hidden.detach().mean(0).float(), 0.1)
        result: torch.Tensor = self.outer(self.keyed(self.drawn(hidden - self.mean)))
        return result


class Samples:
    """(its own number, inputs, target): the number travels with the sample into the model's step."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(count, 6, generator=generator)
        self.targets = self.inputs.prod(1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return index, self.inputs[index], self.targets[index]


class Small(Task):
    """Learns a product of six numbers, badly."""

    def model(self) -> nn.Module:
        return Model()

    def dataset(self, split: str) -> Samples:
        return Samples(NUM_SAMPLES, 1) if split == "train" else Samples(NUM_HELD_OUT, 2)

    def counts(self, batch):  # type: ignore[no-untyped-def]
        return {"loss": len(batch[0])}

    def loss(self, model, batch, ctx):  # type: ignore[no-untyped-def]
        time.sleep(0.02)
        numbers, inputs, targets = batch
        fed = sum(1 << number for number in numbers.tolist())
        # The engine averages by sample; sizes are powers of two and there are fewer samples than a float has bits: exact.
        return {"loss": (nn.functional.mse_loss(model(inputs), targets, reduction="sum"), 1.0)}, {"fed": fed / len(numbers)}
