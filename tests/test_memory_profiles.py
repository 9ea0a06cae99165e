"""The machine's profile: client and trainer call it by one name, builds of torch are kept apart, and a damaged one counts as none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from client import outlook, packages
from tests.person import Person
from trainerd.config.load import resolve
from trainerd.contract.paths import Home
from trainerd.memory import profile
from trainerd.memory.profile import Profile

MEASURED = Profile("cpu", "", str(torch.__version__), True, 500_000_000, gigaflops={"fp32": 50.0}, ram_bytes_per_second=1e10)
VERSION_FILE = "from typing import Optional\n__version__ = '{}'\ncuda: Optional[str] = {}\n"


def place_of_profile(home: Home) -> Path:
    """Where the trainer keeps it (trainerd/engine/measuring.py)."""
    return profile.file_of(home.cache, "cpu", None, str(torch.__version__))


def seen(home: Home) -> outlook.Outlook:
    found = outlook.look(home, resolve("cadence"), device="cpu")
    assert isinstance(found, outlook.Outlook)
    return found


def test_what_the_trainer_measured_is_found_whatever_the_wheel_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's wheels are 2.13.0 by their metadata and 2.13.0+cu130 by torch itself, as which the trainer writes."""
    monkeypatch.setattr(packages, "version", lambda distribution: "2.13.0")
    home = Home(tmp_path)
    profile.write(place_of_profile(home), MEASURED)
    assert seen(home).place.profile == MEASURED
    facts = packages.torch_facts()
    assert facts is not None and facts.version == torch.__version__


def test_the_build_is_read_from_torchs_own_file(tmp_path: Path) -> None:
    """With its local part; what the wheel is called counts only where torch does not say."""
    for version, cuda, expected in (("2.13.0+cu130", "'13.0'", "13.0"), ("2.13.0+cpu", "None", None)):
        (tmp_path / "version.py").write_text(VERSION_FILE.format(version, cuda), encoding="utf-8")
        assert packages.torch_facts(tmp_path) == packages.TorchFacts(version, expected)
    (tmp_path / "version.py").write_text("", encoding="utf-8")
    assert packages.torch_facts(tmp_path) == packages.TorchFacts(packages.version("torch") or "", None)


def test_a_build_for_cuda_is_assumed_to_take_more_ram_also_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So an estimate for a CPU is not lower than what was measured with that build; both are said as assumptions."""
    needed = {}
    for version, cuda in (("2.13.0+cpu", None), ("2.13.0+cu130", "13.0")):
        monkeypatch.setattr(packages, "torch_facts", lambda version=version, cuda=cuda: packages.TorchFacts(version, cuda))
        found = seen(Home(tmp_path))
        assert any("not measured on this machine" in text for text in found.answer.estimate.assumed)
        needed[cuda] = found.answer.estimate.ram.point
    assert 200_000_000 < needed["13.0"] - needed[None] < 300_000_000


DAMAGES: dict[str, Any] = {
    "a string for bytes": {"process_bytes": "many"},
    "null": {"process_bytes": None},
    "negative": {"process_bytes": -1_000_000_000},
    "not a number": {"process_bytes": float("nan")},
    "ten terabytes": {"process_bytes": 10**13},
    "true": {"context_bytes": True},
    "speeds that are a word": {"gigaflops": "fast"},
    "a speed of nothing": {"gigaflops": {"fp32": 0}},
    "a speed without end": {"ram_bytes_per_second": float("inf")},
    "a device that is a number": {"device": 3},
    "measured by a word": {"measured": "yes"},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_profile_counts_as_none_and_is_named(tmp_path: Path, name: str) -> None:
    """The assumptions count, with the file and what is wrong in words; measuring again mends it."""
    home, path = Home(tmp_path), place_of_profile(Home(tmp_path))
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": 1, **asdict(MEASURED), **DAMAGES[name]}), encoding="utf-8")
    found = seen(home)
    assert not found.place.profile.measured and found.place.profile.process_bytes == Profile().process_bytes
    assert any(str(path) in note and next(iter(DAMAGES[name])) in note and "plan --measure" in note for note in found.notes), found.notes
    profile.write(path, MEASURED)
    assert seen(home).place.profile == MEASURED and not seen(home).notes


def test_no_command_breaks_on_a_damaged_profile(tmp_path: Path) -> None:
    """`plan`, `memory profile` and a plan for programs say so and go on; half a file, too."""
    person = Person(tmp_path / "home")
    path = place_of_profile(person.home)
    path.parent.mkdir(parents=True)
    for content in (json.dumps({**asdict(MEASURED), "gigaflops": "fast"}), '{"schema": 1, "pro'):
        path.write_text(content, encoding="utf-8")
        for words in (("plan",), ("plan", "--json"), ("memory", "profile")):
            done = person.types(*words)
            said = " ".join((done.stdout + done.stderr).split())
            assert done.returncode == 0 and "is damaged" in said and "plan --measure" in said and "Traceback" not in said, said
