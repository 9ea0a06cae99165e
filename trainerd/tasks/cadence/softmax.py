"""The last layer: from a hidden vector to the next word, and its loss, by default without the table of logits. Must not know the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainerd.engine.chunked import linear_cross_entropy


class WordSoftmax(nn.Module):
    """Scores for every word and end. `chunked` off: the loss makes all logits at once, as torch's own does."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, width))
        self.bias = nn.Parameter(torch.zeros(num_outputs))
        self.chunked = True
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits."""
        return nn.functional.linear(hidden, self.weight, self.bias)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The sum over tokens of the cross-entropy in nats."""
        if self.chunked:
            return linear_cross_entropy(hidden, self.weight, self.bias, targets, ignore_index=None)
        return nn.functional.cross_entropy(self.forward(hidden), targets, reduction="sum")
