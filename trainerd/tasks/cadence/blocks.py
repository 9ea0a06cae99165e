"""CADENCE's two models as a memory table: what model.py allocates, without torch. Must be changed together with model.py.

tests/test_memory_tables.py holds it against the real models, to the byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from trainerd.memory import kernels, losses, ops, shared
from trainerd.memory.checkpointing import checkpointed
from trainerd.memory.layers import Embedding, Linear, SampleDropout
from trainerd.memory.recurrent import Gru
from trainerd.memory.tape import LOGITS, Tape, Tensor
from trainerd.memory.timeline import Setup, Timeline
from trainerd.tasks.cadence import completing
from trainerd.tasks.cadence.completing import State

if TYPE_CHECKING:  # values come from outside: the table itself needs no pydantic
    from trainerd.config.model import DataConfig
    from trainerd.tasks.cadence.settings import CadenceSettings

_SPECIAL_WORDS = 2  # unknown and rare
_EXPECTED_CATEGORIES, _EXPECTED_PIECES = 64, 3


@dataclass(frozen=True)
class Sizes:
    """What the data decide: how many words are read and predicted, and how many categories there are."""

    num_tokens: int
    num_outputs: int
    num_categories: int


@dataclass
class Batch:
    """A micro-batch: (samples, places), of which `tokens` are no padding."""

    inputs: Tensor
    categories: Tensor
    places: Tensor
    targets: Tensor


def batch(tape: Tape, samples: int, places: int, tokens: int) -> Batch:
    """What collate() makes."""
    return Batch(tape.input(samples, places), tape.input(samples), tape.input(tokens), tape.input(tokens))


class _QueryModel:
    """What both models share; see model.py."""

    def __init__(self, tape: Tape, sizes: Sizes, embedding: int, features: int) -> None:
        self.words = Embedding(tape, sizes.num_tokens, embedding)
        self.weight, self.bias = tape.parameter(sizes.num_outputs, features), tape.parameter(sizes.num_outputs)
        self.drops: list[SampleDropout] = []

    def run(self, given: Batch, checkpointing: str) -> Tensor:
        raise NotImplementedError

    def remembers(self, places: int) -> int:
        """How many numbers a sample's state has after so many places."""
        raise NotImplementedError

    def remembered(self, tape: Tape, samples: int, places: int) -> State:
        """The state after so many places, as it is between two steps of a search."""
        raise NotImplementedError

    def further(self, inputs: Tensor, categories: Tensor, state: State) -> tuple[Tensor, State]:
        """run() over one place more."""
        raise NotImplementedError

    def features(self, hidden: Tensor, categories: Tensor) -> Tensor:
        return hidden

    def loss(self, given: Batch, setup: Setup) -> Tensor:
        """The sum of the cross-entropy over the batch's tokens."""
        hidden = self.run(given, setup.checkpointing)
        tokens = given.places.shape[0]
        flat = ops.reshape(hidden, -1, hidden.shape[-1])
        del hidden
        rows = ops.gather_rows(flat, given.places, tokens, flat.shape[-1])
        del flat
        seen = self.features(rows, _categories(given, tokens))
        del rows
        if setup.logits == "chunked":
            return losses.linear_cross_entropy(seen, self.weight, self.bias, given.targets)
        with seen.tape.counting_as(LOGITS):
            scores = kernels.linear(seen, self.weight, self.bias)
        del seen
        return losses.cross_entropy(scores, given.targets)


def _categories(given: Batch, tokens: int) -> Tensor:
    """The category of each token: picked by integers that are not kept."""
    tape = given.categories.tape
    which = tape.new((tokens,), "int64")
    picked = tape.new((tokens,), "int64")
    del which
    return picked


