"""CADENCE's row reader and its built-in queries: every format, every kind of dirt, the same rows everywhere."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainerd.config.model import DataConfig
from trainerd.contract.errors import ConfigError, UsageError
from trainerd.tasks.cadence import data, formats, generator
from trainerd.tasks.cadence.columns import EVERYTHING, MAX_CHARACTERS, Row
from trainerd.tasks.cadence.settings import DEFAULTS, CadenceSettings
from trainerd.tasks.cadence.text import MAX_WORD, visible, words

ROWS = [("Mobile Phones", 'apple iphone, 8 "plus"', "7"), ("TVs", "sony fernseher für küche", "8"), ("TVs", "55 inch tv", "9")]
SETTINGS = CadenceSettings()


def read(path: Path, columns: dict[str, str | int] | None = None, settings: CadenceSettings = SETTINGS) -> data.FileSource:
    """The source after it has been read to its end; its rows as `.found`."""
    source = data.FileSource(DataConfig(path=str(path), columns=columns or {}), settings)
    source.found = list(source)  # type: ignore[attr-defined]
    assert source.usable == len(source.found)  # type: ignore[attr-defined]
    return source


def found(path: Path, columns: dict[str, str | int] | None = None, settings: CadenceSettings = SETTINGS) -> list[Row]:
    return read(path, columns, settings).found  # type: ignore[attr-defined, no-any-return]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def csv_cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text


def as_delimited(separator: str, cell: Callable[[str], str]) -> str:
    lines = [separator.join(("category", "title", "group")), *(separator.join(map(cell, row)) for row in ROWS)]
    return "\n".join(lines) + "\n"


def as_objects() -> list[dict[str, str]]:
    return [{"id": "x", "query": text, "category": category, "group": group} for category, text, group in ROWS]


CONTENTS = {
    "tsv": as_delimited("\t", str),
    "csv": as_delimited(",", csv_cell),
    "jsonl": "".join(json.dumps(row) + "\n" for row in as_objects()),
    "json": json.dumps(as_objects(), indent=1),
}
EXPECTED = [Row(category, words(text), group) for category, text, group in ROWS]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("named", [True, False])
def test_reads_every_format_plain_or_gzipped_by_name_or_by_content(kind: str, packed: bool, named: bool, tmp_path: Path) -> None:
    """The same rows come from TSV, CSV, JSON lines and JSON, gzipped or not, whatever the file is called."""
    content = CONTENTS[kind].encode()
    path = write(tmp_path / (f"rows.{kind}{'.gz' if packed else ''}" if named else "rows"), gzip.compress(content) if packed else content)
    source = read(path)
    assert source.found == EXPECTED  # type: ignore[attr-defined]
    assert not source.dropped
    done, total, unit = source.progress()
    assert done == total == path.stat().st_size and unit == "bytes"


def test_reads_parquet_with_any_types(tmp_path: Path) -> None:
    """A Parquet file gives the same rows; nulls are counted, numbers are read as text."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"other": [1] * 5, "Title": [r[1] for r in ROWS] + [None, "a"], "category": [r[0] for r in ROWS] + ["x", None]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    source = read(tmp_path / "rows.parquet")
    assert [row.words for row in source.found] == [row.words for row in EXPECTED]  # type: ignore[attr-defined]
    assert source.dropped == {"no text": 1, "no category": 1}
    parquet.write_table(pyarrow.table({"text": [1.5, 2.0], "category": [3, 4]}), tmp_path / "numbers.parquet")
    assert found(tmp_path / "numbers.parquet") == [Row("3", ["1.5"], None), Row("4", ["2.0"], None)]


def test_says_how_to_get_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyarrow a Parquet file is refused with the name of the extra."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"trainerd\[parquet\]"):
        found(write(tmp_path / "rows.parquet", b"PAR1...."))


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    """A folder's data files are read one after the other, other files left alone."""
    for name in ("b.tsv", "a.csv.gz", "notes.md"):
        content = CONTENTS["csv"].encode() if "csv" in name else CONTENTS["tsv"].encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    write(tmp_path / "c.tsv", b"")
    assert found(tmp_path) == EXPECTED * 2


def test_headerless_file_by_number(tmp_path: Path) -> None:
    """Columns set by number read a file without header; a header that is there all the same is not taken for a row."""
    body = "1,apple iphone,x,TVs\n2,sony tv,x,TVs\n"
    numbers: dict[str, str | int] = {"text": 1, "category": 3}
    assert [row.words for row in found(write(tmp_path / "a.csv", body), numbers)] == [["apple", "iphone"], ["sony", "tv"]]
    assert len(found(write(tmp_path / "b.csv", "id,title,x,kind\n" + body), numbers)) == 2


