"""Chooses what was left to choose: the fastest setup whose estimate fits the budget. Must not measure, ask or start anything.

The effective batch never changes, and what a person fixed stays. Exact techniques come before those that change last digits;
those that change the algorithm are only proposed. Every proposal has been estimated with the change applied, and fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from trainerd.memory import heap, limits
from trainerd.memory.estimate import Estimate
from trainerd.memory.techniques import DIFFERENT, TECHNIQUES, Technique
from trainerd.memory.timeline import Setup, Table

FITS, TIGHT, TOO_LARGE = "fits", "tight", "too large"
"""tight: the likely value fits and the upper bound does not; an out-of-memory would be recovered from."""
_PROPOSALS = 4
_CLEARLY = 0.95

Estimating = Callable[[Setup], Estimate]


@dataclass(frozen=True)
class Question:
    """What is wanted and what may be chosen. `fixed` are the keys a person set, e.g. train.micro_batch."""

    setup: Setup
    budget_bytes: int
    fixed: Collection[str] = ()
    splittable: bool = True
    ram_bytes: int | None = None
    """What a training on a GPU may take of the RAM besides; None: not known."""


@dataclass(frozen=True)
class Proposal:
    """Changes that together make it fit: what to set, and at what price."""

    settings: tuple[str, ...]
    price: tuple[str, ...]
    estimate: Estimate


@dataclass(frozen=True)
class Answer:
    """The setup to train with, what it needs, and whether that fits; unless it does for certain, the smallest changes that would."""

    estimate: Estimate
    verdict: str
    budget_bytes: int
    used: tuple[str, ...] = ()
    """Techniques the plan has taken up."""
    proposals: tuple[Proposal, ...] = ()

    @property
    def setup(self) -> Setup:
        return self.estimate.setup

    @property
    def no_model_fits(self) -> str:
        """In words, when the process alone is too much; "" else."""
        return limits.no_model_fits(self.setup.device, self.estimate.own_bytes, self.budget_bytes)


def judge(needed: Estimate, budget_bytes: int, ram_bytes: int | None = None) -> str:
    """Whether the budget holds the upper bound, only the point, or neither. What is moved to the RAM must fit there for certain."""
    if needed.setup.offload != "none" and ram_bytes is not None and needed.ram.upper > ram_bytes:
        return TOO_LARGE
    if needed.needed.upper <= budget_bytes:
        return FITS
    return TIGHT if needed.needed.point <= budget_bytes else TOO_LARGE


def choose(question: Question, table: Table, estimating: Estimating) -> Answer:
    """The fastest setup that fits; a tight one only when nothing else does. On a CPU it is chosen as large blocks are given back, and
    where there is room for the holes too they are kept: that is faster, and changes no bit."""
    answer = _chosen(question, table, estimating)
    if answer.verdict != FITS or answer.setup.heap != heap.GIVEN_BACK:
        return answer
    kept = estimating(replace(answer.setup, heap=heap.KEPT))
    fits = judge(kept, question.budget_bytes, question.ram_bytes) == FITS
    return replace(answer, estimate=kept) if fits else answer


def _chosen(question: Question, table: Table, estimating: Estimating) -> Answer:
    seen: dict[Setup, Estimate] = {}

    def ask(setup: Setup) -> Estimate:
        if setup not in seen:
            seen[setup] = estimating(setup)
        return seen[setup]

    first = ask(question.setup)
    if judge(first, question.budget_bytes, question.ram_bytes) == FITS:
        return Answer(first, FITS, question.budget_bytes)
    ways = list(_automatic(question, table))
    for wanted in (FITS, TIGHT):
        found = [(largest, used) for setup, used in ways if (largest := _largest(setup, question, ask, wanted)) is not None]
        if found:
            best, used = _fastest(found)
            taken = used if best.setup.micro_batch == question.setup.micro_batch else (*used, "smaller micro-batch")
            better = _proposals(question, table, ask) if wanted == TIGHT else ()
            return Answer(best, judge(best, question.budget_bytes, question.ram_bytes), question.budget_bytes, taken, better)
    last = ways[-1][0]
    smallest = min((ask(setup) for setup in ([last, last.with_micro_batch(1)] if _may_split(question) else [last])), key=_upper)
    return Answer(smallest, TOO_LARGE, question.budget_bytes, (), _proposals(question, table, ask))


def _fastest(found: list[tuple[Estimate, tuple[str, ...]]]) -> tuple[Estimate, tuple[str, ...]]:
    """The first, which changes least, unless another is clearly faster."""
    best = found[0]
    for other in found[1:]:
        if other[0].pace < best[0].pace * _CLEARLY:
            best = other
    return best


def _upper(estimate: Estimate) -> float:
    return estimate.needed.upper


def _may_split(question: Question) -> bool:
    return question.splittable and "train.micro_batch" not in question.fixed


def _automatic(question: Question, table: Table) -> list[tuple[Setup, tuple[str, ...]]]:
    """The setups a plan may take by itself, the least changed first; the micro-batch is found for each."""
    found: list[tuple[Setup, tuple[str, ...]]] = [(question.setup, ())]
    for technique in TECHNIQUES:
        if not technique.automatic or technique.key in question.fixed or technique.key == "train.micro_batch":
            continue
        for setup, used in list(found):
            changed = technique.applied(setup, table)
            if changed is not None:
                found.append((changed, (*used, technique.name)))
    return found


def _largest(setup: Setup, question: Question, ask: Estimating, wanted: str) -> Estimate | None:
    """The largest even micro-batch whose estimate is as wanted: the batch in as few pieces as possible. None: not one."""

    def good(pieces: int, samples: int | None = None) -> bool:
        needed = ask(setup.with_micro_batch(samples or _samples(setup, pieces)))
        verdict = judge(needed, question.budget_bytes, question.ram_bytes)
        return verdict == FITS or (wanted == TIGHT and verdict == TIGHT)

    batch = setup.effective_batch
    if not _may_split(question):
        return ask(setup) if good(1, setup.micro_batch) else None
    if good(1):
        return ask(setup.with_micro_batch(batch))
    # In one piece no gradients wait beside the activations, so two may need more than one; from there on it goes down.
    low, high = 2, batch
    if high < low or not good(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return ask(setup.with_micro_batch(_samples(setup, low)))


def _samples(setup: Setup, pieces: int) -> int:
    return -(-setup.effective_batch // pieces)


def _proposals(question: Question, table: Table, ask: Estimating) -> tuple[Proposal, ...]:
    """The smallest sets of changes that fit: one, else two, else three; what a person fixed may be proposed to be freed."""
    for number in (1, 2, 3):
        found: list[tuple[int, Proposal]] = []
        for chosen in itertools.combinations(TECHNIQUES, number):
            if len({technique.key for technique in chosen}) < number:
                continue
            proposal = _tried(question, table, chosen, ask)
            if proposal is not None:
                found.append((sum(t.kind == DIFFERENT for t in chosen), proposal))
        if found:
            return tuple(proposal for _, proposal in sorted(found, key=lambda pair: pair[0])[:_PROPOSALS])
    return ()


def _tried(question: Question, table: Table, chosen: tuple[Technique, ...], ask: Estimating) -> Proposal | None:
    """The proposal these techniques make, if it fits."""
    setup, settings = question.setup, []
    for technique in chosen:
        if technique.key == "train.micro_batch":
            if not question.splittable:
                return None
            continue
        changed = technique.applied(setup, table)
        if changed is None:
            return None
        setup = changed
        settings.append(technique.setting(setup))
    splits = [t for t in chosen if t.key == "train.micro_batch"]
    if splits:
        found = _largest(setup, replace(question, fixed=()), ask, FITS)
        if found is None or found.setup.micro_batch == question.setup.micro_batch:
            return None
        setup = found.setup
        settings.append(splits[0].setting(setup))
    elif _may_split(question):
        # The plan would split the batch by itself: try with the smallest pieces, and let it choose when it starts.
        found = _largest(setup, question, ask, FITS)
        if found is None:
            return None
        setup = found.setup
    found = ask(setup)
    if judge(found, question.budget_bytes, question.ram_bytes) != FITS:
        return None
    return Proposal(tuple(settings), tuple(technique.price for technique in chosen), found)
