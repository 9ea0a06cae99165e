"""The planner against the truth: the real engine trains where every tensor is counted and a budget is enforced."""

from __future__ import annotations

import pytest

from benchmarks.memory import counted
from benchmarks.memory.families import family
from benchmarks.memory.fit import fit, peak
from trainerd.config.model import RunConfig
from trainerd.memory.planner import FITS, Proposal

FAMILIES = ("gru", "gpt", "llama-lora", "convnet", "gru-mn")


def _comes_close(name: str, batch: int, share: float) -> None:
    """At least nine tenths of what fits, in whole samples; what is chosen is more than half of the largest even part within that (a
    whole step's samples lie beside it, more than the two pieces the limit is for); and nothing is refused while training as planned."""
    found = fit(name, batch, share)
    assert int(found.truth * 0.9) <= found.limit <= found.truth and found.refused == 0, found
    pieces = -(-batch // found.limit)
    assert found.chosen * 2 > -(-batch // pieces), found


def test_the_plan_is_within_a_tenth_of_what_fits() -> None:
    """Without a failed step; the truth is found by search."""
    _comes_close("convnet", 48, 0.9)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", [0.25, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_plan_is_within_a_tenth_of_what_fits(name: str, share: float) -> None:
    """The same for every family and several budgets."""
    _comes_close(name, 48, share)


def _applied(config: RunConfig, proposal: Proposal) -> RunConfig:
    """The configuration with the proposal's settings as a person would write them with --set."""
    document = config.model_dump(mode="json")
    for setting in proposal.settings:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        document[section][name] = int(value) if value.isdecimal() else value
    return RunConfig.model_validate(document)


def _every_proposal_fits(name: str, batch: int, share: float, **train: object) -> int:
    """Each is set as it was printed, planned again, and trained as planned: nothing is refused. The number of proposals."""
    parts = family(name)
    table = counted.FamilyTable(name, parts)
    smallest, whole = peak(name, 2, 1), peak(name, batch, batch // 2)
    budget = int(smallest + (whole - smallest) * share) if share > 0 else int(smallest * -share)
    config = counted.configuration(batch, **train)
    answer = counted.plan(table, config, budget)
    assert answer.verdict != FITS and answer.proposals, "nothing is proposed: another budget is needed to see something"
    for proposal in answer.proposals:
        changed = _applied(config, proposal)
        again = counted.plan(table, changed, budget)
        assert again.verdict == FITS, proposal.settings
        changed.train.micro_batch = again.setup.micro_batch
        count, result = counted.train(parts, changed, budget)
        assert result is not None and result.outcome == "finished" and count.refused == 0, (proposal.settings, count.peak, budget)
    return len(answer.proposals)


@pytest.mark.parametrize(("share", "train"), [(0.5, {"micro_batch": 16}), (0.15, {"micro_batch": 16, "optimizer": "adam"})])
def test_every_proposal_fits_when_it_is_applied(share: float, train: dict[str, object]) -> None:
    """A micro-batch that was fixed too large, for two budgets."""
    _every_proposal_fits("convnet", 16, share, **train)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("share", "train"), [(0.3, {"micro_batch": 48}), (0.8, {"micro_batch": 48}), (-0.97, {}), (-0.85, {})])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_proposal_of_every_family_fits(name: str, share: float, train: dict[str, object]) -> None:
    """The same over families and budgets, where anything is proposed."""
    try:
        print(f"\n{name} {share}: {_every_proposal_fits(name, 48, share, **train)} proposals")
    except AssertionError as error:
        if "nothing is proposed" not in str(error):
            raise
        pytest.skip("nothing would make it fit")
