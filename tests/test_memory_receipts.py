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


NARROW, WIDE = {"gru": {"hidden": 128}}, {"gru": {"hidden": 2048}}


def asked(given: list[dict[str, Any]], settings: dict[str, Any] = WIDE, setup: Setup = FP32, **more: Any) -> receipts.Trust:
    return receipts.trust(given, "cadence gru", "cpu", "2", setup, receipts.Model(settings, **more))


@pytest.mark.parametrize("real", [0.85, 0.95, 1.2])
@pytest.mark.parametrize("about", [{"settings": NARROW}, {"settings": WIDE, "source": "edited"}, {}])
def test_a_run_with_other_settings_moves_little_and_narrows_nothing(real: float, about: dict[str, Any]) -> None:
    """A narrow model that was 15 % off, in bytes next to nothing of a wide one's: the likely value goes by the less of the two, the bound
    covers the more. So for other code of the task, and a receipt that does not tell its settings."""
    told = 0.25 * GB
    given = [{name: value for name, value in (receipt(real * told, told=told) | about).items() if name != "settings" or about}] * 3
    base, found = estimate(GRU, FP32).ram, estimate(GRU, FP32, Profile(), asked(given)).ram
    assert base.point > 1.5 * told and 0 < (found.point - base.point) / (real * told - told) <= 0.751
    assert found.upper >= base.upper and found.upper >= max(base.point * real, base.point + real * told - told)
    words = asked(given).words("ram_bytes")
    assert "no run like this has been measured here yet" in words and "the bound is no narrower" in words, words
    assert ("settings.gru.hidden 128, not 2048" in words) is (about.get("settings") == NARROW), words


def test_a_run_with_the_same_settings_speaks_alone() -> None:
    """However many of others there are; a setting at its default is the same said or unsaid."""
    same = receipt(1100, settings={}, defaults=WIDE)
    others = [receipt(700, settings=NARROW)] * 5
    assert asked([same, *others]).of("ram_bytes") == asked([same]).of("ram_bytes") == trusted([receipt(1100)]).of("ram_bytes")
    assert asked([receipt(1100, settings=WIDE)]).of("ram_bytes").factor > 1.04
    seconds = receipt(0, settings=NARROW) | {"predicted": {"seconds_per_step": 1.0}, "real": {"seconds_per_step": 3.0}}
    assert asked([seconds]).of("seconds_per_step").moved(4.0) == pytest.approx(8.0), "a machine that is slower is so by a share"


def test_a_model_that_grows_faster_than_evenly_is_not_corrected_by_small_pieces() -> None:
    """What a piece of 8 was off by says little of one of 32, and what was not understood in it is sixteen times as much."""
    small = receipt(900, settings=WIDE, plan={"micro_batch": 8})
    assert asked([small]).of("ram_bytes").factor < 1
    pairs = asked([small], degree=2).of("ram_bytes")
    assert pairs.apart and pairs.factor == 1 and "smaller micro-batches (8, not 32)" in pairs.because
    assert not asked([small], setup=replace(FP32, micro_batch=8), degree=2).of("ram_bytes").apart
    far = receipt(6.3 * GB, told=GB, settings=WIDE, plan={"micro_batch": 8})
    once, squared = (asked([far], degree=degree).of("ram_bytes").beyond_bytes for degree in (1, 2))
    assert squared == pytest.approx(4 * once)


def _with_receipt(home: Home, document: dict[str, Any]) -> None:
    (new_run(home.root).folder / receipts.FILE).write_text(json.dumps({"schema": 1, **document}), encoding="utf-8")


def test_plan_does_not_say_fits_below_what_a_run_has_needed(tmp_path: Path) -> None:
    """Of the same model on a CPU, also for a budget: tight, and the reason is in what it says."""
    home, wanted, budget = Home(tmp_path), resolve("cadence"), "3GB"
    first = outlook.look(home, wanted, budget, "cpu")
    assert isinstance(first, outlook.Outlook) and first.answer.verdict == FITS
    setup, told = first.answer.setup, first.answer.estimate.raw["ram_bytes"]
    about = {"kind": first.answer.estimate.kind, "device": "cpu", "torch": first.place.profile.torch, "setup": receipts.setup_kind(setup)}
    plan = {"micro_batch": setup.micro_batch}
    _with_receipt(home, {**about, "plan": plan, "predicted": {"ram_bytes": told}, "real": {"ram_bytes": told * 6.3}})
    after = outlook.look(home, wanted, budget, "cpu")
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
