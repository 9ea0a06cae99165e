"""CheckpointStore: what is acknowledged is there, whatever is killed, cut, flipped or full. Real files, real kills."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.disks import Notes, RecordingDisk, commit, loaded_step, names, pair, state_file
from trainerd.contract import files
from trainerd.contract.errors import NoGoodCheckpoint
from trainerd.engine import checkpoints
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.manifest import Manifest, signed

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")


# commit, load, keep


def test_empty_folder_is_a_beginning(tmp_path: Path) -> None:
    """None is only for a run that never had a checkpoint."""
    assert CheckpointStore(tmp_path / "new").load() is None


def test_what_is_committed_comes_back_exactly(tmp_path: Path) -> None:
    """A state of tensors and plain values survives to the last bit, under weights_only loading."""
    store = CheckpointStore(tmp_path / "a" / "b")
    manifest = commit(store, 50, best=2.5)
    assert manifest.path.stat().st_size == manifest.bytes
    assert loaded_step(store) == 50
    assert store.committed() == [manifest]


def test_the_metrics_are_durable_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order on the disk is state, metrics, manifest, and each is synced before the next begins; then it is acknowledged."""
    disk = RecordingDisk()
    monkeypatch.setattr(files, "disk", disk)
    (tmp_path / "metrics.jsonl").write_text("{long}\n", encoding="utf-8")
    folder = tmp_path / "checkpoints"
    acknowledged: list[int] = []
    store = CheckpointStore(folder)
    commit(store, 1, metrics=tmp_path / "metrics.jsonl", acknowledge=lambda manifest: acknowledged.append(len(disk.seen)))
    kinds = [(kind, name.split(".")[-1]) for kind, name in disk.seen[: acknowledged[0]] if kind not in ("write", "create", "make_folder")]
    windows = sys.platform == "win32"  # there the file is synced again, which writes the journal that has the rename
    state = [("sync", "tmp"), ("rename", "pt"), ("sync", "pt") if windows else ("sync_folder", "checkpoints")]
    committed = [("sync", "tmp"), ("rename", "json"), ("sync", "json") if windows else ("sync_folder", "checkpoints")]
    metrics = [("sync", "jsonl"), ("sync_folder", tmp_path.name)]
    expected = [("sync_folder", tmp_path.name), *state, *metrics, *committed, *committed]  # the second: first_commit.json
    assert kinds == [step for step in expected if not windows or step[0] != "sync_folder"]


def test_nothing_is_committed_before_its_metrics_are_on_the_disk(tmp_path: Path) -> None:
    """While lines still wait for room the save fails; when they are there, the same step is committed."""
    (tmp_path / "metrics.jsonl").write_bytes(b"{}\n")
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(OSError, match="metrics are not on the disk"):
        commit(store, 1, metrics=tmp_path / "metrics.jsonl")
    assert store.committed() == []
    (tmp_path / "metrics.jsonl").write_bytes(b"{1234}\n")
    commit(store, 1, metrics=tmp_path / "metrics.jsonl")
    assert loaded_step(store) == 1


def test_a_committed_name_is_never_written_again(tmp_path: Path) -> None:
    """Committing the same step again acknowledges what is there and leaves its file alone."""
    store = CheckpointStore(tmp_path)
    first = commit(store, 10)
    before = first.path.stat().st_mtime_ns
    acknowledged: list[Manifest] = []
    again = commit(store, 10, acknowledge=acknowledged.append)
    assert again == first and acknowledged == [first] and first.path.stat().st_mtime_ns == before


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    """keep newest plus the earliest with the best evaluation; everything else is deleted, after the acknowledgement."""
    store = CheckpointStore(tmp_path, keep=2)
    for step, best in ((1, None), (2, 0.5), (3, 0.5), (4, float("nan")), (5, 0.5)):
        there: list[set[str]] = []
        commit(store, step, best, acknowledge=lambda manifest, seen=there: seen.append(names(tmp_path)))
        assert pair(step) <= there[0]
        if step == 3:
            assert pair(1) <= there[0], "deleted before the new one was acknowledged"
    assert names(tmp_path) == pair(2) | pair(4) | pair(5)
    commit(CheckpointStore(tmp_path, keep=2, keep_best=False), 6)
    assert names(tmp_path) == pair(5) | pair(6)


def test_a_state_that_could_not_be_loaded_is_refused_by_name(tmp_path: Path) -> None:
    """A numpy scalar in a state would spoil every later load: it is named, and nothing is written."""
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=r"state\['best'\]\[1\] is a numpy\.float64"):
        store.commit({"best": [1.0, numpy.float64(2)]}, epoch=1, step=1, best=None, metrics=None, metrics_bytes=0, about={})
    assert names(tmp_path) == set()


