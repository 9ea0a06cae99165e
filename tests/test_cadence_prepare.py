"""CADENCE's preparation: what is written, who is held out, what is cleaned, and how little memory it takes."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainerd.config.model import DataConfig
from trainerd.contract.errors import Unreadable, UsageError
from trainerd.tasks.cadence import clean, collect, generator, rows
from trainerd.tasks.cadence.dataset import TokenRows
from trainerd.tasks.cadence.prepare import prepare
from trainerd.tasks.cadence.settings import CadenceSettings, CleanSettings
from trainerd.tasks.cadence.vocabulary import NUM_SPECIAL, RARE, UNKNOWN, Vocabulary

Silent = Any


def silent(done: int, total: int | None, unit: str) -> None:
    """Progress nobody looks at."""


class Prepared:
    """A prepared folder, and its rows as text."""

    def __init__(self, folder: Path, data: DataConfig, settings: CadenceSettings | None = None, seed: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        self.progress: list[tuple[int, int | None, str]] = []
        told = lambda *what: self.progress.append(what)  # noqa: E731
        self.rows, self.used, self.dropped = prepare(settings or CadenceSettings(), data, seed, folder, told)
        self.vocabulary = Vocabulary.load(folder)
        self.train, self.eval = (TokenRows(folder, split, self.vocabulary.begin(0)) for split in ("train", "eval"))

    def texts(self, split: str) -> list[tuple[str, str]]:
        part = getattr(self, split)
        return [(self.category(row), self.text(row)) for row in (part[i] for i in range(len(part)))]

    def category(self, row: Sequence[int]) -> str:
        voc = self.vocabulary
        return voc.categories[int(row[0]) - voc.begin(0)]

    def text(self, row: Sequence[int]) -> str:
        voc = self.vocabulary
        return "".join(voc.surfaces[int(token)] or f" <{int(token)}>" for token in row if token < voc.num_words).strip()


def tsv(path: Path, found: Sequence[tuple[str, ...]], header: str = "category\ttext") -> DataConfig:
    path.write_text("\n".join([header, *("\t".join(row) for row in found)]) + "\n", encoding="utf-8")
    return DataConfig(path=str(path))


def simple(number: int) -> list[tuple[str, str]]:
    """Rows whose words all occur often."""
    return [(("TVs", "Phones")[i % 2], f"brand{i % 5} model{i % 7} size{i % 3}") for i in range(number)]


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """Every row is on disk as begin, words, end of its category; rows and reasons add up; nothing temporary stays."""
    found = simple(400)
    data = tsv(tmp_path / "a.tsv", [*found, ("TVs", ""), ("", "x")])
    done = Prepared(tmp_path / "cache", data)
    assert (done.rows, done.used, done.dropped) == (402, 400, {"no text": 1, "no category": 1})
    assert sorted(done.texts("train") + done.texts("eval")) == sorted(found)
    voc = done.vocabulary
    for index in range(len(done.train)):
        row = done.train[index].tolist()
        number = voc.categories.index(done.category(row))
        assert row[0] == voc.begin(number) and row[-1] == voc.end(number) and all(token < voc.num_words for token in row[1:-1])
        assert done.train.categories[index] == number
    assert done.train.lengths.tolist() == [len(done.train[i]) - 1 for i in range(len(done.train))]
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {
        "splits.json", "tokenizer.json", "categories.json", "word_categories.npy",
        *(f"{split}.{what}" for split in ("train", "eval") for what in ("tokens.raw", "offsets.npy", "categories.npy")),
    }  # fmt: skip
    assert done.progress[-1][0] == done.progress[-1][1]
    assert sum(voc.rows) == len(done.train)


def test_equal_texts_are_never_on_both_sides(tmp_path: Path) -> None:
    """A random split holds out whole texts: none is learnt from and asked for."""
    done = Prepared(tmp_path / "cache", tsv(tmp_path / "a.tsv", simple(2000)), CadenceSettings(eval_split="random"))
    train, held = ({text for _, text in done.texts(split)} for split in ("train", "eval"))
    assert held and not train & held


def test_groups_are_held_out_whole(tmp_path: Path) -> None:
    """With a column group, rows of one group are all on one side, about the asked fraction of them held out."""
    found = [("TVs", f"brand{i % 3} variant{i % 11}", f"cluster {i // 4}") for i in range(2000)]
    data = tsv(tmp_path / "a.tsv", found, "category\ttext\tgroup").model_copy(update={"eval_fraction": 0.2})
    settings = CadenceSettings(max_words=3)
    data_rows = [(c, f"{text} id{i // 4}", g) for i, (c, text, g) in enumerate(found)]  # the cluster's number is in the text
    tsv(tmp_path / "a.tsv", data_rows, "category\ttext\tgroup")
    done = Prepared(tmp_path / "cache", data, settings.model_copy(update={"min_frequency": 1}))
    train, held = ({text.rpartition(" ")[2] for _, text in done.texts(split)} - {"<0>", "<1>"} for split in ("train", "eval"))
    assert not train & held
    assert 360 <= len(done.eval) <= 400
    other = Prepared(tmp_path / "other", data, settings, seed=1)
    assert other.texts("eval") != done.texts("eval")


def test_group_split_needs_groups(tmp_path: Path) -> None:
    """Asking for a split by group where there is no such column is an error that says what to do."""
    with pytest.raises(UsageError, match="no column group"):
        Prepared(tmp_path / "cache", tsv(tmp_path / "a.tsv", simple(50)), CadenceSettings(eval_split="group"))


@pytest.mark.parametrize(("number", "fraction", "held"), [(8, 0.0, 0), (1, 0.5, 0), (2, 0.05, 1), (100, 0.5, 50), (1000, 0.05, 50)])
def test_something_is_held_out_and_something_learnt(number: int, fraction: float, held: int, tmp_path: Path) -> None:
    """However few rows there are, the split is near what was asked and never takes all."""
    found = [("TVs", f"text number{i}") for i in range(number)]
    data = tsv(tmp_path / "a.tsv", found).model_copy(update={"eval_fraction": fraction})
    done = Prepared(tmp_path / "cache", data)
    assert len(done.eval) == held and len(done.train) == number - held


def test_size_takes_the_first_of_a_seeded_shuffle(tmp_path: Path) -> None:
    """--dataset-size N: N rows, a smaller N is part of a larger one, another seed gives others, the rest is counted."""
    data = tsv(tmp_path / "a.tsv", [("TVs", f"word{i % 10} number{i}") for i in range(1000)])
    settings = CadenceSettings(min_frequency=1)

    def taken(size: int, seed: int) -> set[str]:
        done = Prepared(tmp_path / f"{size}-{seed}", data.model_copy(update={"size": size, "eval_fraction": 0}), settings, seed)
        assert (done.rows, done.used) == (1000, size) and done.dropped == {f"beyond the first {size} of the shuffle": 1000 - size}
        return {text for _, text in done.texts("train")}

    assert taken(100, 0) < taken(300, 0) and taken(100, 0) != taken(100, 1)
    generated = Prepared(tmp_path / "generated", DataConfig(size=500))
    assert (generated.rows, generated.used, generated.dropped) == (500, 500, {})


def test_rare_and_unknown_words(tmp_path: Path) -> None:
    """Words below the bound are <rare>, those seen once <unk>; words of held-out rows are not counted; the cap keeps the most frequent."""
    found = [("TVs", f"often{i % 120} common") for i in range(1200)] + [("TVs", f"twice{i // 2} common") for i in range(60)]
    found += [("TVs", f"once{i} common") for i in range(50)]
    data = tsv(tmp_path / "a.tsv", found).model_copy(update={"eval_fraction": 0})
    done = Prepared(tmp_path / "cache", data)
    assert done.vocabulary.num_words == NUM_SPECIAL + 121
    flat = done.train.tokens.tolist()
    assert flat.count(RARE) == 60 and flat.count(UNKNOWN) == 50
    assert done.vocabulary.surfaces[NUM_SPECIAL] == " common"
    capped = Prepared(tmp_path / "capped", data, CadenceSettings(vocabulary=8))
    assert capped.vocabulary.num_words == NUM_SPECIAL + 8 and capped.train.tokens.tolist().count(RARE) > 1000
    everything = Prepared(tmp_path / "every", data, CadenceSettings(min_frequency=1))
    assert everything.vocabulary.num_words == NUM_SPECIAL + 121 + 30 + 50
    held = Prepared(tmp_path / "held", data.model_copy(update={"eval_fraction": 0.3}), CadenceSettings(min_frequency=1))
    known = {text for split in ("train",) for _, text in held.texts(split)}
    assert held.vocabulary.num_words == NUM_SPECIAL + len({word for text in known for word in text.split()})


def test_long_rows_are_cut_without_an_end(tmp_path: Path) -> None:
    """A row longer than max_words is cut, and nothing says that it ended there."""
    data = tsv(tmp_path / "a.tsv", [("TVs", "a b c d e f"), ("TVs", "a b c")] * 10).model_copy(update={"eval_fraction": 0})
    done = Prepared(tmp_path / "cache", data, CadenceSettings(max_words=4))
    assert done.text(done.train[0]) == "a b c d" and done.train[0][-1] < done.vocabulary.num_words
    assert done.text(done.train[1]) == "a b c" and done.train[1][-1] == done.vocabulary.end(0)


def test_categories_beyond_the_bound_are_counted(tmp_path: Path) -> None:
    """Only the most frequent categories stay; the rows of the others are dropped with a reason."""
    found = [(f"category {min(i % 10, 3)}", "word here") for i in range(100)]
    done = Prepared(tmp_path / "cache", tsv(tmp_path / "a.tsv", found), CadenceSettings(max_categories=2))
    assert done.vocabulary.categories == ["category 0", "category 3"]
    assert done.dropped == {"not in one of the 2 most frequent categories": 20} and done.used == 80


def test_unconditioned_has_one_begin_and_end(tmp_path: Path) -> None:
    """Without categories there is one begin and one end, and no category column is needed."""
    data = tsv(tmp_path / "a.tsv", [(text,) for _, text in simple(50)], "text")
    done = Prepared(tmp_path / "cache", data, CadenceSettings(conditioned=False))
    assert done.vocabulary.num_tokens == done.vocabulary.num_outputs + 1 == done.vocabulary.num_words + 2
    assert done.train[0][0] == done.vocabulary.begin(7) and done.train[0][-1] == done.vocabulary.end(7)


def test_pieces_leave_no_word_unknown(tmp_path: Path) -> None:
    """With tokenizer bpe every row, also of words never seen, is spelt exactly, and the vocabulary keeps its size."""
    found = [("TVs", f"samsung ue{i % 50}nu{i}") for i in range(600)]
    done = Prepared(tmp_path / "cache", tsv(tmp_path / "a.tsv", found), CadenceSettings(tokenizer="bpe", vocabulary=150))
    assert sorted(done.texts("train") + done.texts("eval")) == sorted(found)
    assert done.vocabulary.num_words <= 150 + NUM_SPECIAL and done.vocabulary.pieces
    assert done.vocabulary.encode("samsung ☃")[-1] == UNKNOWN
    assert all(max(row) < done.vocabulary.num_tokens for row in (done.train[i] for i in range(20)))


def test_cleaning_takes_out_what_says_nothing(tmp_path: Path) -> None:
    """Words alike in all categories go, words of the category and rare words stay, and rows left empty are counted."""
    found = [("TVs", "cheap oled tv new") for _ in range(50)] + [("Phones", "cheap iphone new case") for _ in range(30)]
    found += [("TVs", f"tv xyz{i}") for i in range(10)] + [("Phones", "new")] * 4
    data = tsv(tmp_path / "a.tsv", found).model_copy(update={"eval_fraction": 0})
    settings = CadenceSettings(clean=CleanSettings(enabled=True), min_frequency=5)
    done = Prepared(tmp_path / "cache", data, settings)
    assert set(done.texts("train")) == {("TVs", "oled tv"), ("Phones", "iphone case"), *(("TVs", f"tv xyz{i}") for i in range(10))}
    assert done.dropped == {"nothing left after cleaning": 4} and done.used == 90
    short = Prepared(tmp_path / "short", data, settings.model_copy(update={"clean": CleanSettings(enabled=True, max_words=1)}))
    assert max(len(text.split()) for _, text in short.texts("train")) == 1


def test_cleaning_by_hand() -> None:
    """Entropy and mutual information are what a calculation by hand gives; the best words of a row are kept in place."""
    counts = np.array([[10, 10], [20, 0], [9, 1]])
    scores = clean.word_scores(counts, CleanSettings(enabled=True, max_entropy=1.0, min_pmi=-5.0))
    assert scores[1, 0] == pytest.approx(-math.log(39 / 50)) and scores[1, 1] == -np.inf
    assert scores[2, 1] == pytest.approx(math.log(0.1) - math.log(11 / 50))
    # 10 of 39 against 10 of 11: seldomer in the large category than in the small, so not alike in both.
    rates = np.array([10 / 39, 10 / 11]) / (10 / 39 + 10 / 11)
    entropy = float(-(rates * np.log(rates)).sum() / math.log(2))
    for bound, kept in ((entropy - 0.01, False), (entropy + 0.01, True)):
        one = clean.word_scores(counts, CleanSettings(enabled=True, max_entropy=bound, min_pmi=-5.0))
        assert bool(np.isfinite(one[0, 0])) is kept
    row = np.array([0, 0, 0, 1, 1])
    keep = clean.best_words(row, np.array([0.5, 2.0, 1.0, -np.inf, 0.1], dtype=np.float32), 2)
    assert keep.tolist() == [False, True, True, False, True]


def test_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the pass over the source, it does not read the source again; killed within it, it starts anew; same result."""
    data = tsv(tmp_path / "a.tsv", simple(3000))
    monkeypatch.setattr(collect, "_FLUSH_ROWS", 500)
    whole = Prepared(tmp_path / "whole", data)

    class Killed(Exception):
        pass

    def dies(after: int) -> Silent:
        calls: list[int] = []

        def progress(done: int, total: int | None, unit: str) -> None:
            calls.append(done)
            if len(calls) > after:
                raise Killed

        return progress

    folder = tmp_path / "cache"
    folder.mkdir()
    for after in (2, 7):  # within the pass; in the writing after it
        with pytest.raises(Killed):
            prepare(CadenceSettings(), data, 0, folder, dies(after))
    (tmp_path / "a.tsv").write_text("category\ttext\nTVs\tanother\n", encoding="utf-8")
    again = Prepared(folder, data)
    assert again.texts("train") == whole.texts("train") and again.texts("eval") == whole.texts("eval")
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "whole" / "tokenizer.json").read_bytes()


