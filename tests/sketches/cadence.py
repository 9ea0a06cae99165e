"""A category-conditioned query language model: buckets by length, logits only where there is a token, dropout keyed by sample."""

import numpy as np
import torch
from torch import nn

from trainerd.engine.dropout import SampleDropout
from trainerd.engine.task import Task


class QueryModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.categories = nn.Embedding(40, 16), nn.Embedding(3, 8)
        self.gru, self.dropout, self.out = nn.GRU(24, 32, batch_first=True), SampleDropout(0.1), nn.Linear(32, 40)

    def forward(self, tokens, category, real):
        given = self.categories(category).unsqueeze(1).expand(-1, tokens.shape[1], -1)
        states, _ = self.gru(torch.cat([self.words(tokens), given], -1))
        rows, positions = real.nonzero(as_tuple=True)
        return self.out(self.dropout(states[rows, positions], rows, positions))


class CadenceSketch(Task):
    tokens = "tokens"

    def model(self):
        return QueryModel()

    def dataset(self, split):
        random = np.random.default_rng(split == "eval")
        queries = [(int(c), (np.arange(n) * (c + 1) + c) % 40) for c, n in random.integers([0, 3], [3, 12], (60, 2))]
        return [(category, torch.from_numpy(words)) for category, words in queries]

    def length(self, sample):
        return len(sample[1])

    def collate(self, samples):
        tokens = nn.utils.rnn.pad_sequence([words for _, words in samples], batch_first=True, padding_value=-1)
        return {"category": torch.tensor([category for category, _ in samples]), "tokens": tokens}

    def counts(self, batch):
        return {"tokens": int((batch["tokens"][:, 1:] >= 0).sum())}

    def loss(self, model, batch, ctx):
        tokens = batch["tokens"]
        real = tokens[:, 1:] >= 0
        logits = model(tokens[:, :-1].clamp(min=0), batch["category"], real)
        return {"tokens": (nn.functional.cross_entropy(logits, tokens[:, 1:][real], reduction="sum"), 1.0)}, {}

    def evaluate(self, model, ctx, losses):
        return {**losses, "perplexity": float(np.exp(losses["loss"]))}