def test_going_back_sets_newer_ones_aside(tmp_path: Path) -> None:
    """load(before_step) renames what is newer, and the same steps can be committed again."""
    notes = Notes()
    store = CheckpointStore(tmp_path, note=notes)
    for step in (10, 20, 30):
        commit(store, step)
    assert loaded_step(store, before_step=30) == 20
    assert notes == [("superseded", {"file": "checkpoint_epoch_1_step_30.pt", "step": 30})]
    commit(store, 30)
    assert loaded_step(store, before_step=21) == 20
    commit(store, 30)
    assert {f"{name}.superseded-{n}" for name in pair(30) for n in (1, 2)} | pair(10) | pair(20) | pair(30) == names(tmp_path)


def test_nothing_before_the_first_is_no_beginning(tmp_path: Path) -> None:
    """Asked for a checkpoint before the first one, it says so and leaves everything as it is."""
    store = CheckpointStore(tmp_path)
    commit(store, 10)
    with pytest.raises(NoGoodCheckpoint, match="before step 10"):
        store.load(before_step=10)
    assert loaded_step(store) == 10


# damage


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def hole(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600:1100] = bytes(500)
    path.write_bytes(content)


def pack(path: Path) -> None:
    """A zip of the same size that would unpack to much more, with a manifest that vouches for it."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    vouch_for(path)


def vouch_for(path: Path) -> None:
    document = json.loads(path.with_suffix(".json").read_bytes())
    del document["check"]
    document["bytes"], document["sha256"] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_bytes(signed(document))


def exploit(path: Path) -> None:
    """A pickle that would run a program, with a manifest that vouches for it."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(path.with_name("executed")),))

    torch.save({"x": Evil()}, path)
    vouch_for(path)


def turn_into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def take_the_manifest_of_another(path: Path) -> None:
    shutil.copy(path.with_name("checkpoint_epoch_1_step_10.json"), path.with_suffix(".json"))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "hole": hole,
    "gone": lambda path: path.unlink(),
    "packed": pack,
    "exploit": exploit,
    "manifest truncated": lambda path: os.truncate(path.with_suffix(".json"), 100),
    "manifest empty": lambda path: os.truncate(path.with_suffix(".json"), 0),
    "manifest of another": take_the_manifest_of_another,
    "folder instead": turn_into_a_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    """Nothing damaged is loaded, executed or deleted; the next older one is, and the damage is told."""
    notes = Notes()
    store = CheckpointStore(tmp_path, note=notes)
    for step in (10, 20):
        commit(store, step)
    DAMAGES[damage](state_file(tmp_path, 20))
    assert loaded_step(store) == 10
    assert notes.kinds() == ["quarantine"] and notes[0][1]["file"] == "checkpoint_epoch_1_step_20.pt" and notes[0][1]["why"]
    assert all(name in pair(10) or name.endswith(".bad-1") for name in names(tmp_path))
    assert "checkpoint_epoch_1_step_20.json.bad-1" in names(tmp_path)
    commit(store, 20)
    assert loaded_step(store) == 20