def test_columns_can_be_named(tmp_path: Path) -> None:
    """Columns set by name are used, whatever the case; a column that is not needed may be missing."""
    path = write(tmp_path / "a.tsv", "Kind\tSearch Term\nTVs\tsony\n")
    assert found(path, {"text": "search term", "category": "kind"}) == [Row("TVs", ["sony"], None)]
    assert found(path, {"text": "search term"}, CadenceSettings(conditioned=False)) == [Row(EVERYTHING, ["sony"], None)]


DIRT: list[tuple[bytes, str | None]] = [
    (b"TVs\tsony bravia", None),
    (b"TVs\tsony bravia\r", None),
    (b"TVs\tsony\tbravia", None),
    ("TVs\tsony\u2028bravia".encode(), None),
    ("TVs\tsony\u200b \ufeffbravia".encode(), None),
    (b'TVs\tsony "bravia', None),
    ("TVs\t\ud83d\ude00 sony".encode("utf-16", "surrogatepass").decode("utf-16").encode(), None),
    (b"", "blank"),
    (b"   ", "blank"),
    (b"\r", "blank"),
    (b"TVs\t ", "no text"),
    (b"TVs", "no text"),
    ("TVs\t\u200b".encode(), "no text"),
    (b"\tsony", "no category"),
    (b" \tsony", "no category"),
    (b"TVs\tsony \xff\xfe", "not UTF-8"),
    (b"TVs\tso\0ny", "NUL byte"),
    (b"TVs\t" + b"x" * 100_000, "too long"),
    (b"TVs\t" + b"many words " * 10_000, "too long"),
    (b"T" * 500 + b"\tsony", "too long"),
    (b"TVs\t" + b"y" * (formats.MAX_LINE_BYTES + 10), "too long"),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=st.lists(st.integers(0, len(DIRT) - 1), min_size=1, max_size=30), bom=st.booleans(), packed=st.booleans(), last=st.booleans())
def test_dirty_rows_are_used_or_counted(picks: list[int], bom: bool, packed: bool, last: bool, tmp_path: Path) -> None:
    """Whatever mixture of clean and dirty rows: the usable are used, the rest counted by reason, and it adds up."""
    lines = [b"category\ttext", *(DIRT[pick][0] for pick in picks)]
    content = (b"\xef\xbb\xbf" if bom else b"") + b"\n".join(lines) + (b"\n" if last else b"")
    source = read(write(tmp_path / "rows.tsv", gzip.compress(content, 1) if packed else content))
    expected: dict[str, int] = {}
    for pick in picks[: len(picks) if last or lines[-1] else -1]:
        reason = DIRT[pick][1]
        if reason:
            expected[reason] = expected.get(reason, 0) + 1
    assert dict(source.dropped) == expected
    assert source.usable == sum(1 for pick in picks if DIRT[pick][1] is None)
    assert all(row.category == "TVs" and "sony" in row.words for row in source.found)  # type: ignore[attr-defined]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400), kind=st.sampled_from(["tsv", "csv", "jsonl", "json", "parquet", "rows"]))
def test_no_content_crashes_the_reader(content: bytes, kind: str, tmp_path: Path) -> None:
    """Any bytes under any name give rows, counts or a UsageError, nothing else."""
    path = write(tmp_path / f"rows.{kind}", b"text,category\n" + content if kind == "csv" else content)
    try:
        read(path)
    except UsageError:
        pass


def test_quotes_in_csv_neither_swallow_rows_nor_lose_them(tmp_path: Path) -> None:
    """A quoted cell may go on over lines; a quote that is never closed is a character and costs no other row."""
    lines = ['"one, two",A', '"three ""four""', 'five",A', '"open,A', "six,A", '55" tv,A', '"a"b,A', "x,y,z"] + [
        f"row{i},A" for i in range(100)
    ]
    source = read(write(tmp_path / "a.csv", "text,category\n" + "\n".join(lines) + "\n"))
    texts = [" ".join(row.words) for row in source.found]  # type: ignore[attr-defined]
    assert texts[:6] == ["one, two", 'three "four" five', '"open', "six", '55" tv', '"a"b']
    assert texts[6:] == [f"row{i}" for i in range(100)]
    assert source.dropped == {"columns do not match": 1}
    assert found(write(tmp_path / "b.csv", 'text,category\n"a\rb,A\n'))[0].words == ['"a', "b"]


