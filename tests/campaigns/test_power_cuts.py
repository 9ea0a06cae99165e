"""The power is cut anywhere in a whole training, export and all: nothing acknowledged is lost, and the result is the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from client import follow
from tests.campaigns import size
from tests.campaigns.home_trace import AfterCut, HomeTrace, after_power_cuts
from tests.supervised import RUN, start_arguments
from trainerd.config.model import RunConfig
from trainerd.contract import files, requests, runs, wire
from trainerd.contract.errors import NoGoodCheckpoint, Unreadable
from trainerd.contract.paths import Home, RunPaths
from trainerd.engine import checkpoints, export
from trainerd.engine.loop import Link
from trainerd.engine.selftest import oracle, small_run
from trainerd.engine.selftest.oracle import Broken, Outcome
from trainerd.engine.selftest.small_task import Small
from trainerd.engine.trainer import Trainer
from trainerd.supervisor import opening

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs folders that can be synced")
Deaf = Callable[[str, Path], bool]


def configuration() -> RunConfig:
    """Two epochs: three marks, two evaluations, one checkpoint that is deleted again."""
    return small_run.config(4, epochs=3)


class Telling(Link):
    """Tells the trace what was acknowledged."""

    def __init__(self, trace: HomeTrace) -> None:
        self._trace = trace

    def send(self, event: str, **fields: Any) -> None:
        if event == wire.CHECKPOINT:
            self._trace.acknowledged = fields["step"]
            self._trace.remember()


def record(root: Path, deaf: Deaf) -> tuple[HomeTrace, Outcome]:
    """One undisturbed training, every operation remembered."""
    paths = small_run.begin(Home(root), "small", configuration())
    trace = HomeTrace(root, deaf)
    trace.begin()
    save = export.save_file

    def save_traced(stored: Any, path: str, **more: Any) -> None:
        save(stored, path, **more)
        trace.written(Path(path), Path(path).read_bytes())

    with (
        mock.patch.object(files, "disk", trace),
        mock.patch.object(export, "save_file", save_traced),
    ):
        assert train(paths, Telling(trace)) == "finished"
        trace.finished = True
        trace.remember()
    return trace, oracle.outcome(paths)


def train(paths: RunPaths, link: Link) -> str:
    return Trainer(Small(), configuration(), home=paths.home.root, run=paths.name, link=link).train().outcome


def look(cut: AfterCut, root: Path, expected: Outcome) -> None:
    """Start again after the cut. Raises Broken when something promised is gone, or the result is another one."""
    cut.lay_out(root)
    paths = Home(root).run("small")
    finished_before = False
    if paths.result.exists():
        document = json.loads(paths.result.read_bytes())
        for name, digest in document["files"].items():
            path = paths.model / name
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise Broken(f"result.json vouches for {name}, which is not what it says")
        finished_before = True
    elif cut.finished:
        raise Broken("the run had finished, and its record is gone")
    else:
        newest = max(oracle.find(paths.checkpoints).manifests, default=0)
        if newest < cut.acknowledged:
            raise Broken(f"step {cut.acknowledged} was acknowledged, and the newest there is {newest}")
        train(paths, Link())
    found = oracle.outcome(paths)
    if finished_before:
        # The cut may undo the last deletion of a state whose manifest is gone: nobody loads it, it is only space.
        found.files -= oracle.find(paths.checkpoints).torn
    found.compare(expected)


def cuts(
    folder: Path, deaf: Deaf = lambda kind, path: False, every: int = 1, enough: int = sys.maxsize, counted: str = ""
) -> tuple[int, list[str]]:
    """(states looked at, what was wrong in them, if it is said with the word `counted`); ends after `enough` wrong ones."""
    trace, expected = record(folder / "recorded", deaf)
    wrong: list[str] = []
    number = 0
    for number, cut in enumerate(itertools.islice(after_power_cuts(trace), 0, None, every), 1):
        try:
            look(cut, folder / "cut", expected)
        except (Broken, NoGoodCheckpoint, ValueError, OSError) as error:  # OSError: torch, of what no hash has kept from it
            if counted in str(error):
                wrong.append(f"state {number}, acknowledged {cut.acknowledged}: {error}")
            if len(wrong) >= enough:
                break
    shutil.rmtree(folder / "recorded")
    return number, wrong


def of(*names: str) -> Deaf:
    """Leaves out the syncs of these files (by the beginning of their name) or folders."""
    return lambda kind, path: any(path.name.lstrip(".").startswith(name) for name in names)


MUTANTS = {
    "the state": lambda kind, path: kind == "sync" and ".pt" in path.name,
    "the manifest": lambda kind, path: kind == "sync" and "checkpoint_" in path.name and ".json" in path.name,
    "the folder of checkpoints": lambda kind, path: kind == "sync_folder" and path.parent.name == "checkpoints",
    "the metrics": of("metrics.jsonl"),
    "the weights": of("model.safetensors"),
    "the record of the result": of("result.json"),
    "the folder of the model": lambda kind, path: kind == "sync_folder" and path.parent.name == "models",
}


def unknown_runs(folder: Path, deaf: Deaf = lambda kind, path: False) -> tuple[int, list[str]]:
    """(states looked at, those in which a run that was begun is unknown): a client asks for a run in a new home, the power is cut."""
    root = folder / "root"
    root.mkdir()
    trace, home = HomeTrace(root, deaf), Home(root / "home")
    trace.begin()
    with mock.patch.object(files, "disk", trace):
        follow.prepare_home(home)
        request = requests.Request("start", "me", start_arguments())
        requests.send(home, request)
        opening.open_run(home, opening.read_request(home, "me", request.id).arguments)
        trace.acknowledged = 1
        trace.remember()
    number, wrong = 0, []
    for number, cut in enumerate(after_power_cuts(trace), 1):
        cut.lay_out(folder / "cut")
        try:
            runs.read(Home(folder / "cut" / "home"), RUN)
        except (FileNotFoundError, Unreadable) as error:
            if cut.acknowledged:
                wrong.append(f"state {number}: {error}")
    return number, wrong


BEGINNING: dict[str, Deaf] = {
    "the record": lambda kind, path: kind == "sync" and "run.json" in path.name,
    "the folder of the run": lambda kind, path: kind == "sync_folder" and path.name == RUN,
    "the folder of runs": lambda kind, path: kind == "sync_folder" and path.name == "runs",
    "the home": lambda kind, path: kind == "sync_folder" and path.name == "home",
    "the folder the home is in": lambda kind, path: kind == "sync_folder" and path.name == "root",
}


def test_a_run_that_was_begun_is_known(tmp_path: Path) -> None:
    """Once a start is acknowledged no power cut takes run.json, or any folder above it."""
    number, wrong = unknown_runs(tmp_path)
    assert number > 10 and wrong == []


@pytest.mark.parametrize("mutant", BEGINNING)
def test_the_model_notices_what_a_beginning_leaves_unsynced(tmp_path: Path, mutant: str) -> None:
    """With any of these left out there is a disk on which the run is gone."""
    assert unknown_runs(tmp_path, BEGINNING[mutant])[1]


def test_some_power_cuts(tmp_path: Path) -> None:
    """Every 40th of the possible disks: it goes on from what was acknowledged, to the same bits and files."""
    number, wrong = cuts(tmp_path, every=40)
    assert number > 3 and wrong == []


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_power_cut(tmp_path: Path) -> None:
    """All of them."""
    number, wrong = cuts(tmp_path, every=size.of("POWER_CUTS_EVERY", 1))
    size.tell(f"power cuts: {number} possible disks after a cut, {len(wrong)} bad: {wrong[:3] or 'nothing lost, all identical'}")
    assert wrong == []


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_model_notices_a_missing_sync(tmp_path: Path, mutant: str) -> None:
    """With this fsync left out there is a disk on which a promise does not hold."""
    number, wrong = cuts(tmp_path, MUTANTS[mutant], enough=1)
    size.tell(f"power cuts without the fsync of {mutant}: {wrong[0] if wrong else f'nothing found in {number} states'}")
    assert wrong


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_the_model_notices_a_missing_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that forgets what was synced of a state loses checkpoints, but no run comes to other numbers by it; without the look at
    size and sha256 one does."""
    assert cuts(tmp_path / "with", MUTANTS["the state"], counted="differs")[1] == []
    monkeypatch.setattr(checkpoints, "_verify", lambda file, manifest: None)
    number, wrong = cuts(tmp_path / "without", MUTANTS["the state"], enough=1, counted="differs")
    size.tell(f"power cuts without the hash: {wrong[0] if wrong else f'nothing found in {number} states'}")
    assert wrong
