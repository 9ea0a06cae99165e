"""Runs that needed far more than was foretold: said in words, corrected by nothing, and never above the bound again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import forecast_view, outlook
from tests.test_memory_planner import FP32, GRU, receipt, trusted
from tests.trainers import new_run
from trainerd.config.load import resolve
from trainerd.contract.paths import Home
from trainerd.memory import receipts
from trainerd.memory.estimate import estimate
from trainerd.memory.planner import FITS, TIGHT
from trainerd.memory.profile import Profile
from trainerd.memory.timeline import Setup

GB = 1_000_000_000


@pytest.mark.parametrize("usual", [[], [400.0], [900.0, 1000.0, 1100.0]])
def test_a_run_that_needed_six_times_as_much_raises_the_bound_and_nothing_else(usual: list[float]) -> None:
    """By the bytes it was above what was foretold; the likely value is what it is without that run."""
    known = [receipt(real * 1e6, told=1e9) for real in usual]
    far = receipt(6.3 * GB, told=GB, plan={"micro_batch": 32})
    before, after = (estimate(GRU, FP32, Profile(), trusted(given)).ram for given in (known, [*known, far]))
    assert after.point == before.point
    assert after.upper >= after.point + 5.3 * GB if not usual else after.upper >= before.upper + 4 * GB
    assert after.upper >= estimate(GRU, FP32).raw["ram_bytes"] + 5.3 * GB
    words = trusted([*known, far]).words("ram_bytes")
    assert "one run here needed 6.3 times what was foretold: something is in it that the estimate does not know" in words, words
    assert "no run has been measured" not in words and "not counted" not in words
    assert ("corrected by" in words) is bool(usual)


def test_it_counts_for_every_setup_of_that_model_and_more_in_larger_pieces() -> None:
    """Or a proposal of another setup would be promised to fit; data beside the model do not go away with smaller pieces."""
    far = receipt(6.3 * GB, told=GB, plan={"micro_batch": 32})
    for other in ({"checkpointing": "full"}, {"precision": "bf16"}, {"micro_batch": 8}):
        setup = replace(FP32, **other)
        assert estimate(GRU, setup, Profile(), trusted([far], setup)).ram.upper > 5.3 * GB, other
    twice = replace(FP32, micro_batch=64, effective_batch=64)
    assert estimate(GRU, twice, Profile(), trusted([far], twice)).ram.upper > 10.6 * GB
    assert not trusted([receipt(6.3 * GB, told=GB, mixed=True)]).corrections


def _with_receipt(home: Home, document: dict[str, Any]) -> None:
    (new_run(home.root).folder / receipts.FILE).write_text(json.dumps({"schema": 1, **document}), encoding="utf-8")


def test_plan_does_not_say_fits_below_what_a_run_has_needed(tmp_path: Path) -> None:
    """Of the same model on a CPU, also for a budget: tight, and the reason is in what it says."""
    home, asked, budget = Home(tmp_path), resolve("cadence"), "3GB"
    first = outlook.look(home, asked, budget, "cpu")
    assert isinstance(first, outlook.Outlook) and first.answer.verdict == FITS
    setup, told = first.answer.setup, first.answer.estimate.raw["ram_bytes"]
    about = {"kind": first.answer.estimate.kind, "device": "cpu", "torch": first.place.profile.torch, "setup": receipts.setup_kind(setup)}
    plan = {"micro_batch": setup.micro_batch}
    _with_receipt(home, {**about, "plan": plan, "predicted": {"ram_bytes": told}, "real": {"ram_bytes": told * 6.3}})
    after = outlook.look(home, asked, budget, "cpu")
    assert isinstance(after, outlook.Outlook) and after.answer.verdict == TIGHT and not after.answer.proposals
    assert after.answer.estimate.ram.upper >= told * 6.3
    shown = " ".join("\n".join(forecast_view.lines(after, True, lambda text, colour: text)).split())
    assert "one run here needed 6.3 times what was foretold" in shown, shown


@pytest.mark.parametrize("setup", [FP32, replace(FP32, precision="bf16"), replace(FP32, device="cuda", precision="bf16", micro_batch=8)])
def test_the_parts_add_up_to_the_likely_value(setup: Setup) -> None:
    """To the byte, on both devices: what oneDNN keeps compiled and what receipts have corrected, up or down, are parts with names."""
    measure = "driver_bytes" if setup.device == "cuda" else "ram_bytes"
    for real in (None, 700.0, 1300.0):
        given = [] if real is None else [receipt(0, setup) | {"predicted": {measure: 1000.0}, "real": {measure: real}}] * 3
        found = estimate(GRU, setup, Profile(), trusted(given, setup))
        assert sum(found.breakdown.values()) == round(found.needed.point)
        assert found.breakdown.get("correction by earlier runs", 0) == pytest.approx(found.needed.point - found.raw[measure], abs=1)
        assert ("compiled products" in found.breakdown) is (measure == "ram_bytes" and setup.precision == "bf16")
        assert (real is None) is ("correction by earlier runs" not in found.breakdown)
        assert not any("oneDNN" in text for text in found.not_modelled)