def test_bounds_on_words_and_categories_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more distinct words than the table may hold, the late ones are unknown; with far too many categories, rows are dropped."""
    monkeypatch.setattr(collect, "MAX_DISTINCT_WORDS", 50)
    monkeypatch.setattr(collect, "MAX_DISTINCT_CATEGORIES", 3)
    found = [("TVs", f"word{i % 200}") for i in range(2000)] + [(f"category {i}", "word1") for i in range(10)]
    done = Prepared(tmp_path / "cache", tsv(tmp_path / "a.tsv", found).model_copy(update={"eval_fraction": 0}))
    assert done.vocabulary.num_words == NUM_SPECIAL + 50
    assert done.train.tokens.tolist().count(UNKNOWN) == 1500
    assert done.dropped == {"more than 3 categories": 8}


def test_many_slices_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Working in slices changes nothing, whatever their size."""
    data = tsv(tmp_path / "a.tsv", [generator.row(i) for i in range(2000)])
    settings = CadenceSettings(clean=CleanSettings(enabled=True), max_words=5)
    one = Prepared(tmp_path / "one", data, settings)
    monkeypatch.setattr(rows, "_CHUNK_ROWS", 37)
    many = Prepared(tmp_path / "many", data, settings)
    assert one.texts("train") == many.texts("train") and one.texts("eval") == many.texts("eval") and one.dropped == many.dropped


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    """A file that lost its rows since the check ends in words."""
    with pytest.raises(UsageError, match="no usable row"):
        Prepared(tmp_path / "cache", tsv(tmp_path / "a.tsv", [("", "x")]))