def test_dirty_json(tmp_path: Path) -> None:
    """In JSON and JSON lines, too, a bad record is counted and the next is read."""
    lines = [
        "{}",
        '{"text": "a", "category": "A"}',
        "nonsense",
        "[1]",
        '{"text": null, "category": "A"}',
        '{"text": ["x"], "category": "A"}',
    ]
    lines += ['{"text": "b\\u0000", "category": "A"}', '{"text": "\\ud800", "category": "A"}', '{"text": 3, "category": 4}']
    source = read(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [row.words for row in source.found] == [["a"], ["3"]]  # type: ignore[attr-defined]
    assert source.dropped == {"no text": 3, "not JSON": 1, "not an object": 1, "NUL byte": 1, "not UTF-8": 1}
    broken = '[{"text": "a", "category": "A"}, 7, {"text": "b, "category": "A"}, {"text": "c", "category": "A"}'
    source = read(write(tmp_path / "a.json", broken))
    assert [row.words for row in source.found] == [["a"], ["c"]]  # type: ignore[attr-defined]
    assert source.dropped == {"not JSON": 1, "not an object": 1}
    many = [{"text": f"query {i}", "category": "A", "filler": "z" * 3000} for i in range(1500)]
    assert len(found(write(tmp_path / "long.json", json.dumps(many)))) == 1500


def test_damaged_gzip_uses_what_can_be_read(tmp_path: Path) -> None:
    """Rows before the damage are used, and the damage is counted."""
    whole = gzip.compress(b"category\ttext\n" + b"".join(b"TVs\tsony %d %s\n" % (i, os.urandom(20).hex().encode()) for i in range(60_000)))
    source = read(write(tmp_path / "a.tsv.gz", whole[: len(whole) * 2 // 3]))
    assert 10_000 < source.usable < 60_000
    assert source.dropped == {"rest of a damaged gzip file": 1}
    with pytest.raises(UsageError, match="damaged gzip"):
        data.check(DataConfig(path=str(write(tmp_path / "b.tsv.gz", whole[:9]))), SETTINGS)
    with pytest.raises(UsageError, match="no usable row"):
        data.check(DataConfig(path=str(write(tmp_path / "b", whole[:9]))), SETTINGS)


def bad(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "empty folder").mkdir()
    return {
        "missing": (tmp_path / "not there.tsv", "no data file"),
        "empty": (write(tmp_path / "empty.tsv", b""), "is empty"),
        "header only": (write(tmp_path / "header.tsv", "category\ttext\n"), "nothing after its header"),
        "no usable row": (write(tmp_path / "dirty.tsv", b"category\ttext\n\nTVs\t\n"), "no usable row"),
        "no text column": (write(tmp_path / "a.csv", "a,b\n1,2\n"), "no column named text or query or title"),
        "no category": (write(tmp_path / "b.csv", "text,b\n1,2\n"), "no column named category"),
        "no such objects": (write(tmp_path / "c.jsonl", '{"a": 1}\n'), "no column named text"),
        "UTF-16": (write(tmp_path / "d.csv", "text,category\na,b\n".encode("utf-16")), "UTF-16"),
        "not Parquet": (write(tmp_path / "e.parquet", b"PAR1 but no more"), "cannot be read as Parquet"),
        "folder": (tmp_path / "empty folder", "holds no"),
        "a file as folder": (tmp_path / "empty.tsv" / "x.tsv", "cannot be read|no data file"),
    }


@pytest.mark.parametrize("case", ["missing", "empty", "header only", "no usable row", "no text column", "no category", "no such objects",
                                  "UTF-16", "not Parquet", "folder", "a file as folder"])  # fmt: skip
def test_data_that_cannot_be_used_is_refused_in_words(case: str, tmp_path: Path) -> None:
    """check() names the file, what is wrong and what to do, with exit code 2."""
    path, message = bad(tmp_path)[case]
    with pytest.raises(UsageError, match=message) as raised:
        data.check(DataConfig(path=str(path)), SETTINGS)
    assert raised.value.exit_code == 2 and raised.value.hint and str(path.parent) in raised.value.message


def test_columns_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    """A configured column that is not there, or a role the task does not have, is an error with the nearest name."""
    path = str(write(tmp_path / "a.tsv", CONTENTS["tsv"]))
    with pytest.raises(UsageError, match="no column 'titel'"):
        data.check(DataConfig(path=path, columns={"text": "titel"}), SETTINGS)
    with pytest.raises(UsageError, match="no column 9"):
        data.check(DataConfig(path=path, columns={"text": 0, "category": 9}), SETTINGS)
    with pytest.raises(ConfigError, match=r"data\.columns\.txet .* Did you mean data\.columns\.text"):
        data.check(DataConfig(path=path, columns={"txet": "title"}), SETTINGS)


def test_fingerprint_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint changes with the content and not with the place; of a large file it is sampled."""
    one = data.check(DataConfig(path=str(write(tmp_path / "a.tsv", CONTENTS["tsv"]))), SETTINGS)
    (tmp_path / "sub").mkdir()
    assert data.check(DataConfig(path=str(write(tmp_path / "sub" / "a.tsv", CONTENTS["tsv"]))), SETTINGS) == one
    assert data.check(DataConfig(path=str(write(tmp_path / "a.tsv", CONTENTS["tsv"] + "\n"))), SETTINGS)["sha256"] != one["sha256"]
    assert one["kind"] == "file" and one["size_bytes"] == len(CONTENTS["tsv"].encode())
    monkeypatch.setattr(data, "_WHOLE_HASH_BYTES", 10)
    sampled = data.check(DataConfig(path=str(tmp_path / "sub" / "a.tsv")), SETTINGS)
    assert sampled["kind"] == "file, sampled" and sampled["sha256"] != one["sha256"]
    assert data.check(DataConfig(), SETTINGS)["kind"] == "generated"


def test_check_reads_no_further_than_the_first_usable_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` does not wait for a whole file to be parsed."""
    path = write(tmp_path / "a.tsv", "category\ttext\n" + "TVs\tsony\n" * 50_000)
    monkeypatch.setattr(data.FileSource, "nothing_usable", lambda self: AssertionError)
    seen: list[int] = []
    parse = formats.Input.records

    def counted(self: formats.Input, *args: object) -> object:
        for record in parse(self, *args):  # type: ignore[arg-type]
            seen.append(1)
            yield record

    monkeypatch.setattr(formats.Input, "records", counted)
    data.check(DataConfig(path=str(path)), SETTINGS)
    assert len(seen) == 2


def test_words_are_normalised() -> None:
    """Case, compatibility forms, blanks of every kind and invisible characters make no difference; words have an end."""
    assert words("  Apple\tiPhone\u00a0X\u2028\u200bＰｒｏ\x07 ") == ["apple", "iphone", "x", "pro"]
    assert words("a" * MAX_CHARACTERS) == ["a" * MAX_WORD]
    assert visible(" A\u200b  b\n") == "A b"


def test_generated_queries_are_many_and_the_same_everywhere() -> None:
    """At least 200,000 distinct queries by default, the same in another process with another hash seed."""
    program = (
        "import hashlib, itertools\nfrom trainerd.tasks.cadence import generator as g\n"
        "rows = [g.row(n) for n in g.order(3000, 5)]\nprint(hashlib.sha256(repr(rows).encode()).hexdigest(), len(set(rows)))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert len({generator.row(number) for number in range(generator.DEFAULT_ROWS)}) >= 200_000
    assert generator.row(0) == generator.row(0)


def test_generated_queries_look_like_queries() -> None:
    """Every category occurs, texts are short and lower case, some words are misspelt, and the head is heavy."""
    rows = [generator.row(number) for number in range(20_000)]
    assert {category for category, _ in rows} == set(generator.SHELVES)
    assert all(text == " ".join(words(text)) and 1 <= len(text) <= 120 for _, text in rows)
    counts: dict[str, int] = {}
    for _, text in rows:
        for word in text.split():
            counts[word] = counts.get(word, 0) + 1
    assert max(counts.values()) > 1000 < sum(1 for count in counts.values() if count == 1)


@pytest.mark.parametrize("count", [0, 1, 100, 5000])
def test_a_larger_size_only_goes_on(count: int) -> None:
    """The first N of the shuffle are the same whatever N is; another seed is another order; no row comes twice."""
    assert list(generator.order(count, 3)) == list(generator.order(6000, 3))[:count]
    some = list(generator.order(6000, 4))
    assert len(set(some)) == 6000 and some[:50] != list(generator.order(50, 3))
    source = data.open_source(DataConfig(size=max(count, 1)), SETTINGS, 3)
    assert len(list(source)) == max(count, 1) == source.usable


def test_all_rows_are_in_the_order() -> None:
    """The shuffle is a permutation: every row exactly once."""
    assert sorted(generator.order(generator.TOTAL_ROWS + 5, 1)) == list(range(generator.TOTAL_ROWS))


def test_settings_refuse_what_makes_no_sense() -> None:
    """Unknown keys and unequal layers are errors; the defaults are the paper's and the issue's."""
    for wrong in ({"modle": "gru"}, {"gru_mn": {"attention": [1]}}, {"vocabulary": 1}, {"gru": {"dropout": 1.0}}):
        with pytest.raises(ValueError):
            CadenceSettings.model_validate(wrong)
    assert SETTINGS.gru_mn.hidden == [2000, 1500, 1000] and SETTINGS.vocabulary == 10_000
    assert set(DEFAULTS) == {"train"}


def test_reading_needs_neither_torch_nor_numpy() -> None:
    """Client and config import these files: they stay light."""
    program = "import sys, trainerd.tasks.cadence.data\nassert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
