"""The planner: the largest micro-batch that fits, nothing a person fixed is touched, and every proposal fits when applied."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainerd.config import contradictions
from trainerd.config.model import RunConfig
from trainerd.contract.errors import ConfigError
from trainerd.memory import disk, forecast, receipts, traced
from trainerd.memory.estimate import estimate
from trainerd.memory.planner import FITS, TIGHT, TOO_LARGE, Answer, Question, choose, judge, smaller
from trainerd.memory.profile import Profile
from trainerd.memory.receipts import Trust
from trainerd.memory.timeline import Setup
from trainerd.tasks.cadence.blocks import CadenceTable, table
from trainerd.tasks.cadence.settings import CadenceSettings

GRU = table(CadenceSettings())
SMALL_MN = table(
    CadenceSettings.model_validate(
        {"model": "gru-mn", "vocabulary": 500, "max_words": 6, "gru_mn": {"embedding": 32, "hidden": [64, 48], "attention": [32, 24]}}
    )
)
MB = 1_000_000


def plan(config: dict[str, Any], budget: int, model: CadenceTable = GRU, device: str = "cuda", splittable: bool = True) -> Answer:
    train = {key: value for key, value in config.items() if "." not in key}
    memory = {key.removeprefix("memory."): value for key, value in config.items() if "." in key}
    asked = RunConfig.model_validate({"task": "cadence", "train": {"batch_size": 512, **train}, "memory": memory})
    return forecast.answer(asked, forecast.Place(device, budget, "bf16"), model, splittable)


def test_what_fits_is_left_as_it_is() -> None:
    """The whole batch at once, when there is room for it."""
    answer = plan({}, 40_000 * MB)
    assert answer.verdict == FITS and answer.setup.micro_batch == 512 and answer.used == ()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("share", [0.6, 0.75, 0.95])
def test_the_micro_batch_is_the_largest_even_one_that_fits(device: str, share: float) -> None:
    """One piece less would not fit; the effective batch is the one asked for."""
    whole = estimate(GRU, Setup(device, "bf16", 4096, 4096)).needed.upper
    budget = int(whole * share)
    answer = plan({"batch_size": 4096}, budget, device=device)
    setup = answer.setup
    assert answer.verdict == FITS and answer.used == ("smaller micro-batch",)
    assert setup.effective_batch == 4096 and setup.accumulation > 1
    fewer = setup.with_micro_batch(-(-4096 // (setup.accumulation - 1)))
    assert judge(estimate(GRU, fewer), budget) != FITS


def test_full_logits_that_do_not_fit_are_proposed_in_pieces() -> None:
    """memory.logits=full is kept when it fits; else the loss in pieces is proposed, and needs less; auto has it from the start."""
    fixed = {"micro_batch": 512, "precision": "bf16"}
    needs = {kind: estimate(GRU, Setup("cuda", "bf16", 512, 512, logits=kind)).needed.upper for kind in ("full", "chunked")}
    assert needs["chunked"] < needs["full"] - 200 * MB
    between = int(sum(needs.values()) / 2)
    asked = RunConfig.model_validate({"task": "cadence", "train": {"batch_size": 512, **fixed}, "memory": {"logits": "full"}})
    answer = forecast.answer(asked, forecast.Place("cuda", between, "bf16"), GRU)
    assert answer.verdict != FITS and ("memory.logits=chunked",) in [p.settings for p in answer.proposals]
    roomy = forecast.answer(asked, forecast.Place("cuda", int(needs["full"]) + MB, "bf16"), GRU)
    assert roomy.verdict == FITS and roomy.setup.logits == "full"
    assert plan(fixed, between).verdict == FITS and plan(fixed, between).setup.logits == "chunked"


def test_an_optimizer_in_8_bits_that_does_not_fit_may_be_a_whole_one_elsewhere() -> None:
    """Its state stays on the GPU; AdamW's can lie in RAM. Both settings are named, and it fits with them; where nothing fits, the least is
    that one, too."""
    setup = Setup("cuda", "bf16", 512, 512, "adamw8bit")
    small, away = (estimate(GRU, one).needed.upper for one in (setup, replace(setup, optimizer="adamw", offload="optimizer")))
    assert away < small - 10 * MB
    fixed = {"optimizer": "adamw8bit", "precision": "bf16"}
    found = plan(fixed, int(away) + 1, splittable=False)
    assert ("train.optimizer=adamw", "memory.offload=optimizer") in [proposal.settings for proposal in found.proposals]
    least = plan(fixed, 100 * MB).least
    assert least is not None and "memory.offload=optimizer" in least.settings and "train.optimizer=adamw" in least.settings


AGAIN = ("selective", "full")


def test_checkpointing_is_taken_up_when_a_whole_batch_does_not_fit() -> None:
    """A batch that cannot be split: of many small operations, full, which watches none of them; never where a person said none, nor
    where no block is named."""
    whole = {mode: estimate(SMALL_MN, Setup("cuda", "fp32", 4096, 4096, checkpointing=mode)).needed.upper for mode in ("none", *AGAIN)}
    assert whole["full"] < whole["selective"] < whole["none"]
    config = {"batch_size": 4096, "precision": "fp32"}
    for budget in ((whole["none"] + whole["selective"]) / 2, (whole["selective"] + whole["full"]) / 2):
        answer = plan(config, int(budget), SMALL_MN, splittable=False)
        assert (answer.verdict, answer.setup.checkpointing, answer.used) == (FITS, "full", ("full checkpointing",))
        fixed = plan({**config, "activation_checkpointing": "none"}, int(budget), SMALL_MN, splittable=False)
        assert fixed.verdict != FITS and fixed.setup.checkpointing == "none"
    assert plan({"batch_size": 4096}, 900 * MB, GRU, splittable=False).setup.checkpointing == "none"


def _traced(samples: int, held: int, operations: int, flops: float) -> traced.Trace:
    """So many operations of 250 kB per sample, of which so many results are held at once."""
    events: list[int] = []
    for number in range(operations):
        events += [number] if number < held else [number, ~number]
    return traced.Trace(samples, [samples * MB // 4] * operations, [*events, *(~number for number in range(held))], samples * flops)


def test_the_faster_way_to_fit_is_taken() -> None:
    """Pieces a little smaller before anything is computed again; computed again before pieces that are tiny."""
    modes = {}
    for mode, parts in {"none": (100, 100, 1e9), "selective": (60, 110, 1.01e9), "full": (20, 130, 1.33e9)}.items():
        some = [_traced(samples, *parts) for samples in (1, 2)]
        modes[mode] = traced.Traces(some, some)
    table = traced.TracedTable("made", "fp32", [("fp32", [1000, 1000])], [], [], [], 1_000_000, modes)
    needs = {n: estimate(table, Setup("cuda", "fp32", n, 64)).needed.upper for n in (32, 1)}

    def chosen(budget: float, splittable: bool = True) -> Setup:
        asked = RunConfig.model_validate({"task": "a", "train": {"batch_size": 64, "precision": "fp32"}})
        answer = forecast.answer(asked, forecast.Place("cuda", int(budget) + 1, "fp32"), table, splittable)
        assert answer.verdict == FITS
        return answer.setup

    assert chosen(needs[32]) == Setup("cuda", "fp32", 32, 64)
    tiny = chosen(needs[1])
    assert tiny.checkpointing == "full" and tiny.micro_batch > 2
    whole = estimate(table, Setup("cuda", "fp32", 64, 64, checkpointing="selective")).needed.upper
    assert chosen(whole, splittable=False) == Setup("cuda", "fp32", 64, 64, checkpointing="selective")


def _gradients_last(samples: int, held_mb: int) -> traced.Trace:
    """So many MB per sample on the way there; a gradient of 300 MB when they have gone."""
    return traced.Trace(samples, [samples * held_mb * MB, 300 * MB], [0, ~0, 1], samples * 1e9, gradients=[[3, 1, 0]])


def test_a_batch_in_one_piece_may_need_less_than_one_in_two() -> None:
    """Gradients that wait for the second piece lie beside its activations; the plan that needs none of them is found."""
    modes = {}
    for mode, held in {"none": 200, "full": 60}.items():
        some = [_gradients_last(samples, held) for samples in (1, 2)]
        modes[mode] = traced.Traces(some, [traced.Trace(trace.samples, [trace.samples * held * MB], [0, ~0]) for trace in some])
    table = traced.TracedTable("made", "fp32", [("fp32", [75_000, 1000])], [], [], [], 75_000_000, modes)
    needs = [estimate(table, Setup("cuda", "fp32", n, 4, checkpointing="full")).needed.upper for n in (4, 2, 1)]
    assert needs[0] < min(needs[1:]) - 200 * MB
    asked = RunConfig.model_validate({"task": "a", "train": {"batch_size": 4, "precision": "fp32"}, "memory": {"offload": "none"}})
    answer = forecast.answer(asked, forecast.Place("cuda", int(needs[0]) + MB, "fp32"), table)
    assert (answer.verdict, answer.setup.micro_batch, answer.setup.checkpointing) == (FITS, 4, "full")


def test_checkpointing_of_no_blocks_is_refused() -> None:
    """`plan` and `start` say so before anything is started."""
    for mode in AGAIN:
        with pytest.raises(ConfigError, match=f"activation_checkpointing is {mode}, but this task .* names no blocks"):
            plan({"activation_checkpointing": mode}, 40_000 * MB, GRU)
    assert plan({"activation_checkpointing": "full"}, 40_000 * MB, SMALL_MN).setup.checkpointing == "full"


def test_what_a_person_fixed_stays() -> None:
    """A fixed micro-batch is never made smaller by the plan; it is proposed instead."""
    fits = plan({"batch_size": 4096}, 1000 * MB)
    assert fits.verdict == FITS
    fixed = plan({"batch_size": 4096, "micro_batch": 4096, "precision": "fp32"}, 1000 * MB)
    assert fixed.verdict == TOO_LARGE
    assert (fixed.setup.micro_batch, fixed.setup.precision, fixed.setup.optimizer) == (4096, "fp32", "adamw")
    assert any(setting.startswith("train.micro_batch=") for proposal in fixed.proposals for setting in proposal.settings)


def test_a_batch_that_cannot_be_split_is_not() -> None:
    """In-batch negatives, batch norm: the plan says what is needed instead of halving."""
    answer = plan({"batch_size": 4096}, 1000 * MB, splittable=False)
    assert answer.verdict == TOO_LARGE and answer.setup.micro_batch == 4096
    assert all("train.micro_batch" not in setting for proposal in answer.proposals for setting in proposal.settings)


def test_exact_changes_are_proposed_before_another_algorithm() -> None:
    """When a smaller micro-batch alone would do, no other optimizer comes first."""
    answer = plan({"batch_size": 4096, "micro_batch": 4096}, 1000 * MB)
    assert answer.proposals and answer.proposals[0].settings[0].startswith("train.micro_batch=")
    assert all(len(proposal.settings) == 1 for proposal in answer.proposals)


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(250, 1100),
    batch=st.sampled_from([8, 33, 256]),
    fixed=st.booleans(),
    precision=st.sampled_from(["auto", "fp32", "bf16"]),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_every_proposal_fits_when_it_is_applied(budget: int, batch: int, fixed: bool, precision: str, device: str) -> None:
    """Each is set as printed, planned again, and then fits, or is tight where it was proposed as that; an answer that says it fits is
    within the budget. Where there is none, the least that is said is more than there is, and no more than the plan that is shown needs."""
    config: dict[str, Any] = {"batch_size": batch, "precision": precision, **({"micro_batch": batch} if fixed else {})}
    answer = plan(config, budget * MB, SMALL_MN, device)
    assert answer.setup.effective_batch == batch
    if answer.verdict == FITS:
        assert answer.estimate.needed.upper <= budget * MB and not answer.proposals
    if answer.verdict == TIGHT:
        assert answer.estimate.needed.point <= budget * MB < answer.estimate.needed.upper
    for proposal in answer.proposals:
        changed = dict(config)
        for setting in proposal.settings:
            key, value = setting.removeprefix("train.").split("=")
            changed[key] = int(value) if value.isdecimal() else value
        again = plan(changed, budget * MB, SMALL_MN, device)
        assert proposal.verdict == judge(proposal.estimate, budget * MB) != TOO_LARGE
        assert again.verdict in (FITS, proposal.verdict), proposal.settings
    assert (answer.least is not None) is (answer.verdict == TOO_LARGE and not answer.proposals)
    if answer.least is not None:
        least, shown = answer.least.estimate.needed, answer.estimate.needed
        assert budget * MB < least.point <= shown.point and least.upper <= shown.upper


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_is_tight_is_told_what_would_make_it_fit_for_certain(device: str) -> None:
    """Amber, not red: it is tried as it is, and the smallest changes are proposed all the same; each fits when it is applied."""
    config: dict[str, Any] = {"batch_size": 4096, "micro_batch": 4096, "precision": "fp32"}
    needed = estimate(GRU, Setup(device, "fp32", 4096, 4096)).needed
    budget = int((needed.point + needed.upper) / 2)
    answer = plan(config, budget, device=device)
    assert answer.verdict == TIGHT and answer.setup.micro_batch == 4096 and answer.used == ()
    assert answer.proposals and answer.proposals[0].settings[0].startswith("train.micro_batch=")
    for proposal in answer.proposals:
        changed = config | {key.removeprefix("train."): value for key, _, value in (one.partition("=") for one in proposal.settings)}
        changed["micro_batch"] = int(changed["micro_batch"])
        assert plan(changed, budget, device=device).verdict == FITS, proposal.settings


def test_the_planner_asks_no_setup_twice() -> None:
    """An estimate costs milliseconds; the search is a bisection."""
    asked: list[Setup] = []

    def counting(setup: Setup) -> Any:
        asked.append(setup)
        return estimate(GRU, setup)

    choose(Question(Setup("cuda", "bf16", 4096, 4096), 1600 * MB), GRU, counting)
    assert len(asked) == len(set(asked)) <= 40


def test_the_largest_pieces_of_a_huge_batch_are_found_in_few_estimates() -> None:
    """What is needed is nearly a line, so that a million samples are cut as by trying all of them, and with a handful of estimates for
    each way; a way that cannot be the faster one is not searched."""
    asked: list[Setup] = []

    def counting(setup: Setup) -> Any:
        asked.append(setup)
        return estimate(SMALL_MN, setup)

    question = Question(Setup("cuda", "bf16", 1_000_000, 1_000_000), 1600 * MB)
    found = choose(question, SMALL_MN, counting)
    assert found.verdict == FITS and len(asked) <= 35, len(asked)
    pieces = found.setup.accumulation
    one_less = found.setup.with_micro_batch(-(-1_000_000 // (pieces - 1)))
    assert judge(estimate(SMALL_MN, one_less), question.budget_bytes) != FITS


def test_nothing_is_proposed_that_the_engine_refuses() -> None:
    """With torch.compile no block is computed again, and no base is streamed: no proposal contradicts what is set already."""
    found = 0
    for budget in (1200, 1500, 1700, 1900):
        values: dict[str, Any] = {"compile": True, "precision": "fp32", "batch_size": 64, "micro_batch": 32}
        asked = RunConfig.model_validate({"task": "cadence", "train": values, "memory": {"offload": "none"}})
        mn = table(CadenceSettings.model_validate({"model": "gru-mn"}))
        for proposal in forecast.answer(asked, forecast.Place("cuda", budget * MB, "bf16"), mn).proposals:
            document = asked.model_dump()
            for setting in proposal.settings:
                section, _, rest = setting.partition(".")
                key, _, value = rest.partition("=")
                document[section][key] = int(value) if value.isdecimal() else value
            assert contradictions.found(RunConfig.model_validate(document)) == [], proposal.settings
            found += 1
    assert found


def test_where_nothing_fits_the_least_of_all_that_was_tried_is_said() -> None:
    """Not only of what a plan takes by itself: lower precision, another optimizer, and keys that a person fixed; with what to set."""
    answer = plan({"batch_size": 64, "precision": "fp32", "micro_batch": 64}, 260 * MB, SMALL_MN)
    assert answer.verdict == TOO_LARGE and not answer.proposals and answer.least is not None
    assert answer.least.settings and answer.least.estimate.needed.upper <= answer.estimate.needed.upper
    on_cpu = plan({"batch_size": 64, "precision": "fp32", "micro_batch": 64}, 260 * MB, SMALL_MN, "cpu").least
    assert on_cpu is not None and "train.optimizer=adafactor" in on_cpu.settings
    assert "cannot be split: a train.batch_size below 64" in smaller(plan({"batch_size": 64}, 260 * MB, SMALL_MN, splittable=False))
    assert smaller(answer) == "A smaller model would fit."


def test_as_much_as_the_least_that_is_said_is_likely_to_be_enough() -> None:
    """With a byte less it is still the least; with as much, what was said to need it is proposed as likely to fit, typed so it is tight,
    and with as much as it needs at most it fits for certain."""
    config = {"batch_size": 64, "precision": "bf16"}
    least = plan(config, 260 * MB, GRU, "cpu").least
    assert least is not None and least.settings
    needed = least.estimate.needed
    less = plan(config, int(needed.point) - 1, GRU, "cpu")
    assert less.least is not None and less.least.estimate.needed == needed and not less.proposals
    enough = plan(config, int(needed.point) + 1, GRU, "cpu")
    assert enough.verdict == TOO_LARGE and enough.least is None
    assert [(one.settings, one.verdict) for one in enough.proposals] == [(least.settings, TIGHT)]
    typed: dict[str, Any] = dict(config)
    for setting in least.settings:
        key, value = setting.removeprefix("train.").split("=")
        typed[key] = int(value) if value.isdecimal() else value
    assert plan(typed, int(needed.point) + 1, GRU, "cpu").verdict == TIGHT
    certain = plan(config, int(needed.upper) + 1, GRU, "cpu")
    assert {one.verdict for one in certain.proposals} == {FITS} and least.settings in [one.settings for one in certain.proposals]


def test_what_the_ram_does_not_hold_is_not_the_least() -> None:
    """Nor the plan that is shown: its number of the GPU could be below the budget of what is said not to fit."""
    config = {"batch_size": 64, "precision": "bf16"}
    away = plan(config, 100 * MB, SMALL_MN)
    assert away.setup.offload == "optimizer", "nothing to see: with room in the RAM it would be the least"
    asked = RunConfig.model_validate({"task": "cadence", "train": config})
    for budget in (100 * MB, int(away.estimate.needed.point) + 1):
        found = forecast.answer(asked, forecast.Place("cuda", budget, "bf16", ram_bytes=MB), SMALL_MN)
        assert found.verdict == TOO_LARGE and found.setup.offload == "none" and found.estimate.needed.point > budget
        assert found.proposals or (found.least is not None and found.least.estimate.needed.point > budget)


def test_on_a_cpu_fp32_is_proposed_where_low_products_need_more() -> None:
    """What oneDNN keeps compiled in bf16 may be more than bf16 saves: the way back is a proposal, and fits."""
    low, full = (estimate(GRU, Setup("cpu", precision, 32, 32)).needed.upper for precision in ("bf16", "fp32"))
    assert full < low
    answer = plan({"batch_size": 32, "precision": "bf16"}, int(full) + MB, device="cpu")
    assert ("train.precision=fp32",) in [proposal.settings for proposal in answer.proposals]
    assert not any("fp32" in setting for p in plan({"precision": "bf16"}, 600 * MB).proposals for setting in p.settings)


FP32 = Setup("cpu", "fp32", 32, 32)


def receipt(real: float, setup: Setup = FP32, told: float = 1000.0, **more: Any) -> dict[str, Any]:
    """As the engine writes it (trainerd/engine/receipt.py)."""
    about = {"kind": "cadence gru", "device": "cpu", "torch": "2", "setup": receipts.setup_kind(setup), "settings": {}}
    return {**about, "predicted": {"ram_bytes": told}, "real": {"ram_bytes": real}, **more}


def trusted(given: list[dict[str, Any]], setup: Setup = FP32) -> Trust:
    return receipts.trust(given, "cadence gru", "cpu", "2", setup)


def test_receipts_correct_the_next_estimate() -> None:
    """Runs that needed a tenth more move the point towards it, and the bound is not below what they needed."""
    found = trusted([receipt(1100)] * 3)
    ram = found.of("ram_bytes")
    assert ram.num_runs == 3 and 1.05 < ram.factor < 1.1 < ram.most < 1.15
    base = estimate(GRU, FP32)
    corrected = estimate(GRU, FP32, Profile(), found)
    assert corrected.ram.point == pytest.approx(base.ram.point * ram.factor)
    assert corrected.ram.upper >= base.ram.point * ram.most
    assert corrected.raw == base.raw, "the next receipt must be compared with the estimate itself, not with its correction"


@pytest.mark.parametrize("number", [1, 3, 50])
@pytest.mark.parametrize("real", [400, 900, 1000])
def test_receipts_alone_never_take_the_whole_slack_away(real: float, number: int) -> None:
    """However many runs needed no more than was foretold, half of what the bound keeps for the unknown stays: the next has other data."""
    base = estimate(GRU, FP32).ram
    found = estimate(GRU, FP32, Profile(), trusted([receipt(real)] * number)).ram
    assert found.upper - found.point >= (base.upper - base.point) * 0.499
    assert number == 1 or found.upper - found.point < base.upper - base.point


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "bf16"},
        {"optimizer": "sgd"},
        {"offload": "optimizer"},
        {"checkpointing": "full"},
        {"logits": "full"},
        {"attention": "math"},
        {"compiled": True},
    ],
    ids=lambda other: "-".join(other),
)
def test_a_receipt_says_nothing_about_another_kind_of_setup(other: dict[str, Any]) -> None:
    """Among mixed receipts only those with the same kernels and states count: the bound of any other setup stays what it was. The
    answer says how many count, and for what."""
    setup = replace(FP32, **other)
    mixed = [receipt(700)] * 4 + [receipt(1200, setup)] + [{**receipt(700, setup), "setup": None}, {**receipt(700), "setup": {}}]
    assert estimate(GRU, setup, Profile(), trusted([receipt(700)] * 4, setup)).ram == estimate(GRU, setup).ram
    assert trusted(mixed).of("ram_bytes").num_runs == 4 and trusted(mixed, setup).of("ram_bytes").num_runs == 1
    words = trusted(mixed, setup).words("ram_bytes")
    named = "compiled" if other == {"compiled": True} else str(next(iter(other.values())))
    assert "1 earlier run of this kind (" in words and named in words and "6 earlier runs with another setup: not counted" in words


def test_a_run_whose_plan_changed_while_it_ran_counts_for_nothing() -> None:
    """Its most was another plan's than the one that is foretold; a micro-batch that was chosen is no other kind."""
    assert not trusted([receipt(400, mixed=True)]).corrections
    assert trusted([receipt(900, replace(FP32, micro_batch=1, effective_batch=4096))]).of("ram_bytes").num_runs == 1


