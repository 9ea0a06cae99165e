"""A batch larger than the data: `plan` counts what a file can hold, and `start` refuses only what surely does not fit."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from client import fitting
from tests.person import Person
from tests.test_memory_plan_command import planned
from trainerd.config.load import resolve
from trainerd.config.model import DataConfig
from trainerd.contract.errors import Refused
from trainerd.memory.receipts import FILE
from trainerd.tasks.cadence import data

SMALL_ENOUGH = ("--set", "settings.gru.hidden=32", "--set", "settings.eval_prefixes=4", "--set", "train.threads=1")


@pytest.fixture
def person(tmp_path: Path) -> Any:
    found = Person(tmp_path / "home")
    yield found
    found.leaves()


HUGE_BATCH = ("--set", "train.batch_size=1000000", "--set", "train.micro_batch=1000000", "--set", "train.precision=fp32")


@pytest.mark.parametrize("name", ["few.tsv", "few.tsv.gz", "few.json", "few.csv"])
def test_no_more_samples_are_counted_than_a_file_has(person: Person, tmp_path: Path, name: str) -> None:
    """A batch of a million over a file of 40 rows: `plan` is about 40 at most, whatever the file's form, and it fits."""
    path = tmp_path / name
    rows = [f"shoes\tred shoes {number}" for number in range(40)]
    if name.endswith("json"):
        path.write_text(json.dumps([{"category": "shoes", "text": row.partition("\t")[2]} for row in rows]), "utf-8")
    else:
        text = "\n".join(["category\ttext", *rows]).replace("\t", "," if name.endswith("csv") else "\t").encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    found = planned(person, "--data", str(path), *HUGE_BATCH, "--set", "memory.ram_limit=1TB")
    assert found["verdict"] == "fits" and 40 <= found["estimate"]["setup"]["effective_batch"] <= 41, found["estimate"]["setup"]
    usual = planned(person, "--data", str(path), "--set", "memory.ram_limit=1TB")
    assert usual["estimate"]["setup"]["effective_batch"] == 32 and "rows of" in " ".join(usual["estimate"]["assumed"])


def test_start_leaves_it_to_the_trainer_where_it_is_not_sure(person: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that may hold fewer rows, or that there was no time to count: a warning with the numbers in place of a refusal, and the
    trainer trains what `start` could not know to fit. Twice as many lines as the batch, or the built-in queries: refused as ever."""
    path = tmp_path / "mostly-dirt.tsv"
    path.write_text("category\ttext\n" + "\n" * 1_200_000 + "".join(f"shoes\tred shoes {n}\n" for n in range(40)), "utf-8")
    words = ("--data", str(path), *HUGE_BATCH, *SMALL_ENOUGH, "--set", "train.max_steps=2", "--set", "memory.ram_limit=14GB")
    shown = planned(person, *words, code=5)
    assert any("How many samples the data have is not known yet" in note for note in shown["notes"])
    done = person.starts(*words, "--wait")
    assert "This training needs" in done.stderr and "it decides" in done.stderr, done.stderr
    assert json.loads((person.home.run(person.run()).folder / FILE).read_text("utf-8"))["samples"] < 40
    monkeypatch.setattr(data, "rows_at_most", lambda *_: (None, False))
    asked = resolve("cadence", sets=[word for word in words if "=" in word], overrides={"data.path": str(path)})
    assert any("it decides" in text for text in fitting.warnings(person.home, asked))
    for rows in ((2_000_000, False), (1_000_000, True)):
        monkeypatch.setattr(data, "rows_at_most", lambda *_, rows=rows: rows)
        with pytest.raises(Refused, match="does not fit"):
            fitting.warnings(person.home, asked)


def test_counting_lines_ends_when_they_are_enough_or_the_time_is_over(tmp_path: Path) -> None:
    """A `plan` must not wait for a file of gigabytes; what cannot be read is not counted."""
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"shoes\tred shoes\n" * 500_000)
    assert data.rows_at_most(DataConfig(path=str(path)), 16, 5.0)[0] in range(16, 100_000)
    assert data.rows_at_most(DataConfig(path=str(path)), 10**9, 5.0) == (500_001, False)
    assert data.rows_at_most(DataConfig(path=str(path)), 10**9, 0.0) == (None, False)
    (tmp_path / "damaged.tsv.gz").write_bytes(gzip.compress(b"a\tb\n" * 9999)[:-400])
    for name in ("damaged.tsv.gz", "not-there.tsv", ""):
        assert data.rows_at_most(DataConfig(path=str(tmp_path / name) if name else str(tmp_path / "none")), 10**9, 5.0) == (None, False)
    assert data.rows_at_most(DataConfig(size=70), 10**9, 0.0) == (70, True)
