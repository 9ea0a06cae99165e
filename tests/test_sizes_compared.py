"""A need and what there is for it never read the same unless they are: in the plan, at the start, by the trainer and the supervisor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import fitting, forecast_view, outlook, recommendation
from client.words import sizes
from trainerd.config.load import resolve
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home
from trainerd.contract.sizes import compared
from trainerd.engine import fitting as engine_fitting
from trainerd.engine.pressure import Pressure
from trainerd.machine.memory import RamFacts
from trainerd.memory import limits
from trainerd.supervisor.room import Room

BYTES = st.integers(min_value=0, max_value=10**13)
_SIZE = r"([\d,.]+ (?:[kMG]?B|bytes))"


@given(st.lists(BYTES, min_size=1, max_size=3), BYTES, st.integers(min_value=-(10**7), max_value=10**7))
def test_what_is_not_the_limit_does_not_read_as_it(needed: list[int], limit: int, apart: int) -> None:
    """However close; what is far from it is written as short as ever."""
    near = max(0, limit + apart)
    for writing in (compared, sizes):
        *found, against = writing(*needed, near, limit)
        assert all(one != against or value == limit for one, value in zip(found, [*needed, near], strict=True))
    assert compared(1.44e9, 2.5e9) == ["1.4 GB", "2.5 GB"] and compared(1.44e9, 1.41e9) == ["1,440 MB", "1,410 MB"]
    assert sizes(1.44e9, 800e6) == ["1.4 GB", "800 MB"] and compared(5, 6) == ["5 bytes", "6 bytes"]


@pytest.fixture
def nearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A home on a machine that has so much more left than a training is likely to need, or at most; and what is asked for."""
    asked = resolve("cadence", sets=["train.micro_batch=32", "train.precision=fp32"])
    monkeypatch.setattr(outlook.heap, "can_be_chosen", lambda: False)
    roomy = outlook.look(Home(tmp_path), asked, "1TB", "cpu")
    assert isinstance(roomy, outlook.Outlook)

    def left(which: str, more_bytes: int) -> Home:
        needed, used = int(getattr(roomy.answer.estimate.needed, which)), 4 * 10**9
        facts = RamFacts(used, 64 * 10**9, machine_bytes=64 * 10**9)
        monkeypatch.setattr(outlook, "ram", lambda: facts)
        monkeypatch.setattr(outlook, "resolve_limit", lambda limit, total: used + needed + more_bytes)
        return Home(tmp_path)

    return left, asked


def test_the_plan_and_its_configuration_say_by_what_they_judge(nearly: Any) -> None:
    """A bound that fits by less than is shown, and one that does not: the table, the line under the bar and the reason all differ."""
    left, asked = nearly
    for more in (40_000, -40_000):
        found = outlook.look(left("upper", more), asked)
        assert isinstance(found, outlook.Outlook) and found.answer.verdict == ("fits" if more > 0 else "tight")
        shown = "\n".join(forecast_view.lines(found, True, lambda text, colour: text))
        row = re.search(rf"^RAM +{_SIZE} +{_SIZE}", shown, re.MULTILINE)
        there = re.search(rf"{_SIZE} left", " ".join(shown.split()))
        assert row and there and row[2] != there[1] and row[2].endswith("kB") and there[1].endswith("kB"), shown
    reasons = recommendation.recommend(resolve("cadence"), outlook.look(left("upper", 40_000), resolve("cadence"))).reasons
    room = next(why for key, _, why in reasons if key == "train.micro_batch")
    most, there = re.findall(_SIZE, room)
    assert most != there, room


def test_start_and_the_trainer_refuse_by_numbers_that_differ(nearly: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is likely needed is more than there is by less than the shortest way to write them shows."""
    left, asked = nearly
    home = left("point", -40_000)
    with pytest.raises(Refused) as refused:
        fitting.warnings(home, asked)
    found = re.search(rf"needs {_SIZE} of RAM.*?; {_SIZE} left", refused.value.message)
    assert found and found[1] != found[2], refused.value.message
    answer = outlook.look(home, asked)
    assert isinstance(answer, outlook.Outlook)
    with pytest.raises(Refused) as refused:
        engine_fitting._refuse_too_large(answer.answer)
    found = re.search(rf"needs {_SIZE} of RAM, and {_SIZE} are left", refused.value.message)
    assert found and found[1] != found[2], refused.value.message
    tight = outlook.look(left("upper", -40_000), asked)
    assert isinstance(tight, outlook.Outlook)
    found = re.search(rf"at most {_SIZE}, and {_SIZE} are left", engine_fitting._tight(tight.answer))
    assert found and found[1] != found[2]


def test_what_is_short_of_memory_says_so_in_numbers_that_differ() -> None:
    """The trainer that leaves, the supervisor that waits for it, and the warning of a limit that was passed before."""
    ceiling = 14_000_000_000
    pressure = Pressure("ram", ceiling, 16 * 10**9, ceiling - 3 * 10**9, may_leave=True)
    for now in (0.0, 60.0):
        want = pressure.judge(now, ceiling + 20_000, 10**9, None)
    found = re.search(rf"{_SIZE} in use, {_SIZE} allowed", want.because)
    assert found and found[1] != found[2], want.because
    room = Room(15.0, lambda resource: (13_200_000_000, 16 * 10**9))
    room.made({"resource": "ram", "own_bytes": 820_000_000, "ceiling_bytes": ceiling}, 0.0)
    said = room.waits(1.0) or ""
    assert "13,200 MB" in said and "820 MB" in said and "14,000 MB" in said, said
    found = re.search(rf"\({_SIZE}\), and {_SIZE} are in use", limits.used_already("memory.ram_limit", "auto", 14_000_010_000, 16 * 10**9))
    assert found and found[1] != found[2]
