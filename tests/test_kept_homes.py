"""What earlier versions wrote is read and gone on with; what a newer one wrote is refused in words, and stays as it is."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.kept_home import EPOCHS, STOP_AT
from tests.person import Person
from trainerd.contract import files, status
from trainerd.contract.errors import Unreadable
from trainerd.engine import manifest
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.selftest import oracle, small_task
from trainerd.supervisor import report

DATA = Path(__file__).parent / "data"
KEPT = sorted(path.name for path in DATA.glob("home-*"))
STEPS = EPOCHS * small_task.NUM_SAMPLES // 8
NEWER = files.SCHEMA + 1


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Person]:
    someone = Person(tmp_path / "home")
    yield someone
    someone.leaves()


def take(person: Person, name: str) -> None:
    """The home of that version, as if this were the machine it was made on."""
    shutil.copytree(DATA / name, person.home.root, dirs_exist_ok=True)


def content(root: Path, *parts: str) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for part in parts for p in sorted((root / part).rglob("*")) if p.is_file()}


def numbers(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_home_of_this_version_is_kept() -> None:
    """There is one, it has every file a run has, and all of them together are small."""
    assert "home-0.1.0" in KEPT
    for name in KEPT:
        found = content(DATA, name)
        assert sum(map(len, found.values())) < 300_000
        of_a_run = [f"runs/half/{file}" for file in ("run.json", "config.yml", "metrics.jsonl", "events.jsonl")]
        assert {f"{name}/{wanted}" for wanted in ("training_status.json", *of_a_run)} <= set(found)


@pytest.mark.parametrize("name", KEPT)
def test_every_reader_reads_a_kept_home(person: Person, name: str) -> None:
    """status, runs and the monitor show it as it was left; none of them changes it."""
    take(person, name)
    before = content(DATA / name, ".")
    stopped = person.types("status")
    assert stopped.returncode == 3 and "stopped" in stopped.stdout.lower(), stopped.stdout + stopped.stderr
    shown = person.types("status", "--json")
    assert json.loads(shown.stdout)["progress"]["step"] >= STOP_AT
    listed = person.types("runs")
    assert listed.returncode == 0 and "half" in listed.stdout and "whole" in listed.stdout, listed.stderr
    one = person.types("runs", "show", "half", "--json")
    assert one.returncode == 0 and json.loads(one.stdout), one.stderr
    watched = person.types("monitor", "--once")
    assert watched.returncode in (0, 3) and "half" in watched.stdout, watched.stderr
    after = content(person.home.root, ".")
    assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize("name", KEPT)
def test_a_kept_run_goes_on_to_its_right_end(person: Person, name: str) -> None:
    """`resume` goes on at the very step, keeps every line there was, and ends where the run that nobody stopped has ended."""
    take(person, name)
    kept = [json.loads(line) for line in (DATA / name / "runs" / "half" / "metrics.jsonl").read_bytes().splitlines()]
    done = person.types("resume")
    assert done.returncode == 0, done.stdout + done.stderr
    reading = person.waits_for_state(*status.END_STATES, "crashed")
    assert reading.state == status.COMPLETED, f"{reading.reason}\n{person.log()}"
    here, whole = person.metrics("half"), person.metrics("whole")
    assert here[: len(kept)] == kept
    oracle.each_sample_once(here)
    assert len(numbers(here)) == STEPS
    for (step, loss), (other_step, other) in zip(numbers(here), numbers(whole), strict=True):
        assert step == other_step and math.isclose(loss, other, rel_tol=1e-3), (step, loss, other)  # another machine, another last bit
    models = [load_file(person.home.run(run).model / "model.safetensors") for run in ("half", "whole")]
    assert models[0].keys() == models[1].keys()
    assert all(abs(models[0][key] - models[1][key]).max() < 1e-2 for key in models[0])
    assert not list(person.home.run("half").checkpoints.glob("*.bad-*"))


def newer(path: Path) -> None:
    """The manifest becomes one that a later version has written: whole, of a schema nobody here knows."""
    document = json.loads(path.read_bytes())
    document.pop("check")
    path.write_bytes(manifest.signed(document | {"schema": NEWER, "shards": ["a", "b"]}))


def test_a_newer_checkpoint_is_refused_and_left_as_it_is(person: Person) -> None:
    """A checkpoint that a newer trainerd has committed: `resume` fails in words, with what to do; not one file is touched."""
    take(person, KEPT[-1])
    paths = person.home.run("half")
    newer(max(oracle.find(paths.checkpoints).manifests.items())[1])
    before = content(person.home.root, "checkpoints", "runs/half/metrics.jsonl", "models")
    person.types("resume")
    reading = person.waits_for_state(status.FAILED, status.COMPLETED)
    assert reading.state == status.FAILED, reading
    said = f"has schema {NEWER}; this trainerd reads up to {files.SCHEMA}"
    assert said in reading.reason and "--no-resume" in reading.reason, reading.reason
    assert content(person.home.root, "checkpoints", "runs/half/metrics.jsonl", "models") == before
    assert len([line for line in person.events("half") if line["kind"] == "trainer started"]) == 2, "it was tried again and again"


@pytest.mark.parametrize("which", ["newest", "oldest"])
def test_what_is_newer_is_neither_damage_nor_surplus(tmp_path: Path, which: str) -> None:
    """The newest of a newer schema: refused, even where an older one would do. An older one: not counted, not deleted, not renamed."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(DATA / KEPT[-1] / "checkpoints" / "half", folder)
    manifests = oracle.find(folder).manifests
    chosen = manifests[max(manifests) if which == "newest" else min(manifests)]
    newer(chosen)
    before = content(tmp_path, "checkpoints")
    store = CheckpointStore(folder, keep=1, keep_best=False)
    if which == "newest":
        with pytest.raises(Unreadable, match="Go on with the newer trainerd"):
            store.load()
        assert content(tmp_path, "checkpoints") == before
        return
    found = store.load()
    assert found is not None and found[1].step == max(manifests)
    store.prune()
    assert chosen.exists() and chosen.with_suffix(".pt").exists()
    assert content(tmp_path, "checkpoints").items() <= before.items()