class GruModel(_QueryModel):
    """One GRU layer; the category's vector beside every word's."""

    def __init__(self, tape: Tape, sizes: Sizes, settings: CadenceSettings) -> None:
        own = settings.gru
        super().__init__(tape, sizes, own.word_embedding, own.hidden)
        self.categories = Embedding(tape, sizes.num_categories, own.category_embedding)
        self.gru = Gru(tape, own.word_embedding + own.category_embedding, own.hidden)
        widths = own.word_embedding + own.category_embedding, own.hidden
        self.drops = [SampleDropout(own.dropout, units) for units in widths]

    def run(self, given: Batch, checkpointing: str) -> Tensor:
        return self._run(given.inputs, given.categories, None)

    def remembers(self, places: int) -> int:
        return completing.numbers([(self.gru.hidden, 0)], places)

    def remembered(self, tape: Tape, samples: int, places: int) -> State:
        return [tape.new((samples, self.gru.hidden), "fp32")]

    def further(self, inputs: Tensor, categories: Tensor, state: State) -> tuple[Tensor, State]:
        hidden = self._run(inputs, categories, state[0])
        return hidden, [hidden.tape.new(state[0].shape, hidden.dtype)]

    def _run(self, inputs: Tensor, categories: Tensor, start: Tensor | None) -> Tensor:
        samples, places = inputs.shape
        words = self.words(inputs)
        rows = self.categories(categories)
        category = ops.expand(ops.reshape(rows, samples, 1, rows.shape[-1]), samples, places, rows.shape[-1])
        joined = ops.cat([words, category], samples, places, words.shape[-1] + category.shape[-1])
        drop_input, drop_output = self.drops
        dropped = drop_input(joined)
        del joined
        hidden = self.gru(dropped, start)
        del dropped
        return drop_output(hidden)


