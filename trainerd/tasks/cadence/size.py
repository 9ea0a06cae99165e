"""How many parameters a model will have, from settings alone, for whoever plans a run without torch. Must not read data.

What prepare() finds, the words and categories, is known before it only as a bound.
"""

from __future__ import annotations

from trainerd.config.model import DataConfig
from trainerd.memory.tape import Tape
from trainerd.tasks.cadence import blocks, generator
from trainerd.tasks.cadence.settings import CadenceSettings

_SPECIAL = 2  # unknown and rare words


def expected_parameters(settings: CadenceSettings, data: DataConfig) -> int:
    """Of a model for this data: with all the words it may know, and the fewest categories there may be."""
    rows = data.size or (generator.DEFAULT_ROWS if data.path is None else None)
    words = settings.vocabulary if rows is None else min(settings.vocabulary, rows * settings.max_words)
    tape = Tape()
    blocks.build(tape, settings, blocks.Sizes(words + _SPECIAL + 2, words + _SPECIAL + 1, 1))
    return sum(parameter.numel for parameter in tape.parameters)
