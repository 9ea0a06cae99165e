"""`plan` and `start` as a person meets them: what it will need, in words and as JSON; a refusal that says what would help."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.person import SMALL, Person
from tests.trainers import TASK
from trainerd.memory.receipts import FILE


@pytest.fixture
def person(tmp_path: Path) -> Any:
    found = Person(tmp_path / "home")
    yield found
    found.leaves()


def planned(person: Person, *words: str, code: int = 0) -> dict[str, Any]:
    done = person.types("plan", "--json", *words)
    assert done.returncode == code, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_plan_says_what_a_training_needs(person: Person) -> None:
    """A table with likely and most, a bar, what it is made of, what was assumed and what is left out; nothing is written."""
    began = time.monotonic()
    done = person.types("plan")
    assert done.returncode == 0 and time.monotonic() - began < 10
    for words in ("cadence gru", "likely", "at most", "RAM", "fits", "optimizer", "Assumed", "Not in the estimate", "measured here yet"):
        assert words in done.stdout, words
    assert not person.home.runs.exists()


def test_plan_for_another_machine(person: Person) -> None:
    """--budget asks about a GPU that is not here: the same command says whether 4 GB would do, and chooses the micro-batch for it."""
    fits = planned(person, "--budget", "3.5GB")
    assert fits["verdict"] == "fits" and fits["device"] == "cuda" and fits["budget_bytes"] == 3_500_000_000
    large = planned(person, "--budget", "2GB", "--set", "train.batch_size=4096")
    assert large["verdict"] == "fits" and large["techniques"] == ["smaller micro-batch"]
    setup = large["estimate"]["setup"]
    assert setup["effective_batch"] == 4096 and setup["micro_batch"] < 4096
    assert large["estimate"]["driver"]["upper"] <= 2_000_000_000
    never = planned(person, "--budget", "900MB", "--set", "settings.model=gru-mn", code=5)
    assert never["verdict"] == "too large"


def test_what_is_typed_wrong_is_said_in_words(person: Person) -> None:
    """A budget that is no size."""
    done = person.types("plan", "--budget", "lots")
    assert done.returncode == 2 and "'lots' is not a size" in done.stderr and "Traceback" not in done.stderr


def test_start_refuses_what_does_not_fit_and_the_change_it_names_helps(person: Person) -> None:
    """Exit 5 before anything is spawned; the first proposal, typed as it was printed, is then found to fit."""
    fixed = ("--set", "train.batch_size=65536", "--set", "train.micro_batch=65536", "--set", "train.precision=fp32")
    done = person.types("start", *fixed, "--set", "memory.ram_limit=12GB")
    assert done.returncode == 5, done.stdout + done.stderr
    assert "does not fit" in done.stderr and "--set train.micro_batch=" in done.stderr and "memory.ram_limit" in done.stderr
    assert not person.home.runs.exists() and not person.home.status.exists()
    setting = done.stderr.split("--set ", 1)[1].split()[0]
    again = planned(person, *fixed, "--set", setting, "--set", "memory.ram_limit=12GB")
    assert again["verdict"] == "fits"


def test_a_run_leaves_a_receipt_and_the_next_plan_knows_it(person: Person) -> None:
    """Foretold and real, side by side, from the trainer itself; near each other; and `plan` says how far to trust it."""
    person.starts(*SMALL, "--set", "train.max_steps=12", "--wait")
    receipt = json.loads((person.home.run(person.run()).folder / FILE).read_text("utf-8"))
    assert receipt["kind"] == "cadence gru" and receipt["device"] == "cpu" and receipt["steps"] == 12
    told, real = receipt["predicted"]["ram_bytes"], receipt["real"]["ram_bytes"]
    assert 0.6 < real / told < 1.4, (told, real)
    assert receipt["real"]["seconds_per_step"] > 0 and receipt["torch"] and receipt["plan"]["micro_batch"] == 64
    assert "1 earlier run of this kind" in person.types("plan", *SMALL).stdout


def test_a_model_of_ones_own_is_traced_once_and_then_planned(person: Person, tmp_path: Path) -> None:
    """Before its first training nothing is foretold, and that is said; afterwards `plan` knows it without torch."""
    (tmp_path / "tiny.py").write_text(TASK, encoding="utf-8")
    words = ("--task", f"{tmp_path / 'tiny.py'}:Tiny", "--set", "train.precision=fp32", "--set", "train.max_steps=6")
    before = person.types("plan", *words)
    assert before.returncode == 0 and "has not been trained in this home yet" in before.stdout
    person.starts(*words, "--wait")
    receipt = json.loads((person.home.run(person.run()).folder / FILE).read_text("utf-8"))
    assert receipt["trace"] and receipt["predicted"]["ram_bytes"] > 0
    after = planned(person, *words)
    assert after["verdict"] == "fits" and after["estimate"]["num_trainable"] == 4 * 16 + 16 + 16 + 1