def test_receipts_of_another_model_or_machine_do_not_count() -> None:
    """Corrections do not travel; absurd and missing values are left out."""
    good = receipt(1200)
    others = [
        {**good, "kind": "b"},
        {**good, "device": "GPU"},
        {**good, "torch": "1"},
        {**good, "real": {"ram_bytes": 1_000_000}},
        {**good, "real": {}},
        {**good, "predicted": "?"},
    ]
    assert not trusted(others).corrections
    assert trusted([good]).of("ram_bytes").num_runs == 1


def test_the_upper_bound_is_never_below_the_point() -> None:
    """Whatever receipts say."""
    for factor in (0.6, 1.0, 1.8):
        for number in (1, 3, 9):
            found = estimate(GRU, Setup("cpu", "fp32", 8, 8), Profile(), trusted([receipt(1000 * factor)] * number))
            assert found.ram.upper >= found.ram.point


def test_an_answer_holds_a_breakdown_and_says_what_it_leaves_out() -> None:
    """The parts sum to the peak; what follows torch's source without a GPU having been asked is called so."""
    found = estimate(GRU, Setup("cuda", "bf16", 64, 64))
    parts = {name: size for name, size in found.breakdown.items() if not name.startswith(("cuda", "blocks torch"))}
    assert sum(parts.values()) == found.tensors == max(found.phases.values())
    assert found.allocated and found.reserved and found.driver
    assert found.tensors <= found.allocated.point <= found.reserved.point < found.driver.point
    assert any("not been compared with a GPU" in text for text in found.not_modelled)


