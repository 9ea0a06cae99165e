"""Count-based baselines for CADENCE: unigram, and interpolated modified Kneser-Ney over any chain of contexts. Our own code, no torch.

A chain says which context a word has at each order, shortest last: (u, v), (v,), (). With the category in front of it, (c, u, v),
(u, v), (v,), (), the same estimate becomes a category-conditioned one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

Context = tuple[object, ...]
Row = Sequence[int]
BEGIN = -1


def unigram(train: Iterable[Row], num_outputs: int) -> Counter[int]:
    """How often each word (or end) occurs; add one for every word when asking, so that none is impossible."""
    return Counter(word for row in train for word in row)


def unigram_nats(counts: Counter[int], held: Iterable[Row], num_outputs: int) -> tuple[float, int]:
    """Total nats and number of words of held-out rows."""
    total = sum(counts.values()) + num_outputs
    words = [word for row in held for word in row]
    return -sum(math.log((counts[word] + 1) / total) for word in words), len(words)


class KneserNey:
    """Interpolated modified Kneser-Ney (Chen and Goodman): three discounts per order, continuation counts below the highest."""

    def __init__(self, train: Iterable[tuple[int, Row]], num_outputs: int, by_category: bool = False, order: int = 3) -> None:
        self._num_outputs = num_outputs
        self._order = order
        self._by_category = by_category
        self._levels = order + by_category
        counts: list[dict[Context, Counter[int]]] = [defaultdict(Counter) for _ in range(self._levels)]
        for category, row in train:
            for chain, word in self._places(category, row):
                counts[0][chain[0]][word] += 1
        for level in range(1, self._levels):
            self._continue(counts[level - 1], counts[level], level)
        self._counts = counts
        self._discounts = [_discounts(level) for level in counts]

    def _places(self, category: int, row: Row) -> Iterator[tuple[list[Context], int]]:
        padded = [BEGIN] * (self._order - 1) + list(row)
        for place, word in enumerate(row):
            longest: Context = tuple(padded[place : place + self._order - 1])
            chain: list[Context] = [longest[start:] for start in range(self._order)]
            yield ([(f"category {category}", *longest), *chain] if self._by_category else chain), word

    def _continue(self, above: dict[Context, Counter[int]], below: dict[Context, Counter[int]], level: int) -> None:
        """Counts of a shorter context: in how many longer ones a word occurs; after a begin, how often, for there is only one."""
        for context, words in above.items():
            shorter = context[1:]
            for word, count in words.items():
                below[shorter][word] += count if shorter and shorter[0] == BEGIN else 1

    def probability(self, chain: Sequence[Context], word: int) -> float:
        chance = 1.0 / self._num_outputs
        for level in reversed(range(self._levels)):
            words = self._counts[level].get(chain[level])
            if words is None:
                continue
            discounts = self._discounts[level]
            total, count = sum(words.values()), words.get(word, 0)
            spread = sum(discounts[min(other, 3)] for other in words.values())
            chance = (max(count - discounts[min(count, 3)], 0.0) + spread * chance) / total
        return chance

    def nats(self, held: Iterable[tuple[int, Row]]) -> tuple[float, int]:
        """Total nats and number of words of held-out rows."""
        total, number = 0.0, 0
        for category, row in held:
            for chain, word in self._places(category, row):
                total -= math.log(self.probability(chain, word))
                number += 1
        return total, number


def _discounts(counts: dict[Context, Counter[int]]) -> list[float]:
    """What is taken from counts of 0, 1, 2 and more, estimated from how many n-grams occur once, twice, …"""
    of = Counter(count for words in counts.values() for count in words.values() if count <= 4)
    if not all(of[count] for count in (1, 2, 3, 4)):
        return [0.0, 0.5, 0.5, 0.5]
    share = of[1] / (of[1] + 2 * of[2])
    return [0.0, *(max(0.0, min(count, count - (count + 1) * share * of[count + 1] / of[count])) for count in (1, 2, 3))]