@posix
def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A symbolic link in place of a checkpoint is refused, although what it points to is whole."""
    store = CheckpointStore(tmp_path / "c")
    commit(store, 10)
    shutil.move(state_file(tmp_path / "c", 10), tmp_path / "elsewhere.pt")
    state_file(tmp_path / "c", 10).symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(NoGoodCheckpoint):
        store.load()
    assert (tmp_path / "elsewhere.pt").exists()


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """100 single flipped bits of the state and one of every byte of the manifest: each is noticed (torch.load alone notices none).
    On Windows a tenth of them."""
    store = CheckpointStore(tmp_path)
    path = commit(store, 10).path
    manifest = path.with_suffix(".json")
    whole = {file: file.read_bytes() for file in (path, manifest)}
    draw = random.Random(0)
    every = 10 if sys.platform == "win32" else 1  # the same arithmetic everywhere, and every file takes its time there
    for bit in [draw.randrange(8 * len(whole[path])) for _ in range(100 // every)]:
        flip(path, bit)
        with pytest.raises(NoGoodCheckpoint):
            store.load()
        for file, content in whole.items():
            file.with_name(file.name + ".bad-1").unlink()
            file.write_bytes(content)
    for bit in [8 * byte + draw.randrange(8) for byte in range(0, len(whole[manifest]), every)]:
        flip(manifest, bit)
        assert store.committed() == [], f"bit {bit} of the manifest"
        manifest.write_bytes(whole[manifest])
    assert loaded_step(store) == 10


def test_all_bad_stops_and_deletes_nothing(tmp_path: Path) -> None:
    """When none is good there is an error, now and at every later start, and every byte is still there."""
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        commit(store, step)
        flip(state_file(tmp_path, step), 9999)
    for _ in range(2):
        with pytest.raises(NoGoodCheckpoint, match="nothing was deleted"):
            store.load()
    assert len(names(tmp_path)) == 6


def test_lost_manifests_are_not_a_beginning(tmp_path: Path) -> None:
    """A folder whose manifests are gone is told from one that never had any."""
    store = CheckpointStore(tmp_path, note=(notes := Notes()))
    commit(store, 10).path.with_suffix(".json").unlink()
    with pytest.raises(NoGoodCheckpoint):
        store.load()
    assert notes == [("uncommitted", {"file": "checkpoint_epoch_1_step_10.pt"})]


def test_a_lost_folder_is_no_beginning(tmp_path: Path) -> None:
    """With the whole folder gone, a mark outside of it or the acknowledged step of the record tells that there was something; a
    run that only never had a checkpoint begins."""
    mark = tmp_path / "runs" / "run" / "committed.json"
    store = CheckpointStore(tmp_path / "c", mark=mark)
    assert store.load() is None
    there: list[bool] = []
    commit(store, 10, acknowledge=lambda manifest: there.append(mark.exists()))
    assert there == [True], "acknowledged before it was known that there is something to lose"
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(NoGoodCheckpoint, match="are gone") as error:
        store.load()
    assert "--no-resume" in error.value.hint
    mark.unlink()
    assert store.load() is None
    with pytest.raises(NoGoodCheckpoint, match="step 10 was saved"):
        CheckpointStore(tmp_path / "c", reached_step=10).load()
    assert not (tmp_path / "c").exists() or not any((tmp_path / "c").iterdir())


def test_what_is_set_aside_does_not_fill_the_disk(tmp_path: Path) -> None:
    """The newest two bad and the newest two superseded ones stay; and every one until a good checkpoint has come as far again."""
    notes = Notes()
    store = CheckpointStore(tmp_path, keep=2, note=notes)
    for step in (10, 20, 30, 40, 50):
        commit(store, step)
        if step < 50:
            commit(store, step + 1)
            flip(state_file(tmp_path, step + 1), 9999)
            assert loaded_step(store) == step
    bad = {name for step in (31, 41) for name in (f"{n}.bad-1" for n in pair(step))}
    assert {name for name in names(tmp_path) if ".bad-" in name} == bad
    assert "forgotten" in notes.kinds()
    for _ in range(4):
        loaded_step(store, before_step=50)
        commit(store, 45)
        assert len([name for name in names(tmp_path) if name.startswith(state_file(tmp_path, 50).name)]) > 0
        commit(store, 50)
    assert len([name for name in names(tmp_path) if ".superseded-" in name]) == 4


def test_nothing_set_aside_is_deleted_before_it_is_made_up_for(tmp_path: Path) -> None:
    """Of three bad ones all stay while the newest good checkpoint lies before them; when it has come past them, the newest two."""
    store = CheckpointStore(tmp_path, keep=5)
    for step in (10, 50, 51, 52):
        commit(store, step)
    for step in (50, 51, 52):
        flip(state_file(tmp_path, step), 9999)
    assert loaded_step(store) == 10
    commit(store, 20)
    assert len([name for name in names(tmp_path) if ".bad-" in name]) == 6
    commit(store, 60)
    assert {name for name in names(tmp_path) if ".bad-" in name} == {f"{name}.bad-1" for step in (51, 52) for name in pair(step)}


def test_a_manifest_from_before_is_as_good(tmp_path: Path) -> None:
    """One without the hash of the metrics and without what was written that day loads, and the next ones have both."""
    store = CheckpointStore(tmp_path)
    commit(store, 10, metrics_sha256="ab", spent_bytes=5.0)
    path = state_file(tmp_path, 10).with_suffix(".json")
    document = json.loads(path.read_bytes())
    assert document["metrics_sha256"] == "ab" and document["spent_bytes"] == 5.0 + document["bytes"]
    for name in ("check", "metrics_sha256", "spent_bytes"):
        del document[name]
    path.write_bytes(signed(document))
    assert loaded_step(store) == 10
    assert store.committed()[0].metrics_sha256 is None and store.committed()[0].spent_bytes == 0.0


@posix
def test_a_manifest_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """Not even to a manifest that is whole."""
    store = CheckpointStore(tmp_path / "c")
    manifest = commit(store, 10).path.with_suffix(".json")
    shutil.move(manifest, tmp_path / "elsewhere.json")
    manifest.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(NoGoodCheckpoint):
        store.load()
    assert (tmp_path / "elsewhere.json").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="the source is the same everywhere")
def test_every_load_of_a_state_is_of_weights_only() -> None:
    """Nowhere in the program is a pickle loaded that could run something."""
    root = Path(checkpoints.__file__).parents[1]
    for path in [*root.rglob("*.py"), *root.with_name("client").rglob("*.py")]:
        for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert called != "torch.load" or given.get("weights_only") == "True", f"{path}:{call.lineno}"
            assert not called.startswith(("pickle.", "marshal.", "shelve.", "joblib.", "dill.")), f"{path}:{call.lineno}"
            assert called != "np.load" or given.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    """Half-written files, and a state whose commit was cut before its manifest, go at the next load."""
    store = CheckpointStore(tmp_path)
    commit(store, 10)
    (tmp_path / ".checkpoint_epoch_1_step_20.pt.123-4.tmp").write_bytes(b"half")
    state_file(tmp_path, 20).write_bytes(b"whole, but without a manifest")
    assert loaded_step(store) == 10
    assert names(tmp_path) == pair(10)