def test_a_different_micro_batch_changes_only_what_depends_on_it() -> None:
    """Weights, optimizer and the checkpoint's copy are the same for every piece."""
    small, large = (estimate(GRU, Setup("cpu", "fp32", n, 64)) for n in (1, 64))
    assert small.disk == large.disk and small.num_parameters == large.num_parameters
    assert small.breakdown["staging"] == large.breakdown["staging"]
    assert replace(small.setup, micro_batch=64) == large.setup


def test_the_estimate_needs_no_torch_and_little_time() -> None:
    """A fresh interpreter: no torch, and CADENCE's own model in a few milliseconds once warm."""
    code = (
        "import sys, time\n"
        "from trainerd.memory.estimate import estimate\n"
        "from trainerd.memory.timeline import Setup\n"
        "from trainerd.tasks.cadence.blocks import table\n"
        "from trainerd.tasks.cadence.settings import CadenceSettings\n"
        "t = table(CadenceSettings())\n"
        "estimate(t, Setup('cuda', 'bf16', 8, 8))\n"
        "best = 9.0\n"
        "for _ in range(5):\n"
        "    began = time.perf_counter(); estimate(t, Setup('cuda', 'bf16', 32, 32)); best = min(best, time.perf_counter() - began)\n"
        "print(best, 'torch' in sys.modules, 'numpy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    best, torch, numpy = done.stdout.split()
    assert (torch, numpy) == ("False", "False")
    assert float(best) < 0.2, "a fraction of a plan's answer; the milliseconds are in the log"


@pytest.mark.parametrize(
    ("keep", "keep_best", "early_stopping", "most"), [(3, True, None, 5), (20, True, None, 22), (2, False, None, 3), (2, False, 4, 4)]
)
def test_the_disk_holds_what_is_kept(keep: int, keep_best: bool, early_stopping: int | None, most: int) -> None:
    """As many checkpoints as are asked for; at most those, the best and the one being written, as what refuses a full disk reckons."""
    asked = {"task": "cadence", "train": {"early_stopping": early_stopping}, "checkpoint": {"keep": keep, "keep_best": keep_best}}
    found = forecast.answer(RunConfig.model_validate(asked), forecast.Place("cpu", 10**12, "fp32"), GRU).estimate
    one, result = 3 * found.num_parameters * 4, found.num_parameters * 4
    assert found.disk.point == pytest.approx(keep * one + result, rel=0.1)
    assert found.disk.upper == pytest.approx((most * one + result) * 1.05, rel=0.1)
    asked_for = disk.room(10**15, int(found.disk.point - result) // keep, result, keep, most - keep - 1 == 1)
    assert found.disk.upper == pytest.approx(asked_for.need_bytes, rel=1e-6)