class MemoryLayer:
    """A GRU with attention over all its past states."""

    def __init__(self, tape: Tape, width: int, hidden: int, attention: int) -> None:
        self.hidden, self.attention = hidden, attention
        self.from_input = Linear(tape, width, 3 * hidden + attention)
        self.from_past = Linear(tape, hidden, 3 * hidden + attention)
        if attention:
            self.key = Linear(tape, hidden, attention, bias=False)
            self.score = Linear(tape, attention, 1, bias=False)

    def __call__(self, inputs: Tensor) -> Tensor:
        samples, places, _ = inputs.shape
        given = self.from_input(inputs)
        if not self.attention:
            return self._plain(given)
        tape, width = given.tape, self.hidden
        states = tape.new((samples, 0, width), given.dtype)
        keys, recall = tape.new((samples, 0, self.attention), given.dtype), tape.new((samples, self.attention), given.dtype)
        pieces = ops.pieces(given, (samples, given.shape[-1]), len(tape.places(places)))
        for place, here in zip(tape.turns(places), pieces, strict=True):
            if place != states.shape[1]:
                states, keys = ops.stretched(states, samples, place, width), ops.stretched(keys, samples, place, self.attention)
            past = self._recalled(here, states, keys, recall) if place else tape.new((samples, width), given.dtype)
            read = self.from_past(past)
            state = self._gates(here, read, past)
            recall = ops.part(read, samples, self.attention)
            states = ops.cat([states, ops.reshape(state, samples, 1, width)], samples, place + 1, width)
            keys = ops.cat([keys, ops.reshape(self.key(state), samples, 1, self.attention)], samples, place + 1, self.attention)
        return ops.part(states, *states.shape, contiguous=True)

    def remembered(self, tape: Tape, samples: int, places: int) -> State:
        """What it has after so many places; what attention takes from the past is a part of all that is read from it."""
        kind = tape.precision or "fp32"
        if not self.attention:
            return [tape.new((samples, self.hidden), kind)]
        read = tape.new((samples, 3 * self.hidden + self.attention), kind)
        tapes = [tape.new((samples, places, width), kind) for width in (self.hidden, self.attention)]
        return [*tapes, ops.part(read, samples, self.attention)]

    def further(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """One place more."""
        samples = inputs.shape[0]
        given = self.from_input(inputs)
        (here,) = ops.pieces(given, (samples, given.shape[-1]), 1)
        if not self.attention:
            past = self._gates(here, self.from_past(state[0]), state[0])
            return ops.cat([past], samples, 1, self.hidden), [past]
        states, keys, recall = state
        places = states.shape[1]
        query = ops.add(ops.part(here, samples, self.attention), recall)
        weights = ops.softmax(self.score(ops.tanh(ops.add(keys, ops.reshape(query, samples, 1, self.attention)))))
        past = ops.reshape(kernels.matmul(ops.transpose(weights, samples, 1, places), states), samples, self.hidden)
        read = self.from_past(past)
        made = self._gates(here, read, past)
        states = ops.cat([states, ops.reshape(made, samples, 1, self.hidden)], samples, places + 1, self.hidden)
        keys = ops.cat([keys, ops.reshape(self.key(made), samples, 1, self.attention)], samples, places + 1, self.attention)
        return ops.part(states, samples, 1, self.hidden), [states, keys, ops.part(read, samples, self.attention)]

    def _recalled(self, here: Tensor, states: Tensor, keys: Tensor, recall: Tensor) -> Tensor:
        """The past, weighed by attention."""
        samples, places, _ = keys.shape
        query = ops.add(ops.part(here, samples, self.attention), recall)
        weights = ops.softmax(self.score(ops.tanh(ops.add(keys, ops.reshape(query, samples, 1, self.attention)))))
        turned = ops.transpose(weights, samples, 1, places)
        return ops.reshape(kernels.matmul(turned, states), samples, self.hidden)

    def _plain(self, given: Tensor) -> Tensor:
        samples, places, _ = given.shape
        past = given.tape.new((samples, self.hidden), given.dtype)
        states = []
        pieces = ops.pieces(given, (samples, given.shape[-1]), len(given.tape.places(places)))
        for _, here in zip(given.tape.turns(places), pieces, strict=True):
            past = self._gates(here, self.from_past(past), past)
            states.append(past)
        return ops.cat(states, samples, places, self.hidden)

    def _gates(self, given: Tensor, read: Tensor, past: Tensor) -> Tensor:
        samples, width = past.shape
        both = ops.sigmoid(ops.add(ops.part(given, samples, 2 * width), ops.part(read, samples, 2 * width)))
        reset, update = ops.pieces(both, (samples, width), 2)
        del both
        new = ops.tanh(ops.add(ops.part(given, samples, width), ops.mul(reset, ops.part(read, samples, width))))
        return ops.lerp(new, ops.to(past, new.dtype), update)


class GruMnModel(_QueryModel):
    """The paper's: a stack of memory layers, the category entering each."""

    def __init__(self, tape: Tape, sizes: Sizes, settings: CadenceSettings) -> None:
        own = settings.gru_mn
        super().__init__(tape, sizes, own.embedding, own.context)
        widths = [own.embedding, *own.hidden]
        attention = own.attention or [0] * len(own.hidden)
        self.layers = [MemoryLayer(tape, *shape) for shape in zip(widths, own.hidden, attention, strict=False)]
        self.categories = [Embedding(tape, sizes.num_categories, width) for width in widths[:-1]]
        self.drops = [SampleDropout(own.dropout, units) for units in own.hidden]
        self.context = Linear(tape, widths[-1], own.context)
        self.context_category = Embedding(tape, sizes.num_categories, own.context)

    def run(self, given: Batch, checkpointing: str) -> Tensor:
        samples = given.inputs.shape[0]
        hidden = self.words(given.inputs)
        for layer, category, drop in zip(self.layers, self.categories, self.drops, strict=True):
            rows = category(given.categories)
            entering = ops.relu(ops.add(hidden, ops.reshape(rows, samples, 1, rows.shape[-1])))
            del rows
            hidden = layer(entering) if checkpointing == "none" else checkpointed(layer, entering, keeps=checkpointing == "selective")
            del entering
            hidden = drop(hidden)
        return hidden

    def remembers(self, places: int) -> int:
        return completing.numbers(((layer.hidden, layer.attention) for layer in self.layers), places)

    def remembered(self, tape: Tape, samples: int, places: int) -> State:
        return [part for layer in self.layers for part in layer.remembered(tape, samples, places)]

    def further(self, inputs: Tensor, categories: Tensor, state: State) -> tuple[Tensor, State]:
        hidden, after = self.words(inputs), State()
        size = len(state) // len(self.layers)
        for number, (layer, category) in enumerate(zip(self.layers, self.categories, strict=True)):
            parts = state[number * size : (number + 1) * size]
            rows = ops.reshape(category(categories), inputs.shape[0], 1, hidden.shape[-1])
            hidden, left = layer.further(ops.relu(ops.add(hidden, rows)), parts)
            after += left
        return hidden, after

    def features(self, hidden: Tensor, categories: Tensor) -> Tensor:
        return ops.tanh(ops.add(self.context(hidden), self.context_category(categories)))


def build(tape: Tape, settings: CadenceSettings, sizes: Sizes) -> GruModel | GruMnModel:
    """The model the settings name."""
    return GruModel(tape, sizes, settings) if settings.model == "gru" else GruMnModel(tape, sizes, settings)


@dataclass(frozen=True)
class CadenceTable:
    """The memory table of a CADENCE training: `places` is the longest row, in inputs."""

    settings: CadenceSettings
    sizes: Sizes
    places: int
    assumed: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return f"cadence {self.settings.model}"

    @cached_property
    def key(self) -> str:
        """All that the timeline depends on."""
        return f"cadence {self.settings.model_dump_json()} {self.sizes} {self.places}"

    def timeline(self, setup: Setup) -> Timeline:
        return shared.timeline(lambda tape: _Training(self, tape, setup), setup, self.key)

    @property
    def offers(self) -> tuple[str, ...]:
        return ("chunked", "selective", "full") if self.settings.model == "gru-mn" else ("chunked",)


class _Training:
    """The model on a tape, with the micro-batches it meets: every row as long as the longest."""

    def __init__(self, table: CadenceTable, tape: Tape, setup: Setup) -> None:
        self.table, self.tape, self.setup = table, tape, setup
        self.model = build(tape, table.settings, table.sizes)

    def ready(self) -> None:
        """Dropout's numbers of units."""
        for drop in self.model.drops:
            drop.lay_out(self.tape)

    def micro_batch(self, tape: Tape, samples: int) -> Batch:
        return batch(tape, samples, self.table.places, samples * self.table.places)

    def loss(self, given: Batch) -> Tensor:
        return self.model.loss(given, self.setup)

    def evaluate(self, tape: Tape, samples: int, *, worst: bool) -> None:
        """Completions of prefixes: the last step of their search. The worst is played on a tape of its own, and told as one piece."""
        settings, search = self.table.settings, self.table.settings.search
        if not settings.eval_prefixes:
            return
        most = completing.tokens(search, self.table.places, worst=True)
        prefixes = completing.at_once(settings.eval_prefixes, search, self.model.remembers(most))
        rows = completing.paths(search, prefixes, worst=worst)
        before = most if worst else completing.tokens(search, self.table.places, worst=False)
        if worst:
            aside = Tape(tape.device, tape.precision)
            tape.new((completing.most(build(aside, settings, self.table.sizes), aside, prefixes, rows, before),), "uint8")
        else:
            completing.further(self.model, tape, prefixes, rows, before)


def table(settings: CadenceSettings, data: DataConfig | None = None) -> CadenceTable:
    """Before the data has been read: as many words as may be known, rows as long as they may be."""
    categories = min(settings.max_categories, _EXPECTED_CATEGORIES) if settings.conditioned else 1
    rows = data.size if data is not None else None
    words = (settings.vocabulary if rows is None else min(settings.vocabulary, rows * settings.max_words)) + _SPECIAL_WORDS
    places = settings.max_words * (_EXPECTED_PIECES if settings.tokenizer == "bpe" else 1) + 1
    assumed = [f"a vocabulary of {words:,} words and rows of {places} tokens (the data may have fewer)"]
    if settings.conditioned:
        assumed.append(f"{categories} categories (known once the data is prepared)")
    return CadenceTable(settings, Sizes(words + 2 * categories, words + categories, categories), places, tuple(assumed))