def test_a_damaged_schema_is_damage(tmp_path: Path) -> None:
    """A flipped bit that makes a 1 of `schema` a 3 does not turn a torn checkpoint into one of a newer version: the one before is used."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(DATA / KEPT[-1] / "checkpoints" / "half", folder)
    manifests = oracle.find(folder).manifests
    path = manifests[max(manifests)]
    path.write_bytes(path.read_bytes().replace(b'"schema": 1', b'"schema": 3'))
    found = CheckpointStore(folder).load()
    assert found is not None and found[1].step < max(manifests)


def test_a_newer_record_is_refused_in_words(person: Person) -> None:
    """run.json of a newer schema: `resume` says so, with what to do, `runs show` shows it; it stays as it is, and nothing is started."""
    take(person, KEPT[-1])
    path = person.home.run("half").record
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "schema": NEWER}), encoding="utf-8")
    before = content(person.home.root, "runs", "checkpoints")
    for words in (("resume",), ("runs", "show", "half")):
        done = person.types(*words)
        said = done.stdout + done.stderr
        assert f"schema {NEWER}" in said and "newer trainerd" in said and "Traceback" not in said, (words, said)
        assert done.returncode != 0 or words[0] == "runs"
    assert content(person.home.root, "runs", "checkpoints") == before


def test_a_newer_status_is_said_and_kept(person: Person) -> None:
    """training_status.json of a newer schema: `status` says so; who resumes all the same keeps the old one aside, byte for byte."""
    take(person, KEPT[-1])
    newer_status = {**json.loads(person.home.status.read_text("utf-8")), "schema": NEWER}
    person.home.status.write_text(json.dumps(newer_status), encoding="utf-8")
    before = person.home.status.read_bytes()
    done = person.types("status")
    assert done.returncode == 4 and f"schema {NEWER}" in done.stdout + done.stderr, done.stdout + done.stderr
    assert person.home.status.read_bytes() == before
    assert report.keep_damaged_aside(person.home) is not None
    assert [path.read_bytes() for path in person.home.root.glob("training_status.json.corrupt-*")] == [before]
