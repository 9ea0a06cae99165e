"""Chooses what was left to choose: the fastest setup whose estimate fits the budget. Must not measure, ask or start anything.

The effective batch never changes, and what a person fixed stays. Exact techniques come before those that change last digits;
those that change the algorithm are only proposed. Every proposal has been estimated with the change applied, and fits for certain;
where none does, those that are likely to fit are proposed as that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from trainerd.memory import heap, limits
from trainerd.memory.estimate import Estimate
from trainerd.memory.techniques import DIFFERENT, TECHNIQUES, Technique
from trainerd.memory.timeline import Setup, Table

FITS, TIGHT, TOO_LARGE = "fits", "tight", "too large"
"""tight: the likely value fits and the upper bound does not; an out-of-memory would be recovered from."""
_PROPOSALS = 4
_FEW_PIECES = 32
_CLEARLY = 0.95

Estimating = Callable[[Setup], Estimate]
_Shown = tuple[Callable[[Setup], object], Callable[[Setup], str]]
_SHOWN: tuple[_Shown, ...] = (
    (lambda setup: setup.micro_batch, lambda setup: f"train.micro_batch={setup.micro_batch}"),
    (lambda setup: setup.precision, lambda setup: f"train.precision={setup.precision}"),
    (lambda setup: setup.optimizer, lambda setup: f"train.optimizer={setup.optimizer}"),
    (lambda setup: setup.logits, lambda setup: f"memory.logits={setup.logits}"),
    (lambda setup: setup.checkpointing, lambda setup: f"train.activation_checkpointing={setup.checkpointing}"),
    (lambda setup: setup.offload, lambda setup: f"memory.offload={setup.offload}"),
)
"""What of a setup a person can write, and how."""


@dataclass(frozen=True)
class Question:
    """What is wanted and what may be chosen. `fixed` are the keys a person set, e.g. train.micro_batch."""

    setup: Setup
    budget_bytes: int
    fixed: Collection[str] = ()
    splittable: bool = True
    ram_bytes: int | None = None
    """What a training on a GPU may take of the RAM besides; None: not known."""
    may_keep: bool = True
    """Whether large blocks may be kept from step to step where there is room for the holes between them."""


@dataclass(frozen=True)
class Proposal:
    """Changes that together make it fit, for certain or likely: what to set, at what price, and what it needs then."""

    settings: tuple[str, ...]
    price: tuple[str, ...]
    estimate: Estimate
    verdict: str = FITS


@dataclass(frozen=True)
class Answer:
    """The setup to train with, what it needs, and whether that fits; unless it does for certain, the smallest changes that would."""

    estimate: Estimate
    verdict: str
    budget_bytes: int
    used: tuple[str, ...] = ()
    """Techniques the plan has taken up."""
    proposals: tuple[Proposal, ...] = ()
    least: Proposal | None = None
    """Where nothing is even likely to fit: what needs least of all that was tried, and never more than the setup, by neither number."""
    splittable: bool = True

    @property
    def setup(self) -> Setup:
        return self.estimate.setup

    @property
    def no_model_fits(self) -> str:
        """In words, when the process alone is too much; "" else."""
        return limits.no_model_fits(self.setup.device, self.estimate.own_bytes, self.budget_bytes)


def judge(needed: Estimate, budget_bytes: int, ram_bytes: int | None = None) -> str:
    """Whether the budget holds the upper bound, only the point, or neither. What is moved to the RAM must fit there for certain."""
    if not _ram_holds(needed, ram_bytes):
        return TOO_LARGE
    if needed.needed.upper <= budget_bytes:
        return FITS
    return TIGHT if needed.needed.point <= budget_bytes else TOO_LARGE


def _ram_holds(needed: Estimate, ram_bytes: int | None) -> bool:
    return needed.setup.offload == "none" or ram_bytes is None or needed.ram.upper <= ram_bytes


def smaller(answer: Answer) -> str:
    """What is left to change where no setting makes it fit."""
    batch = answer.setup.effective_batch
    if answer.splittable or batch < 2:
        return "A smaller model would fit."
    return f"This batch cannot be split: a train.batch_size below {batch:,} would need less, in another mathematics; or a smaller model."


def choose(question: Question, table: Table, estimating: Estimating, at_least: Estimating | None = None) -> Answer:
    """The fastest setup that fits; a tight one only when nothing else does. On a CPU it is chosen as large blocks are given back, and
    where there is room for the holes too they are kept: that is faster, and changes no bit. `at_least`: never more than the estimate,
    with the same pace, and cheaper: what is too large already by that is not estimated."""
    answer = _chosen(question, table, _Asking(question, estimating, at_least))
    if answer.verdict != FITS or answer.setup.heap != heap.GIVEN_BACK or not question.may_keep:
        return answer
    kept = estimating(replace(answer.setup, heap=heap.KEPT))
    fits = judge(kept, question.budget_bytes, question.ram_bytes) == FITS
    return replace(answer, estimate=kept) if fits else answer


class _Asking:
    """Estimates, each asked for once; and what is needed at least, where that is enough."""

    def __init__(self, question: Question, estimating: Estimating, at_least: Estimating | None) -> None:
        self._question, self._estimating, self._at_least = question, estimating, at_least
        self._seen: dict[Setup, Estimate] = {}
        self._least: dict[Setup, Estimate] = {}

    def __call__(self, setup: Setup) -> Estimate:
        if setup not in self._seen:
            self._seen[setup] = self._estimating(setup)
        return self._seen[setup]

    def roughly(self, setup: Setup) -> Estimate:
        """What is needed at least; its pace is the same."""
        if self._at_least is None:
            return self(setup)
        if setup not in self._least:
            self._least[setup] = self._at_least(setup)
        return self._least[setup]

    def may_fit(self, setup: Setup, wanted: str) -> bool:
        return self._is(wanted, self.roughly(setup))

    def fits(self, setup: Setup, wanted: str) -> bool:
        """As wanted, or better."""
        return self.may_fit(setup, wanted) and self._is(wanted, self(setup))

    def _is(self, wanted: str, needed: Estimate) -> bool:
        verdict = judge(needed, self._question.budget_bytes, self._question.ram_bytes)
        return verdict == FITS or (wanted == TIGHT and verdict == TIGHT)

    def least(self, among: Collection[Setup] = (), beside: Estimate | None = None) -> Estimate:
        """Of these, or of all that was asked about, what needs least by the number a refusal goes by: the likely one. What the RAM does
        not hold only where nothing else is left; `beside`: what needs more than that by either number does not count."""
        roughs = [self.roughly(setup) for setup in among] or [*self._seen.values(), *self._least.values()]
        best = beside
        for holds in (True, False):
            for rough in sorted(roughs, key=_likely):
                if _ram_holds(rough, self._question.ram_bytes) is not holds or (best is not None and _likely(rough) >= _likely(best)):
                    continue
                found = self(rough.setup)
                more = beside is not None and found.needed.upper > beside.needed.upper
                if not more and _ram_holds(found, self._question.ram_bytes) is holds and (best is None or _likely(found) < _likely(best)):
                    best = found
            if best is not None:
                break
        assert best is not None, "nothing was asked"
        return best


def _chosen(question: Question, table: Table, ask: _Asking) -> Answer:
    taken = _taken(question, table, ask)
    if taken is not None:
        best, used = taken
        verdict = judge(best, question.budget_bytes, question.ram_bytes)
        better = _proposals(question, table, ask, FITS) if verdict == TIGHT else ()
        return Answer(best, verdict, question.budget_bytes, used, better)
    smallest = _smallest(question, table, ask)
    proposals = _proposals(question, table, ask, FITS) or _proposals(question, table, ask, TIGHT)
    least = None if proposals else _least(question, ask.least(beside=smallest), smallest)
    return Answer(smallest, TOO_LARGE, question.budget_bytes, (), proposals, least, question.splittable)


def _taken(question: Question, table: Table, ask: _Asking) -> tuple[Estimate, tuple[str, ...]] | None:
    """What a plan takes by itself, and the techniques for it: what fits for certain before what is tight. None where nothing fits."""
    if ask.fits(question.setup, FITS):
        return ask(question.setup), ()
    ways = _automatic(question, table)
    for wanted in (FITS, TIGHT):
        found = _fastest(ways, question, ask, wanted)
        if found is not None:
            best, used = found
            return best, used if best.setup.micro_batch == question.setup.micro_batch else (*used, "smaller micro-batch")
    return None


def _smallest(question: Question, table: Table, ask: _Asking) -> Estimate:
    """Where a plan can take nothing that fits: of what it could take, what needs least."""
    ways = [setup for setup, _ in _automatic(question, table)]
    return ask.least([*ways, *(setup.with_micro_batch(1) for setup in ways if _may_split(question))])


def _fastest(
    ways: Sequence[tuple[Setup, tuple[str, ...]]], question: Question, ask: _Asking, wanted: str
) -> tuple[Estimate, tuple[str, ...]] | None:
    """The first way that fits, which changes least, unless another is clearly faster. One that cannot be, in the largest pieces there
    are, is not searched: smaller pieces are slower, and what lies on the host costs time, too."""
    best: tuple[Estimate, tuple[str, ...]] | None = None
    at_least: dict[Setup, float] = {}
    for setup, used in ways:
        resident = replace(setup, offload=question.setup.offload)
        fastest = at_least.get(resident, 0.0) if setup != resident else 0.0
        if best is None or fastest < best[0].pace * _CLEARLY:
            fastest = max(fastest, ask.roughly(_whole(setup, question)).pace)
        at_least[setup] = fastest
        if best is not None and fastest >= best[0].pace * _CLEARLY:
            continue
        found = _largest(setup, question, ask, wanted, math.inf if best is None else best[0].pace * _CLEARLY)
        if found is not None and (best is None or found.pace < best[0].pace * _CLEARLY):
            best = found, used
    return best


def _whole(setup: Setup, question: Question) -> Setup:
    return setup.with_micro_batch(setup.effective_batch) if _may_split(question) else setup


def _likely(estimate: Estimate) -> float:
    return estimate.needed.point


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


def _largest(setup: Setup, question: Question, ask: _Asking, wanted: str, faster_than: float = math.inf) -> Estimate | None:
    """The largest even micro-batch whose estimate is as wanted: the batch in as few pieces as possible. None: not one, or none that
    could be so fast, for smaller pieces are slower."""
    batch = setup.effective_batch
    if not _may_split(question):
        return ask(setup) if ask.fits(setup, wanted) else None
    whole = setup.with_micro_batch(batch)
    if ask.fits(whole, wanted):
        return ask(whole)
    # In one piece no gradients wait beside the activations, so two may need more than one; from there on it goes down.
    if batch < 2 or not ask.may_fit(setup.with_micro_batch(1), wanted):
        return None
    pieces = _fewest(setup, question, ask, wanted, ask.may_fit, 2)
    most = setup.with_micro_batch(_samples(setup, pieces))
    if ask.roughly(most).pace >= faster_than:
        return None
    if ask.fits(most, wanted):
        return ask(most)
    if pieces == batch:
        return None
    # What the replay adds is nearly a share: by so much less may be needed at least.
    share = ask.roughly(most).needed.upper / ask(most).needed.upper
    less = replace(question, budget_bytes=int(question.budget_bytes * share))
    number = _fewest(setup, less, ask, wanted, ask.fits, -(-batch // (most.micro_batch - 1)))
    # Fewer may fit where some between do not, for segments are whole ones: of many pieces it would be no gain.
    tried = range(pieces + 1, min(number, _FEW_PIECES + 1))
    sizes = [setup.with_micro_batch(samples) for samples in dict.fromkeys(_samples(setup, each) for each in (*tried, number))]
    return next((ask(one) for one in sizes if ask.fits(one, wanted)), None)


def _fewest(setup: Setup, question: Question, ask: _Asking, wanted: str, good: Callable[[Setup, str], bool], low: int) -> int:
    """In how few pieces, from `low` on, the batch is good; each of its samples alone is taken for good."""
    batch = high = setup.effective_batch
    turn = 0
    while low < high:
        # What is needed is nearly a line in the samples: where it meets the budget, and now and then the middle.
        turn += 1
        middle = math.isqrt(low * high) if turn % 3 == 0 else _meeting(setup, question, ask, wanted, (low - 1, high))
        middle = min(max(middle, low), high - 1)
        samples = _samples(setup, middle)
        if good(setup.with_micro_batch(samples), wanted):
            high = -(-batch // samples)  # the fewest pieces of so many
        else:
            low = -(-batch // (samples - 1))
    return low


def _meeting(setup: Setup, question: Question, ask: _Asking, wanted: str, pieces: tuple[int, int]) -> int:
    """In how many pieces the batch would just fit, by the line through two numbers of them: too few, and enough."""
    samples = [_samples(setup, number) for number in pieces]
    ranges = [ask.roughly(setup.with_micro_batch(number)).needed for number in samples]
    more, less = (needed.upper if wanted == FITS else needed.point for needed in ranges)
    if more <= less:
        return sum(pieces) // 2
    fitting = samples[1] + (question.budget_bytes - less) * (samples[0] - samples[1]) / (more - less)
    return math.ceil(setup.effective_batch / max(1, math.floor(fitting)))


def _samples(setup: Setup, pieces: int) -> int:
    return -(-setup.effective_batch // pieces)


def _least(question: Question, least: Estimate, shown: Estimate) -> Proposal:
    """Of all that was tried, what needs least; with what a person would have to set for it: nothing where that is shown already, and no
    micro-batch where the plan chooses it."""
    if least.setup == shown.setup:
        return Proposal((), (), least, TOO_LARGE)
    first = least.setup.with_micro_batch(question.setup.micro_batch) if _may_split(question) else least.setup
    return Proposal(tuple(words(first) for of, words in _SHOWN if of(first) != of(question.setup)), (), least, TOO_LARGE)


def _proposals(question: Question, table: Table, ask: _Asking, wanted: str) -> tuple[Proposal, ...]:
    """The smallest sets of changes that fit as wanted: one, else two, else three; what a person fixed may be proposed to be freed."""
    for number in (1, 2, 3):
        found: list[tuple[int, Proposal]] = []
        for chosen in itertools.combinations(TECHNIQUES, number):
            if len({technique.key for technique in chosen}) < number:
                continue
            proposal = _tried(question, table, chosen, ask, wanted)
            if proposal is not None:
                found.append((sum(t.kind == DIFFERENT for t in chosen), proposal))
        if found:
            return tuple(proposal for _, proposal in sorted(found, key=lambda pair: pair[0])[:_PROPOSALS])
    return ()


def _tried(question: Question, table: Table, chosen: tuple[Technique, ...], ask: _Asking, wanted: str) -> Proposal | None:
    """The proposal these techniques make, if it fits as wanted."""
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
        found = _largest(setup, replace(question, fixed=()), ask, wanted)
        if found is None or found.setup.micro_batch == question.setup.micro_batch:
            return None
        setup = found.setup
        settings.append(splits[0].setting(setup))
    elif _may_split(question):
        # The plan would split the batch by itself: try with the smallest pieces, and let it choose when it starts.
        found = _largest(setup, question, ask, wanted)
        if found is None:
            return None
        setup = found.setup
    if not ask.fits(setup, wanted):
        return None
    verdict = judge(ask(setup), question.budget_bytes, question.ram_bytes)
    return Proposal(tuple(settings), tuple(technique.price for technique in chosen), ask(setup), verdict)
