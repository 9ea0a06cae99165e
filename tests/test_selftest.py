"""The selftest: it holds on a sound engine, it finds a broken one, and it leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from client import verdict
from client.commands import selftest as selftest_command
from tests.freezer import Freezer
from tests.person import Person
from tests.supervised import wait_for
from trainerd.contract.errors import Refused
from trainerd.engine import locks
from trainerd.engine.selftest import oracle
from trainerd.engine.selftest.small_run import BATCH_SIZE
from trainerd.engine.selftest.small_task import NUM_SAMPLES

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals")


@pytest.fixture
def person(tmp_path: Path) -> Person:
    """Somebody whose temporary files go to a folder of their own."""
    somebody = Person(tmp_path / "home")
    (tmp_path / "temporary").mkdir()
    somebody.environment |= {name: str(tmp_path / "temporary") for name in ("TMPDIR", "TEMP", "TMP")}
    return somebody


def homes(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "temporary").glob("trainerd-selftest-*"))


def processes(tmp_path: Path) -> list[psutil.Process]:
    """Whoever was started for a home under this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def nothing_is_left(tmp_path: Path) -> None:
    wait_for(lambda: not homes(tmp_path) and not processes(tmp_path), 20, "everything to be gone")


@posix
def test_kills_and_damage_lose_nothing(person: Person, tmp_path: Path) -> None:
    """15 kills, many of them inside a commit, and damaged checkpoints: exit 0, one JSON document, nothing left behind."""
    done = person.types("selftest", "--kills", "15", "--seed", "1", "--json", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["passed"] and document["kills"] == 15 and document["forked"] and document["home"] is None
    assert document["inside_commit"] >= 4 and document["damaged"] == document["noticed"] >= 2 and document["acknowledged"] > 100
    nothing_is_left(tmp_path)
    assert not person.home.status.exists(), "the person's own home was touched"


@posix
def test_where_nothing_can_be_forked_every_life_is_a_new_process(tmp_path: Path) -> None:
    """As on Windows and on a GPU: the same trial over processes started from nothing. A GPU that torch cannot use is named."""
    words = ["--home", str(tmp_path), "--spawn", "--kills", "1", "--seed", "1", "--gpu", "GPU-1", "RTX"]
    command = [sys.executable, "-m", "trainerd.engine.selftest", *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        events = [json.loads(line) for line in process.stdout]
    last = events[-1]
    assert process.returncode == 0 and last["passed"] and last["kills"] == 1 and not last["forked"] and last["runs"] == 1
    import torch

    if torch.version.cuda is None:
        assert not last["gpu"]["tested"] and "without CUDA" in last["gpu"]["why"]


BROKEN_ENGINES = """
import os, re, shutil, sys
from pathlib import Path
from unittest import mock

os.environ.update(TRAINERD_STATE=sys.argv[1] + "/state", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
from trainerd.contract import files
from trainerd.contract.paths import Home
from trainerd.engine import building, checkpoints, loader, metrics, rng
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.selftest import devices, small_run
from trainerd.engine.selftest.trial import Trial

seek, commit = loader.Loader.seek, CheckpointStore.commit

def acknowledge_first(self, state, *, acknowledge, step, epoch, **facts):
    acknowledge(checkpoints.Manifest(self.folder / "x.pt", epoch, step, 0.0, 0, "", 0.0, None, 0))
    return commit(self, state, step=step, epoch=epoch, **facts)

def keep_only_two(self):
    for path in self._manifests()[:-2]:
        self._delete(path); self._delete(path.with_suffix(".pt"))

def skip_one(self, step, micro_batch):
    seek(self, step + (step > 0), micro_batch)

def never_cut(path, resume_bytes, *rest):
    return metrics.MetricsLog(path, 1 << 40)

BROKEN = {
    "the random state is not put back": (rng, "put_back", lambda snapshot: None, "differs"),
    "a step is skipped on resume": (loader.Loader, "seek", skip_one, "fed a sample|skipped"),
    "nothing is verified": (checkpoints, "_verify", lambda file, manifest: None, "nobody noticed|differs|is not what|ended by itself"),
    "acknowledged before it is committed": (CheckpointStore, "commit", acknowledge_first, "was acknowledged, and the newest"),
    "leftovers stay": (files, "is_temporary", lambda path: False, "was left by an earlier life"),
    "the best is not kept": (CheckpointStore, "prune", keep_only_two, "best checkpoint|is gone"),
    "metrics are not cut back": (building, "MetricsLog", never_cut, "had had before|step once"),
}
def short(seed):
    return small_run.config(seed, epochs=25)

home = Home(Path(sys.argv[1])); home.logs.mkdir(parents=True)
assert devices._warm_up(home)
begin = devices._forked(home.logs / "log")
wrong = []
for name, (where, what, instead, told) in BROKEN.items():
    with mock.patch.object(where, what, instead):
        trial = Trial(home, 7, 15, begin, short, lambda event, **fields: None, lambda: None, float("inf"), damage_every=3)
        tally = trial.run()
    print(name, "->", tally.problem, tally.kills)
    if tally.problem is None or not re.search(told, tally.problem):
        wrong.append(name)
    for run in (home.runs, home.checkpoints, home.models):
        shutil.rmtree(run, ignore_errors=True)
sys.exit(f"not found: {wrong}" if wrong else 0)
"""


@posix
def test_a_broken_engine_is_found(tmp_path: Path) -> None:
    """With one part of the engine taken out at a time the trial fails, and says what does not hold."""
    program = subprocess.run(
        [sys.executable, "-c", BROKEN_ENGINES, str(tmp_path)], capture_output=True, text=True, timeout=280, check=False
    )
    assert program.returncode == 0, program.stdout + program.stderr


@posix
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_broken_off_it_leaves_nothing(person: Person, tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C, and even a killed command, end the trial, its trainers and its home."""
    command = [sys.executable, "run_optimized_training.py", "selftest", "--kills", "100000"]
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(command, cwd=root, env=person.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: list((tmp_path / "temporary").glob("*/checkpoints/killed-*/*.json")), 60, "the first kills")
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if how == signal.SIGINT else -how), output
    assert "Traceback" not in output
    nothing_is_left(tmp_path)


def test_a_verdict_is_words() -> None:
    """What held, what did not, and where the evidence lies; a GPU is spoken of by name."""
    held: dict[str, Any] = {
        "kills": 50,
        "inside_commit": 17,
        "damaged": 10,
        "seconds": 58.2,
        "problem": None,
        "exact": True,
        "forked": True,
    }
    held |= {"gpu": None, "passed": True, "seed": 3, "because": None}
    said = "50 kills (17 inside a commit) and 10 damaged checkpoints in 58 s: nothing lost, the result is identical to the last bit."
    assert verdict.lines(held, None) == [said]
    broken = {**held, "problem": "model.safetensors differs", "passed": False}
    assert verdict.lines(broken, "/tmp/x") == [
        "FAILED after 50 kills (17 inside a commit) and 10 damaged checkpoints, seed 3: model.safetensors differs.",
        "Everything it did is in /tmp/x; add it to a bug report.",
    ]
    gpu = {"name": "RTX 3050", "tested": True, "kills": 4, "inside_commit": 1, "problem": None, "bit_exact": True, "why": None}
    assert verdict.lines({**held, "gpu": gpu}, None)[1] == (
        "The GPU RTX 3050 is bit-exact: 4 kills (1 inside a commit) there, identical to the last bit."
    )
    assert "not bit-exact, and the trainer says so (x)" in verdict.lines({**held, "gpu": {**gpu, "bit_exact": False, "why": "x"}}, None)[1]
    assert "FAILED on the GPU" in verdict.lines({**held, "gpu": {**gpu, "problem": "it differs"}}, None)[1]
    assert "was not tested: w." in verdict.lines({**held, "gpu": {**gpu, "tested": False, "why": "w."}}, None)[1]


@pytest.mark.skipif(sys.platform == "win32", reason="the kernel's freezer")
def test_a_trial_that_cannot_be_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen by the kernel, no signal reaches it: three times the wait, then its number, and what ends it."""
    monkeypatch.setattr(selftest_command, "_GONE_SECONDS", 0.2)
    process = subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    freezer = Freezer()
    try:
        freezer.freeze(process.pid)
        began = time.monotonic()
        selftest_command._end(process)
        assert 0.6 <= time.monotonic() - began < 5
        said = " ".join(capsys.readouterr().err.split())
        assert f"The trial (process {process.pid}) cannot be ended" in said and "a reboot ends it" in said
    finally:
        process.kill()
        freezer.thaw()
        process.wait(60)
        freezer.close()


FULL = """
import sys
from unittest import mock
from trainerd.engine.selftest.__main__ import main
from trainerd.machine import memory

with mock.patch.object(memory, "ram", lambda *_: memory.RamFacts(24 << 30, 24 << 30)):
    sys.exit(main())
"""


def test_a_machine_without_room_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the RAM is full a trainer is refused: that is told with what to do, and is no verdict over the engine."""
    monkeypatch.setattr(selftest_command.interpreter, "command", lambda _, *words: [sys.executable, "-c", FULL, *words])
    with pytest.raises(Refused, match=r"cannot run just now. It does not fit: .* Close some programs") as raised:
        selftest_command._try(tmp_path, ["--kills", "1"], selftest_command._Nothing())
    assert raised.value.exit_code == 5


def test_a_gpu_that_is_used_is_left_alone(tmp_path: Path) -> None:
    """The trial takes the device's lock at once, or says who has it."""
    holder = locks.DeviceLock("GPU-1", tmp_path / "home", tmp_path)
    assert holder.acquire_at_once() is None
    assert f"the training in {tmp_path / 'home'} is using it" in (locks.DeviceLock("GPU-1", tmp_path, tmp_path).acquire_at_once() or "")
    holder.release()


def lines_of_epochs(*epochs: list[list[int]]) -> list[dict[str, Any]]:
    """metrics.jsonl of epochs that were fed these samples."""
    rows = [(epoch, fed) for epoch, steps in enumerate(epochs, 1) for fed in steps]
    return [
        {"step": n, "epoch": epoch, "loss": 0.1, "metrics": {"fed": sum(1 << i for i in fed) / BATCH_SIZE}}
        for n, (epoch, fed) in enumerate(rows, 1)
    ]


def test_the_history_of_samples_is_really_looked_at() -> None:
    """A doubled sample, a skipped one and a doubled step are each found."""
    whole = [list(range(start, start + BATCH_SIZE)) for start in range(0, NUM_SAMPLES, BATCH_SIZE)]
    oracle.each_sample_once(lines_of_epochs(whole, whole[::-1]))
    for wrong, told in (
        (lines_of_epochs(whole, [*whole[:-1], whole[0]]), "had had before"),
        (lines_of_epochs(whole[:-1], whole), "skipped 8 samples"),
        (lines_of_epochs(whole)[:3] + lines_of_epochs(whole)[2:], "before|every step once"),
    ):
        with pytest.raises(oracle.Broken, match=told):
            oracle.each_sample_once(wrong)
