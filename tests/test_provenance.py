"""Nothing is trained silently on other data, and nothing damaged is trusted: real trainers, real files, changed in between."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.toy import LEAVE, Script, Toy, config, run, same
from tests.trainers import RunningTrainer, new_run, newest_step, outcome
from trainerd.config import identity
from trainerd.config.model import DataConfig, RunConfig
from trainerd.contract import runs, wire
from trainerd.contract.errors import UsageError
from trainerd.contract.paths import RunPaths
from trainerd.engine import preparing, provenance

READS_ITSELF = '''
"""A task that opens data.path itself, while it trains."""
import os, time
import numpy, torch
from torch import nn
from trainerd.engine.task import Task

class Tiny(Task):
    def dataset(self, split):
        table = torch.from_numpy(numpy.loadtxt(self.ctx.data.path, delimiter=",", dtype=numpy.float32))
        return torch.utils.data.TensorDataset(table[:, :-1], table[:, -1:]) if split == "train" else None

    def model(self):
        return nn.Linear(2, 1)

    def counts(self, batch):
        return {"loss": len(batch[1])}

    def loss(self, model, batch, ctx):
        time.sleep(float(os.environ.get("TINY_PAUSE", "0")))
        return {"loss": (nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum"), 1.0)}, {}
'''
PREPARES = READS_ITSELF.replace(
    "    def dataset(self, split):\n        table = torch.from_numpy(numpy.loadtxt(self.ctx.data.path",
    """    reads_data = False

    def prepare(self, ctx):
        (ctx.cache_dir / "table.csv").write_bytes(open(ctx.data.path, "rb").read())

    def dataset(self, split):
        table = torch.from_numpy(numpy.loadtxt(self.ctx.cache_dir / "table.csv\"""",
)
SLOW = {"TINY_PAUSE": "0.02"}


def table(path: Path, seed: int = 0, rows: int = 80) -> Path:
    numpy.savetxt(path, numpy.random.default_rng(seed).normal(size=(rows, 3)), delimiter=",", fmt="%+.6f")
    return path


def run_on(data: Path, root: Path, source: str) -> RunPaths:
    """A run as `start` records it: with the fingerprint of its data."""
    paths = new_run(root, source=source, data={"path": str(data)})
    record = runs.read(paths.home, paths.name)
    chosen = {"size": None, "eval_fraction": 0.05, "columns": {}}
    record.identity = {"data": {**chosen, **identity.fingerprint(DataConfig(path=str(data)))}}
    runs.write(paths.home, record)
    return paths


def is_refused(paths: RunPaths, *words: str) -> None:
    """The next trainer ends for good, naming what is wrong and what to do."""
    kept = sorted((p.name, p.read_bytes()) for p in paths.checkpoints.glob("*"))
    trainer = RunningTrainer(paths)
    assert trainer.exit_code() == wire.EXIT_PERMANENT, trainer.text()
    (event,) = trainer.of(wire.EXCEPTION)
    assert event["permanent"] and event["type"] == "UsageError"
    for word in (*words, "Put the old data back", "--no-resume"):
        assert word in event["text"]
    assert sorted((p.name, p.read_bytes()) for p in paths.checkpoints.glob("*")) == kept


def ends_like(paths: RunPaths, other: RunPaths) -> None:
    trainer = RunningTrainer(paths)
    assert trainer.exit_code() == wire.EXIT_FINISHED, trainer.text()
    assert outcome(paths) == outcome(other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A run whose data nobody touched. READS_ITSELF and PREPARES train the same."""
    folder = tmp_path_factory.mktemp("undisturbed")
    paths = run_on(table(folder / "data.csv"), folder, READS_ITSELF)
    assert RunningTrainer(paths).exit_code() == wire.EXIT_FINISHED
    return paths


def test_other_data_between_stop_and_resume_is_refused(tmp_path: Path, undisturbed: RunPaths) -> None:
    """A task that reads data.path again stops for good when other rows, as many bytes of them, are put in its place; no
    checkpoint is touched; with the old data back it ends as if nothing had happened."""
    data = table(tmp_path / "data.csv")
    paths = run_on(data, tmp_path, READS_ITSELF)
    trainer = RunningTrainer(paths, **SLOW)
    trainer.wait_for_step(7)
    assert trainer.leave() == wire.EXIT_LEFT and newest_step(paths) >= 7
    table(data, seed=1)
    is_refused(paths, str(data), "its content was changed")
    table(data)
    ends_like(paths, undisturbed)


def test_what_was_prepared_is_the_data_of_a_run_that_reads_nothing_else(tmp_path: Path, undisturbed: RunPaths) -> None:
    """With reads_data = False the file may go: the run says so and goes on with what it began with. Every byte of that is
    compared at each start: a flipped bit is named, and prepared anew. The end is the same, bit for bit."""
    data = table(tmp_path / "data.csv")
    paths = run_on(data, tmp_path, PREPARES)
    trainer = RunningTrainer(paths, **SLOW)
    trainer.wait_for_step(7)
    trainer.kill()
    (prepared,) = paths.home.cache.glob("*/table.csv")
    content = bytearray(prepared.read_bytes())
    content[3] ^= 1  # another digit
    prepared.write_bytes(content)
    trainer = RunningTrainer(paths, **SLOW)
    text = trainer.wait_for(wire.WARNING)["text"]
    assert "table.csv" in text and "sha256" in text
    trainer.wait_for_step(9)
    trainer.kill()
    data.unlink()
    ends_like(paths, undisturbed)


# in one process


class Reads(Toy):
    """Prepares a copy of data.path; `meanwhile` happens while it does."""

    meanwhile: Callable[[int], None] = staticmethod(lambda attempt: None)
    attempts = 0

    def prepare(self, ctx: Any) -> None:
        content = Path(ctx.data.path).read_bytes()
        self.attempts += 1
        type(self).meanwhile(self.attempts)
        (ctx.cache_dir / "copy").write_bytes(content)
        ctx.report_data(1, 1, {})


def prepare(tmp_path: Path, data: Path, meanwhile: Callable[[int], None]) -> tuple[Path, Script, Reads]:
    link, task = Script(), Reads()
    type(task).meanwhile = staticmethod(meanwhile)
    asked = RunConfig(task="mine", data=DataConfig(path=str(data)))
    cache = tmp_path / "cache" / "mine-1"
    preparing.prepare_here(task, asked, cache, link.send, provenance.fingerprint(task, asked))
    return cache, link, task


class Killed(BaseException):
    pass


def test_an_interrupted_preparation_goes_on_only_on_the_same_files(tmp_path: Path) -> None:
    """What prepare() had done when it was killed is there again for it; not when the file was written to since, with whatever."""
    data = table(tmp_path / "data.csv")
    cache = tmp_path / "cache" / "mine-1"

    def dies(attempt: int) -> None:
        (cache / "part").write_bytes(b"half")
        raise Killed

    seen: list[bool] = []
    for touched in (False, True):
        with pytest.raises(Killed):
            prepare(tmp_path, data, dies)
        if touched:
            table(data)
        prepare(tmp_path, data, lambda attempt: seen.append((cache / "part").exists()))
        shutil.rmtree(cache)
    assert seen == [True, False]


def test_what_differs_is_said_in_words(tmp_path: Path) -> None:
    """Size, number of files, content, or that it is gone: for a file and for a folder."""
    data, task = table(tmp_path / "data.csv"), Reads()
    asked = RunConfig(task="mine", data=DataConfig(path=str(data)))
    recorded = provenance.fingerprint(task, asked)
    assert provenance.difference(task, asked, recorded) == ""
    table(data, rows=79)
    assert "its size in bytes was" in provenance.difference(task, asked, recorded)
    data.unlink()
    assert "does not exist" in provenance.difference(task, asked, recorded)
    data.mkdir()
    table(data / "one.csv")
    assert "its kind was file and is folder" in provenance.difference(task, asked, recorded)
    recorded = provenance.fingerprint(task, asked)
    table(data / "two.csv")
    assert "it had 1 files and has 2" in provenance.difference(task, asked, recorded)


def test_data_changed_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    """Other rows while prepare() reads: refused, and not one file of it stays."""
    data = table(tmp_path / "data.csv")
    with pytest.raises(UsageError, match="not what this run began with"):
        prepare(tmp_path, data, lambda attempt: table(data, seed=1) and None)
    assert list((tmp_path / "cache" / "mine-1").iterdir()) == []


def test_data_written_to_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    """A file that was written to and has its content again in the end may have been read half: it is read again, and given up
    on after a few times."""
    data = table(tmp_path / "data.csv")
    cache, link, task = prepare(tmp_path, data, lambda attempt: table(data) and None if attempt == 1 else None)
    assert task.attempts == 2 and "prepared again" in link.of(wire.WARNING)[0]["text"]
    assert preparing.verified(cache, link.send) is not None
    shutil.rmtree(cache)
    with pytest.raises(UsageError, match="is being written to"):
        prepare(tmp_path, data, lambda attempt: table(data) and None)
    assert list(cache.iterdir()) == []


def test_a_library_user_resumes_on_the_same_data_too(tmp_path: Path) -> None:
    """Without a recorded identity the newest checkpoint names its data: other data is refused, the old one goes on."""
    data = table(tmp_path / "data.csv")
    asked = config(data={"path": str(data)})
    run(tmp_path / "whole", asked)
    run(tmp_path / "parts", asked, Script({9: LEAVE}))
    table(data, seed=1)
    with pytest.raises(UsageError, match="not what this run began with"):
        run(tmp_path / "parts", asked)
    table(data)
    run(tmp_path / "parts", asked)
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_preparing_anew_with_another_outcome_is_no_longer_exact(tmp_path: Path) -> None:
    """The cache is gone, the data the same, what prepare() makes of it another: the run goes on, and says since when."""

    class Draws(Toy):
        def prepare(self, ctx: Any) -> None:
            (ctx.cache_dir / "x").write_bytes(numpy.random.default_rng().bytes(8))

    run(tmp_path, config(), Script({9: LEAVE}), task=Draws())
    shutil.rmtree(tmp_path / "cache")
    link = Script()
    assert run(tmp_path, config(), link, task=Draws()).outcome == "finished"
    assert "prepared anew" in link.of(wire.EXACT)[-1]["because"]


# the cache


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_a_link(path: Path) -> None:
    shutil.move(path, path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


DAMAGES = {
    "cut": (cut, "bytes instead of"),
    "gone": (lambda path: path.unlink(), "missing"),
    "a link": (replace_by_a_link, "not a plain file"),
    "the record torn": (lambda path: cut(path.with_name("prepared.json")) or cut(path.with_name("prepared.json")), "record"),
    "a record that leads outside": (
        lambda path: path.with_name("prepared.json").write_text('{"files": {"../../elsewhere": {"bytes": 1, "sha256": ""}}}', "utf-8"),
        "not in it",
    ),
    "no record of ours": (lambda path: path.with_name("prepared.json").write_text('{"files": [1]}', "utf-8"), "not one of ours"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_prepared_data_is_named_and_made_anew(tmp_path: Path, damage: str) -> None:
    """Whatever is wrong with the cache, it is told, nothing outside is touched, and preparing again mends it."""
    data = table(tmp_path / "data.csv")
    cache, link, _ = prepare(tmp_path, data, lambda attempt: None)
    hurt, words = DAMAGES[damage]
    hurt(cache / "copy")
    assert preparing.verified(cache, link.send) is None
    assert words in link.of(wire.WARNING)[-1]["text"]
    elsewhere = tmp_path / "elsewhere"
    before = elsewhere.read_bytes() if elsewhere.exists() else None
    cache, _, _ = prepare(tmp_path, data, lambda attempt: None)
    assert preparing.verified(cache, Script().send) is not None
    assert (cache / "copy").read_bytes() == data.read_bytes()
    assert (elsewhere.read_bytes() if elsewhere.exists() else None) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_a_cache_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    """A link in place of the cache, or left in it by prepare(), ends with what to do."""
    data = table(tmp_path / "data.csv")
    (tmp_path / "outside").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="is a link"):
        prepare(tmp_path, data, lambda attempt: None)
    assert list((tmp_path / "outside").iterdir()) == []
    (tmp_path / "cache").unlink()
    link = tmp_path / "cache" / "mine-1" / "link"
    with pytest.raises(UsageError, match="not a plain file"):
        prepare(tmp_path, data, lambda attempt: link.symlink_to(data))


def test_a_cache_from_before_the_hashes_is_taken_over(tmp_path: Path) -> None:
    """A record that vouches for sizes only is believed once more, and has hashes from then on."""
    data = table(tmp_path / "data.csv")
    cache, link, _ = prepare(tmp_path, data, lambda attempt: None)
    old = {"schema": 1, "data": {"rows": 1, "used": 1, "dropped": {}}, "sizes": {"copy": (cache / "copy").stat().st_size}}
    (cache / "prepared.json").write_text(json.dumps(old), encoding="utf-8")
    record = preparing.verified(cache, link.send)
    assert record is not None and record["data"]["rows"] == 1 and len(record["files"]["copy"]["sha256"]) == 64
    assert json.loads((cache / "prepared.json").read_text("utf-8")) == record
    cut(cache / "copy")
    assert preparing.verified(cache, link.send) is None


def test_data_that_was_moved_is_read_from_its_new_place(tmp_path: Path) -> None:
    """`start --data` with the same content elsewhere goes on with the run, and reads it there from now on."""
    recorded = RunConfig(data=DataConfig(path=str(tmp_path / "old.csv"))).model_dump(mode="json")
    asked = RunConfig(data=DataConfig(path=str(tmp_path / "new.csv")))
    resumption = identity.resumed(recorded, asked, ["data.path"])
    assert resumption.config.data.path == str(tmp_path / "new.csv") and "new.csv" in resumption.changes[0]
