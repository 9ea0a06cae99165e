"""The two query language models: one GRU layer (`gru`), and the paper's GRU memory network (`gru-mn`). Must not know data or loop.

A subclass of QueryModel brings run(): hidden states for tokens, given a category and the state so far. Strictly causal: the
hidden state at a place depends on the tokens up to that place only.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from trainerd.engine.dropout import SampleDropout
from trainerd.tasks.cadence import completing
from trainerd.tasks.cadence.recall import Weights, learned, walked
from trainerd.tasks.cadence.settings import CadenceSettings, GruMnSettings, GruSettings
from trainerd.tasks.cadence.softmax import WordSoftmax

State: TypeAlias = "list[Tensor]"
"""What a model remembers of the tokens so far; every tensor has the samples first."""


class Batch(NamedTuple):
    """A micro-batch: inputs (samples, places), and for every place that holds a token, what comes next."""

    inputs: Tensor
    categories: Tensor
    places: Tensor
    """Where the tokens are, in the flattened inputs; the others are padding."""
    targets: Tensor
    """The next token for each of the places."""


class QueryModel(nn.Module):
    """What both models share: the embedding of words, and the softmax where there is a token, not on padding."""

    def __init__(self, num_tokens: int, num_outputs: int, embedding: int, features: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_tokens, embedding)
        self.softmax = WordSoftmax(features, num_outputs)
        nn.init.normal_(self.words.weight, std=0.1)

    def run(self, inputs: Tensor, categories: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Hidden states (samples, places, width) and the state after the last place. No state: from the beginning."""
        raise NotImplementedError

    def remembers(self, places: int) -> int:
        """How many numbers the state of one sample has after so many places; 0: nobody knows."""
        return 0

    def features(self, hidden: Tensor, categories: Tensor) -> Tensor:
        """What the softmax sees, from hidden states (tokens, width) and the category of each."""
        return hidden

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the cross-entropy over the batch's tokens, in nats."""
        return self.softmax.loss(self._features(batch), batch.targets)

    def logits(self, batch: Batch) -> Tensor:
        """Scores (tokens, outputs) for the next word at every place that holds a token."""
        return self.softmax.forward(self._features(batch))

    def next_words(self, inputs: Tensor, categories: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Log-probabilities (samples, outputs) after the last of the inputs, and the state."""
        hidden, state = self.run(inputs, categories, state)
        scores = self.softmax.forward(self.features(hidden[:, -1], categories))
        return torch.log_softmax(scores.float(), -1), state

    def _features(self, batch: Batch) -> Tensor:
        hidden, _ = self.run(batch.inputs, batch.categories)
        width = batch.inputs.shape[1]
        return self.features(hidden.flatten(0, 1)[batch.places], batch.categories[batch.places // width])


class GruModel(QueryModel):
    """One GRU layer; the category's vector goes in beside every word's."""

    def __init__(self, num_tokens: int, num_outputs: int, num_categories: int, settings: GruSettings) -> None:
        super().__init__(num_tokens, num_outputs, settings.word_embedding, settings.hidden)
        self.categories = nn.Embedding(num_categories, settings.category_embedding)
        # torch's own layer on padded rows: with buckets by length there is little padding, and neither a packed sequence
        # nor a loop of our own with a hand-written gradient was faster by more than a twentieth of the step.
        self.gru = nn.GRU(settings.word_embedding + settings.category_embedding, settings.hidden, batch_first=True)
        self.drop_input = SampleDropout(settings.dropout, settings.word_embedding + settings.category_embedding)
        self.drop_output = SampleDropout(settings.dropout, settings.hidden)
        nn.init.normal_(self.categories.weight, std=0.1)

    def run(self, inputs: Tensor, categories: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        words = self.words(inputs)
        category = self.categories(categories).unsqueeze(1).expand(-1, inputs.shape[1], -1)
        hidden, last = self.gru(self.drop_input(torch.cat([words, category], -1)), None if state is None else state[0].unsqueeze(0))
        return self.drop_output(hidden), [last.squeeze(0)]

    def remembers(self, places: int) -> int:
        return completing.numbers([(self.gru.hidden_size, 0)], places)


class MemoryLayer(nn.Module):
    """A GRU whose past is a tape of all its states, read by attention; without attention, an ordinary GRU. Gradients flow through the
    whole tape.

    At each place, with x the input, h the states before and k their keys: q = Wq x + Uq m', with m' what the place before has read;
    m = the sum of softmax(v tanh(k + q)) h; r, u = sigmoid(W x + U m); n = tanh(Wn x + r * (Un m)); and the state is u m + (1 - u) n.
    What the input alone decides is computed for all places at once; the rest is recall.py's.
    """

    def __init__(self, width: int, hidden: int, attention: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_input = nn.Linear(width, 3 * hidden + attention)
        """What gates and attention take from the input: for all places at once."""
        self.from_past = nn.Linear(hidden, 3 * hidden + attention)
        """What the gates take from the aggregated past, and the attention at the next place."""
        self.key = nn.Linear(hidden, attention, bias=False) if attention else None
        self.score = nn.Linear(attention, 1, bias=False) if attention else None
        self.state_size = 3 if attention else 1

    def forward(self, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Hidden states (samples, places, hidden) and the state after the last place; while gradients are wanted that is none, and there
        may be none before."""
        given, weights = self.from_input(inputs), self._weights()
        if torch.is_grad_enabled():
            if state is not None:
                raise RuntimeError("No gradient flows through the state of places before: go on from one under torch.no_grad().")
            return learned(given, weights), []
        if self.key is None:
            before = None if state is None else (state[0].unsqueeze(1), given.new_empty(len(given), 1, 0), given.new_empty(len(given), 0))
            states, _, _ = walked(given, weights, before)
            return states[:, -inputs.shape[1] :], [states[:, -1]]
        states, keys, recall = walked(given, weights, None if state is None else (state[0], state[1], state[2]))
        return states[:, -inputs.shape[1] :], [states, keys, recall]

    def _weights(self) -> Weights:
        read = self.from_past.weight
        nothing = read.new_empty(0, self.hidden), read.new_empty(1, 0)
        key, score = nothing if self.key is None or self.score is None else (self.key.weight, self.score.weight)
        return Weights(read, self.from_past.bias, key, score)


class GruMnModel(QueryModel):
    """The paper's: a stack of memory layers, the category's vector entering each of them and an intermediate context layer.

    Its embeddings start from random numbers, not from fastText vectors as in the paper.
    """

    def __init__(self, num_tokens: int, num_outputs: int, num_categories: int, settings: GruMnSettings) -> None:
        super().__init__(num_tokens, num_outputs, settings.embedding, settings.context)
        widths = [settings.embedding, *settings.hidden]
        attention = settings.attention or [0] * len(settings.hidden)
        layers = [MemoryLayer(*sizes) for sizes in zip(widths, settings.hidden, attention, strict=False)]
        self.layers = nn.ModuleList(layers)
        self._state_sizes = [layer.state_size for layer in layers]
        self._memories = list(zip(settings.hidden, attention, strict=False))
        self.categories = nn.ModuleList(nn.Embedding(num_categories, width) for width in widths[:-1])
        """Looking a row up is the paper's matrix times a one-hot category."""
        self.drops = nn.ModuleList(SampleDropout(settings.dropout, width) for width in settings.hidden)
        self.context = nn.Linear(widths[-1], settings.context)
        self.context_category = nn.Embedding(num_categories, settings.context)
        for table in [*self.categories, self.context_category]:
            nn.init.normal_(table.weight, std=0.1)

    def run(self, inputs: Tensor, categories: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        hidden = self.words(inputs)
        after: State = []
        for size, layer, category, drop in zip(self._state_sizes, self.layers, self.categories, self.drops, strict=True):
            parts = None
            if state is not None:
                parts, state = state[:size], state[size:]
            hidden, left = layer(torch.relu(hidden + category(categories).unsqueeze(1)), parts)
            hidden = drop(hidden)
            after += left
        return hidden, after

    def remembers(self, places: int) -> int:
        return completing.numbers(self._memories, places)

    def features(self, hidden: Tensor, categories: Tensor) -> Tensor:
        return torch.tanh(self.context(hidden) + self.context_category(categories))


def build(settings: CadenceSettings, num_tokens: int, num_outputs: int, num_categories: int) -> QueryModel:
    """The model the settings name."""
    if settings.model == "gru":
        return GruModel(num_tokens, num_outputs, num_categories, settings.gru)
    return GruMnModel(num_tokens, num_outputs, num_categories, settings.gru_mn)
