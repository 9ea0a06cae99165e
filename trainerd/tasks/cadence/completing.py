"""What completing prefixes holds while an evaluation does it: how many at once, and as a memory table. Must not import torch, and must be
changed together with search.py, measures.py and model.py.

tests/test_memory_evaluation.py holds it against real searches, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trainerd.memory import kernels, ops
from trainerd.memory.tape import LOGITS, Tape, Tensor

if TYPE_CHECKING:  # as in blocks.py, which imports this
    from trainerd.tasks.cadence.blocks import GruMnModel, GruModel
    from trainerd.tasks.cadence.settings import SearchSettings

NUM_COMPLETIONS = 10
"""For each prefix."""
_AT_ONCE = 16
_REMEMBERED_BYTES = 512 << 20
"""What all paths together may remember, while each is picked and goes on: the paper's model remembers a megabyte for each."""

State = list[Tensor]


def numbers(layers: Iterable[tuple[int, int]], places: int) -> int:
    """What a model of such layers (hidden, attention) remembers of so many places. With attention that is all of them, and what was read
    last; else one state."""
    return sum(places * (hidden + attention) + 3 * hidden + attention if attention else hidden for hidden, attention in layers)


def at_once(prefixes: int, search: SearchSettings, remembered: int) -> int:
    """How many prefixes are completed together, where a path remembers so many numbers; 0: nobody knows."""
    each_bytes = 2 * 4 * remembered * paths(search, 1, worst=True)
    return max(1, min(prefixes, _AT_ONCE, _REMEMBERED_BYTES // max(1, each_bytes)))


def paths(search: SearchSettings, prefixes: int, *, worst: bool) -> int:
    """How many are followed at once: at worst all groups of all prefixes, each as wide as it may be; likely those of the prefixes that are
    equally long, for only those go together, and one path in each."""
    if search.method == "plain":
        return (prefixes if worst else _alike(prefixes)) * max(search.width, NUM_COMPLETIONS)
    if not worst:
        return _alike(prefixes) * search.groups
    widths = (groups * max(search.gamma, -(-NUM_COMPLETIONS // groups) + 1) for groups in range(1, search.groups + 1))
    return prefixes * max(widths)


def _alike(prefixes: int) -> int:
    """Half of them."""
    return -(-prefixes // 2)


def tokens(search: SearchSettings, places: int, *, worst: bool) -> int:
    """How many a path has before its last word: what was typed of the longest row, half of it or at worst all, and what was added."""
    return (places if worst else places // 2) + search.delta - 2


def further(model: GruModel | GruMnModel, tape: Tape, prefixes: int, rows: int, before: int) -> None:
    """So many paths go one word further, after `before` tokens each: their states are picked, and the scores of all words come beside
    those of the step before, and of the first."""
    outputs, products = model.weight.shape[0], len(tape.multiplied)
    with tape.counting_as(LOGITS):
        first, scores = tape.new((prefixes, outputs), "fp32"), tape.new((rows, outputs), "fp32")
    chosen = tape.new((rows,), "int64")
    old = model.remembered(tape, rows, before)
    state = [tape.new(part.shape, part.dtype) for part in old]
    del old
    inputs, categories = tape.input(rows, 1), tape.input(rows)
    hidden, after = model.further(inputs, categories, state)
    with tape.counting_as(LOGITS):
        raw = kernels.linear(model.features(ops.part(hidden, rows, hidden.shape[-1]), categories), model.weight, model.bias)
        exact = ops.to(raw, "fp32")
        chances = tape.new(raw.shape, "fp32")
    del tape.multiplied[products:]  # no step's: what oneDNN keeps of these comes of how many are alive, which changes from word to word
    del first, scores, chosen, state, inputs, categories, hidden, after, raw, exact, chances


def most(model: GruModel | GruMnModel, tape: Tape, prefixes: int, rows: int, before: int) -> int:
    """What that holds at its highest, beside the model, which is all that there is on the tape; the tape is put away."""
    try:
        held = tape.peak = tape.live
        with tape.no_grad(), tape.autocast():
            further(model, tape, prefixes, rows, before)
        return tape.peak - held
    finally:
        tape.close()
