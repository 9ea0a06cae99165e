"""How good completions are: do they hold the query, stay in the category, differ from each other. Must not train.

Measured on a seeded sample of held-out rows, each cut at a random letter between a third and two thirds of its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from trainerd.tasks.cadence import completing
from trainerd.tasks.cadence.completing import NUM_COMPLETIONS
from trainerd.tasks.cadence.dataset import TokenRows
from trainerd.tasks.cadence.model import QueryModel
from trainerd.tasks.cadence.search import Completion, Prompt, complete, typed
from trainerd.tasks.cadence.settings import SearchSettings
from trainerd.tasks.cadence.vocabulary import NUM_SPECIAL, Vocabulary

_SMOOTHING = 0.1

_Asked = tuple[str, str, int]
"""A held-out text, what was typed of it, and its category."""
_Found = tuple[str, int, list[Completion]]
InParts = Callable[[Sequence[_Asked], int, Callable[[Sequence[_Asked]], list[_Found]]], list[_Found]]
"""A task context's in_parts()."""


def _all(asked: Sequence[_Asked], at_once: int, work: Callable[[Sequence[_Asked]], list[_Found]]) -> list[_Found]:
    """Where nobody watches over the memory."""
    return [found for start in range(0, len(asked), at_once) for found in work(asked[start : start + at_once])]


class CategoryGuess:
    """Naive Bayes over words: the category a text would be taken for."""

    def __init__(self, counts: npt.NDArray[np.uint32]) -> None:
        smoothed = counts.astype(np.float64) + _SMOOTHING
        self._words = np.log(smoothed / smoothed.sum(0))
        self._prior = np.log(smoothed.sum(0) / smoothed.sum())

    def __call__(self, tokens: Sequence[int]) -> int:
        return int(np.argmax(self._words[list(tokens)].sum(0) + self._prior))


def generation(
    model: QueryModel,
    vocabulary: Vocabulary,
    rows: TokenRows,
    num_prefixes: int,
    settings: SearchSettings,
    seed: int,
    in_parts: InParts = _all,
) -> dict[str, float]:
    """success@10, MRR@10, top-1, category consistency and distinct-1/2 of the completions of held-out prefixes."""
    guess = CategoryGuess(np.load(rows.folder / "word_categories.npy", mmap_mode="r"))
    asked = _sample(vocabulary, rows, num_prefixes, seed)
    places = completing.tokens(settings, int(rows.lengths.max()), worst=True)
    at_once = completing.at_once(len(asked), settings, model.remembers(places))

    def completed(some: Sequence[_Asked]) -> list[_Found]:
        found: list[_Found] = []
        understood = [typed(vocabulary, prefix) for _, prefix, _ in some]
        prompts = [Prompt(category, context, rest) for (_, _, category), (_, context, rest) in zip(some, understood, strict=True)]
        results = complete(model, vocabulary, prompts, NUM_COMPLETIONS, settings)
        for (text, _, category), (words, _, _), completions in zip(some, understood, results, strict=True):
            whole = [Completion((words + completion.text).strip(), completion.score) for completion in completions]
            found.append((text, category, whole))
        return found

    return _scored(vocabulary, guess, in_parts(asked, at_once, completed))


def _sample(vocabulary: Vocabulary, rows: TokenRows, number: int, seed: int) -> list[_Asked]:
    """Held-out texts, what was typed of each, and its category. A text with an unknown word shows it as a sign nobody types."""
    rng = np.random.default_rng([seed, 7])
    chosen = rng.permutation(len(rows))[:number]
    cuts = rng.uniform(1 / 3, 2 / 3, len(chosen))
    asked = []
    for index, cut in zip(chosen.tolist(), cuts.tolist(), strict=True):
        tokens = [token for token in rows[index].tolist() if token < vocabulary.num_words]
        text = "".join(" \N{REPLACEMENT CHARACTER}" if t < NUM_SPECIAL else vocabulary.surfaces[t] for t in tokens).strip()
        typed_letters = max(1, round(len(text) * cut))
        asked.append((text, text[:typed_letters], int(rows.categories[index])))
    return asked


def _scored(vocabulary: Vocabulary, guess: CategoryGuess, found: list[_Found]) -> dict[str, float]:
    ranks: list[float] = []
    consistent: list[bool] = []
    distinct: dict[int, list[float]] = {1: [], 2: []}
    for text, category, completions in found:
        texts = [completion.text for completion in completions]
        ranks.append(1.0 / (1 + texts.index(text)) if text in texts else 0.0)
        consistent += [guess(vocabulary.encode(completion)) == category for completion in texts]
        for n, values in distinct.items():
            grams = [gram for completion in texts for gram in _grams(completion.split(), n)]
            if grams:
                values.append(len(set(grams)) / len(grams))
    return {
        f"success@{NUM_COMPLETIONS}": _mean([rank > 0 for rank in ranks]),
        f"mrr@{NUM_COMPLETIONS}": _mean(ranks),
        "top1": _mean([rank == 1 for rank in ranks]),
        "category_consistency": _mean(consistent),
        "distinct1": _mean(distinct[1]),
        "distinct2": _mean(distinct[2]),
    }


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