def test_vocabulary_that_cannot_be_read(tmp_path: Path) -> None:
    """A damaged or missing vocabulary is named."""
    (tmp_path / "categories.json").write_text("{}", encoding="utf-8")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(Unreadable, match="no vocabulary"):
            Vocabulary.load(folder)


def test_vocabulary_finds_words_by_their_beginning(tmp_path: Path) -> None:
    """Tokens that go on with what was typed: whole words, or pieces that are a part of it."""
    found = [("TVs", "apple apples banana")] * 20
    done = Prepared(tmp_path / "cache", tsv(tmp_path / "a.tsv", found).model_copy(update={"eval_fraction": 0}))
    voc = done.vocabulary
    assert {voc.surfaces[t] for t in voc.continuing(" app")} == {" apple", " apples"} and not len(voc.continuing(" x"))
    assert {voc.surfaces[t] for t in voc.continuing(" ")} == {" apple", " apples", " banana"}
    assert voc.category("tvs ") == 0 and voc.category("radio") is None
    assert voc.encode("Apple <unk> <rare> pear") == [voc.encode("apple")[0], UNKNOWN, UNKNOWN, UNKNOWN]


def test_workers_open_the_maps_themselves(tmp_path: Path) -> None:
    """What is sent to a loader worker is small and reads the same."""
    done = Prepared(tmp_path / "cache", DataConfig(size=2000))
    sent = pickle.dumps(done.train)
    assert len(sent) < 1000
    copy = pickle.loads(sent)
    assert copy[5].tolist() == done.train[5].tolist() and len(copy) == len(done.train)


PEAK = """
import json, sys
from pathlib import Path
from trainerd.config.model import DataConfig
from trainerd.tasks.cadence.prepare import prepare
from trainerd.tasks.cadence.settings import CadenceSettings
folder = Path(sys.argv[2])
folder.mkdir()
used = prepare(CadenceSettings(), DataConfig(path=sys.argv[1]), 0, folder, lambda *a: None)[1]
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps([used, int(peak)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A tenfold file of the same words needs hardly more memory; 10 million rows stay far below 1 GB (measured: 336 MB)."""
    block = "".join(f"{category}\t{text}\n" for category, text in (generator.row(i) for i in range(20_000)))
    peaks = []
    for times in (1, 25):
        path = tmp_path / f"{times}.tsv"
        with path.open("w", encoding="utf-8") as file:
            file.write("category\ttext\n" + block * times)
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        out = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"cache{times}")], env=env, capture_output=True, check=True
        )
        used, peak = json.loads(out.stdout)
        assert used == 20_000 * times
        peaks.append(peak * 1024)
    assert peaks[1] - peaks[0] < 60e6 and peaks[1] < 250e6
