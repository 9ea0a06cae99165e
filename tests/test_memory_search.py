"""The planner's search finds what trying everything finds, and estimates little of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from trainerd.memory import planner
from trainerd.memory.estimate import Estimate, estimate
from trainerd.memory.planner import FITS, TIGHT, TOO_LARGE, Question, choose, judge
from trainerd.memory.timeline import Setup
from trainerd.tasks.cadence.blocks import table
from trainerd.tasks.cadence.settings import CadenceSettings

OWN = {"embedding": 64, "hidden": [200, 150], "attention": [100, 75], "context": 50}
GRU = table(CadenceSettings())
SMALL_MN = table(CadenceSettings.model_validate({"model": "gru-mn", "vocabulary": 3000, "max_words": 9, "eval_prefixes": 0, "gru_mn": OWN}))


_NEARLY, _RANKS = 1.1, (FITS, TIGHT, TOO_LARGE)


def all_tried(question: Question, model: Any) -> tuple[str, Setup]:
    """Every way with every number of pieces, the fewest first: the plan's own rules, without any search."""
    batch, fits = question.setup.effective_batch, {FITS: (FITS,), TIGHT: (FITS, TIGHT)}
    pieces = sorted({-(-batch // number) for number in range(1, batch + 1)}, reverse=True)
    splits = question.splittable and "train.micro_batch" not in question.fixed
    if judge(estimate(model, question.setup), question.budget_bytes, question.ram_bytes) == FITS:
        return FITS, question.setup
    for wanted in (FITS, TIGHT):
        best: Estimate | None = None
        for setup, _ in planner._automatic(question, model):
            tried = (estimate(model, setup.with_micro_batch(samples)) for samples in (pieces if splits else [setup.micro_batch]))
            found = next((one for one in tried if judge(one, question.budget_bytes, question.ram_bytes) in fits[wanted]), None)
            if found is not None and (best is None or found.pace < best.pace * planner._CLEARLY):
                best = found
        if best is not None:
            return judge(best, question.budget_bytes, question.ram_bytes), best.setup
    last = planner._automatic(question, model)[-1][0]
    return TOO_LARGE, min((estimate(model, one) for one in (last, last.with_micro_batch(1))), key=lambda one: one.needed.upper).setup


def _compared(model: Any, batch: int, precision: str, share: float, fixed: tuple[str, ...] = ()) -> int:
    """How many replays were spared."""
    setup = Setup("cuda", precision, batch, batch)
    most = estimate(model, setup).needed.upper
    least = estimate(model, setup.with_micro_batch(1)).needed.upper
    question = Question(setup, int(least + share * (most - least)), fixed, True, 8 << 30)
    asked: list[Setup] = []

    def counted(setup: Setup) -> Estimate:
        asked.append(setup)
        return estimate(model, setup)

    answer = choose(question, model, counted, lambda setup: estimate(model, setup, replays=False))
    some = len(asked)
    verdict, best = all_tried(question, model)
    # Beyond so many pieces, what fits between numbers of them that do not is not looked for: a thirtieth more, with its time.
    near = best.accumulation > planner._FEW_PIECES and answer.estimate.pace <= estimate(model, best).pace * _NEARLY
    assert answer.verdict == verdict and (answer.setup == best or near), question
    assert answer.estimate == estimate(model, answer.setup)
    plain = choose(question, model, counted)
    assert _RANKS.index(answer.verdict) <= _RANKS.index(plain.verdict)
    return len(asked) - 2 * some


@pytest.mark.parametrize(
    ("model", "batch", "shares"), [(GRU, 512, (0.0, 0.1, 0.4, 0.8)), (SMALL_MN, 24, (0.3, 0.62))], ids=["gru", "gru-mn"]
)
def test_the_search_finds_what_trying_everything_finds(model: Any, batch: int, shares: tuple[float, ...]) -> None:
    """The same verdict and the same setup, though what is too large by its tensors alone is never replayed."""
    spared = sum(_compared(model, batch, precision, share) for precision, share in product(("fp32", "bf16"), shares))
    assert spared > 0 or batch < 100  # of a small batch there is little to be spared


def test_what_fits_only_beyond_what_does_not_is_found() -> None:
    """In 8 pieces and in 5 it fits, in 7 not, for segments are whole ones: the 5 are taken."""
    question = Question(Setup("cuda", "bf16", 512, 512), 744_992_277, ("memory.offload", "train.precision"), True, 8 << 30)
    answer = choose(question, SMALL_MN, lambda setup: estimate(SMALL_MN, setup), lambda setup: estimate(SMALL_MN, setup, replays=False))
    between = judge(estimate(SMALL_MN, question.setup.with_micro_batch(74)), question.budget_bytes, question.ram_bytes)
    assert between != FITS and (answer.verdict, answer.setup.micro_batch) == (FITS, 103)


def test_a_way_is_found_where_one_sample_does_not_fit_and_several_do() -> None:
    """One sample may need a segment more than several do: a budget of just what one needs, and a little below, in many pieces and few."""
    for share in (-0.01, 0.0):
        _compared(SMALL_MN, 512, "fp32", share, ("memory.offload", "train.precision"))


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [(), ("memory.offload", "train.precision")], ids=["free", "fixed"])
@pytest.mark.parametrize("batch", [7, 48, 100, 512])
@pytest.mark.parametrize("model", [GRU, SMALL_MN], ids=["gru", "gru-mn"])
def test_any_search_finds_what_trying_everything_finds(model: Any, batch: int, fixed: tuple[str, ...]) -> None:
    """Over budgets from too little to plenty, also where one sample needs a segment more than several do."""
    for precision, share in product(("fp32", "bf16"), (-0.1, -0.01, 0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 0.99)):
        _compared(model, batch, precision, share, fixed)


@pytest.mark.parametrize("model", [GRU, SMALL_MN], ids=["gru", "gru-mn"])
def test_without_the_replay_it_is_never_more(model: Any) -> None:
    """Every number of the device, likely and at most; all that does not depend on the allocator is the same."""
    for precision, samples, accumulation, offload in product(("fp32", "bf16"), (1, 5, 64), (1, 4), ("none", "optimizer", "zero2")):
        setup = Setup("cuda", precision, samples, samples * accumulation, offload=offload)
        low, real = estimate(model, setup, replays=False), estimate(model, setup)
        assert estimate(model, setup, replays=False) == low  # also when the other has been asked
        for measure in ("allocated", "reserved", "driver"):
            one, other = getattr(low, measure), getattr(real, measure)
            assert one.point <= other.point and one.upper <= other.upper, (setup, measure)
        assert (low.pace, low.ram, low.disk, low.tensors, low.phases) == (real.pace, real.ram, real.disk, real.tensors, real.phases)
