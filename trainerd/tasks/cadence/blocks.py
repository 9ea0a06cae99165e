"""CADENCE's two models as a memory table: what model.py allocates, without torch. Must be changed together with model.py and
recall.py.

tests/test_memory_tables.py holds it against the real models, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from trainerd.memory import kernels, losses, ops, shared
from trainerd.memory.checkpointing import checkpointed
from trainerd.memory.layers import Embedding, Linear, SampleDropout
from trainerd.memory.recurrent import Gru
from trainerd.memory.tape import BYTES, LOGITS, Node, Tape, Tensor
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
    """A GRU with attention over all its past states, or without: what recall.py allocates, which is nothing at a place."""

    def __init__(self, tape: Tape, width: int, hidden: int, attention: int) -> None:
        self.hidden, self.attention = hidden, attention
        self.from_input = Linear(tape, width, 3 * hidden + attention)
        self.from_past = Linear(tape, hidden, 3 * hidden + attention)
        self.weights = [weight for weight in (self.from_past.weight, self.from_past.bias) if weight is not None]
        if attention:
            self.weights += [tape.parameter(attention, hidden), tape.parameter(1, attention)]

    def __call__(self, inputs: Tensor) -> Tensor:
        """The states of all places, while it learns."""
        given = self.from_input(inputs)
        tape, places = given.tape, given.shape[1]
        with tape.no_grad():
            here = self._walk(given, places, learns=True)
        tape.record([here[0]], [given, *self.weights], _memory_back, (given.detach(), here[0].detach(), *here[1:]), self)
        return here[0]

    def remembered(self, tape: Tape, samples: int, places: int) -> State:
        """What it has after so many places; what attention takes from the past is a part of all that is read from it."""
        kind = tape.precision or "fp32"
        if not self.attention:
            return [tape.new((samples, self.hidden), kind)]
        read = tape.new((samples, 3 * self.hidden + self.attention), kind)
        tapes = [tape.new((samples, places, width), kind) for width in (self.hidden, self.attention)]
        return [*tapes, ops.part(read, samples, self.attention)]

    def further(self, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Places more, without gradients."""
        given = self.from_input(inputs)
        samples, places = given.shape[:2]
        before = 0 if state is None else state[0].shape[1] if self.attention else 1
        states, keys, _, _, read, _ = self._walk(given, before + places, learns=False)
        hidden = ops.part(states, samples, places, self.hidden)
        if not self.attention:
            return hidden, [ops.part(states, samples, self.hidden)]
        return hidden, [states, keys, ops.part(read, samples, self.attention)]

    def _walk(self, given: Tensor, places: int, *, learns: bool) -> list[Tensor]:
        """What the places leave, in recall.py's order; what is only for the way back, of one place where it does not learn."""
        tape, (samples, walked, _), attention, hidden = given.tape, given.shape, self.attention, self.hidden
        kept = places if learns else 1
        shares = samples * (places * (places - 1) // 2 if kept > 1 else places) if attention else 0
        widths = (places, hidden), (places, attention), (kept, hidden), (kept, hidden), (kept, 3 * hidden + attention)
        made = [*(tape.new((samples, number, width), given.dtype) for number, width in widths), tape.new((shares,), given.dtype)]
        alone = not learns and walked == 1 and self.weights[0].dtype != given.dtype
        low = self.lowered(given, self.weights[3:] if alone else self.weights)
        scratch = self.scratch(given, places)
        for weight, bias in ((self.weights[0], self.weights[1]), *((key, None) for key in self.weights[2:3])) if alone else ():
            kernels.linear(made[0].view(samples, hidden), weight, bias)  # by autocast, which keeps its copies
        self.compute(given, walked, (places * (places - 1) - (places - walked) * (places - walked - 1)) // 2, _FORWARD)
        if tape.device == "cpu":
            tape.multiplied += [(samples, hidden, width) for width in (3 * hidden + attention, attention)]
            tape.multiplied += [(samples, 1, place, hidden) for place in range(places - walked, places) if place and attention]
        del low, scratch
        return made

    def lowered(self, given: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """Low copies of these weights, where what is given is low."""
        return [given.tape.new(weight.shape, given.dtype) for weight in weights if weight.dtype != given.dtype]

    def scratch(self, given: Tensor, places: int) -> list[Tensor]:
        """Of one place at a time."""
        samples = given.shape[0]
        numbers = samples * places * self.attention, samples * places if self.attention else 0, samples * self.attention
        return [given.tape.new((number,), given.dtype) for number in numbers]

    def compute(self, given: Tensor, places: int, before: int, work: _Work) -> None:
        """At so many places, with so many before each of them in all, into what is there already."""
        tape, hidden, attention = given.tape, self.hidden, self.attention
        samples, width = given.shape[0], 3 * hidden + attention
        products = places * hidden * (width + attention) + bool(attention) * before * (hidden + attention)
        tape.flops += 2.0 * work.products * samples * products
        tape.reread_bytes += places * sum(weight.numel for weight in self.weights) * BYTES[given.dtype]
        tape.left_out += places * (work.results + bool(attention) * work.of_attention)
        tape.left_out_bytes += BYTES[given.dtype] * samples * (work.units * places * hidden + work.tables * before * attention)


@dataclass(frozen=True)
class _Work:
    """How often each product is made, how many results are written at a place, and with attention besides; and of how many numbers for
    each unit, and for each number of the table."""

    products: int
    results: int
    of_attention: int
    units: int
    tables: int


_FORWARD, _BACKWARD = _Work(1, 8, 7, 13, 2), _Work(2, 12, 14, 16, 5)


def _memory_back(node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients of what was given, and of the weights; place after place into what is there, then a product for each weight."""
    g, layer, given = grads[0], node.about[0], node.saved[0]
    if g is None:
        return [None] * len(node.edges)
    tape, (samples, places, _), hidden, attention = g.tape, given.shape, layer.hidden, layer.attention
    low = layer.lowered(given, layer.weights)
    to_given, to_keys = tape.new(given.shape, given.dtype), tape.new((samples, places, attention), given.dtype)
    to_reads = tape.new((samples, places, hidden + attention), given.dtype)
    to_score = tape.new((1, attention), layer.weights[0].dtype)
    to_states = tape.new(g.shape, g.dtype)
    scratch = [*layer.scratch(given, places), *layer.scratch(given, places)[:2]]
    scratch += [tape.new((samples, hidden), given.dtype) for _ in range(2)]
    layer.compute(given, places, places * (places - 1) // 2, _BACKWARD)
    del to_states, scratch, low
    found = [tape.new(weight.shape, given.dtype) for weight in layer.weights[:3]]
    exact = [ops.to(grad, weight.dtype) for grad, weight in zip(found, layer.weights, strict=False)]
    del found, to_keys, to_reads
    return [to_given, *exact, *([to_score] if attention else [])]


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
        samples, tape = given.inputs.shape[0], given.inputs.tape
        hidden, after = self.words(given.inputs), State()
        for layer, category, drop in zip(self.layers, self.categories, self.drops, strict=True):
            rows = category(given.categories)
            entering = ops.relu(ops.add(hidden, ops.reshape(rows, samples, 1, rows.shape[-1])))
            del rows
            if tape.grad_enabled:
                hidden = layer(entering) if checkpointing == "none" else checkpointed(layer, entering, keeps=checkpointing == "selective")
            else:
                hidden, left = layer.further(entering, None)
                after += left
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
            entering = ops.relu(ops.add(hidden, ops.reshape(category(categories), inputs.shape[0], 1, hidden.shape[-1])))
            hidden, left = layer.further(entering, parts)
            del entering
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
