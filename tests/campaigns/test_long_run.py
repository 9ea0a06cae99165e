"""The real engine for a very great many tiny steps, under the real daemon: what it holds and what lies on the disk does not grow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.campaigns import size
from tests.person import Person
from trainerd.config.model import RunConfig
from trainerd.contract import status
from trainerd.contract.paths import Home, RunPaths
from trainerd.engine.loop import Link
from trainerd.engine.selftest import small_run, small_task
from trainerd.engine.trainer import Trainer
from trainerd.supervisor import journal, logs

pytestmark = pytest.mark.skipif(not hasattr(psutil.Process, "num_fds"), reason="counts descriptors")
_STEPS_AN_EPOCH = small_task.NUM_SAMPLES // 8
_BYTES_A_STEP = 200
_KEPT = 5
"""Checkpoints: three, the best, and one that is being written."""


@dataclass(frozen=True)
class Look:
    """One look at the processes and at the home."""

    step: int
    rss_bytes: tuple[int, int]
    """Of trainer and supervisor."""
    handles: tuple[int, int]
    threads: tuple[int, int]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def look(person: Person) -> Look | None:
    """None while there is no trainer that trains."""
    seen = person.sees().status
    if seen is None or seen.supervisor is None or seen.trainer.pid is None or seen.phase is None or not seen.progress.step:
        return None
    try:
        both = [psutil.Process(seen.trainer.pid), psutil.Process(seen.supervisor.pid)]
        rss, handles, threads = zip(*((p.memory_info().rss, p.num_fds(), p.num_threads()) for p in both), strict=True)
    except psutil.NoSuchProcess:
        return None
    return Look(seen.progress.step, rss, handles, threads)


def watch(person: Person, steps: int, every_seconds: float) -> list[Look]:
    """Train so many steps; what was seen on the way."""
    words = ["--task", f"{small_run.TASK_FILE}:Small", "--epochs", str(-(-steps // _STEPS_AN_EPOCH)), "--name", "long"]
    for setting in ("train.batch_size=8", "train.lr=0.001", "train.precision=fp32", "train.threads=1", "train.eval_every_steps=1000"):
        words += ["--set", setting]
    person.starts(*words)
    looks = []
    while (reading := person.sees()).state not in status.END_STATES:
        assert reading.state != status.CRASHED, reading
        found = look(person)
        if found is not None:
            looks.append(found)
        time.sleep(every_seconds)
    assert reading.state == status.COMPLETED, f"{reading.reason}\n{person.log()}"
    return looks


def disk(paths: RunPaths, steps: int) -> float:
    """Nothing in the home is larger than its bound; the bytes of metrics a step."""
    metrics = paths.metrics.stat().st_size / steps
    one = max(path.stat().st_size for path in paths.checkpoints.glob("*.pt"))
    assert metrics <= _BYTES_A_STEP
    assert bytes_in(paths.checkpoints) < _KEPT * (one + 4096)
    assert bytes_in(paths.home.logs) <= 2 * logs.LOG_BYTES
    assert not paths.events.exists() or paths.events.stat().st_size <= journal.EVENTS_BYTES
    rest = bytes_in(paths.home.root) - paths.metrics.stat().st_size - bytes_in(paths.checkpoints) - bytes_in(paths.home.logs)
    assert rest < 4_000_000, f"{rest:,} bytes nobody has counted"
    return metrics


def test_a_thousand_steps_stay_within_their_bounds_on_the_disk(tmp_path: Path) -> None:
    """At most 200 bytes of metrics for each, no more checkpoints than are kept, and nothing else that grows."""
    train = {"epochs": 167, "batch_size": 8, "precision": "fp32", "threads": 1, "eval_every_steps": 100}
    config = RunConfig.model_validate({"task": small_run.TASK, "train": train, "checkpoint": {"every_steps": 10, "exact": True}})
    Trainer(small_task.Small(), config, home=tmp_path, run="long", link=Link()).train()
    disk(Home(tmp_path).run("long"), 167 * _STEPS_AN_EPOCH)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_hundred_thousand_steps_leave_everything_as_large_as_it_was(tmp_path: Path) -> None:
    """TRAINERD_CAMPAIGN_STEPS (100,000): RSS, handles and threads of trainer and supervisor in the last quarter are those of the second;
    on the disk only metrics.jsonl grows, by at most 200 bytes a step."""
    steps = size.of("STEPS", 100_000)
    person = Person(tmp_path / "home")
    try:
        looks = watch(person, steps, 2.0)
        metrics = disk(person.home.run("long"), steps)
        rest = bytes_in(person.home.root) - metrics * steps
    finally:
        person.leaves()
    second = [look for look in looks if steps * 0.25 < look.step <= steps * 0.5]
    last = [look for look in looks if look.step > steps * 0.75]
    early, late = ([max(look.rss_bytes[who] for look in part) for who in (0, 1)] for part in (second, last))
    many = [(max(look.handles[who] for look in second), max(look.handles[who] for look in last)) for who in (0, 1)]
    growth = [(new - old) / (steps / 2) * 1e6 for old, new in zip(early, late, strict=True)]
    size.tell(
        f"{steps:,} steps of the real engine: trainer {early[0] / 1e6:.1f} MB in the second quarter, {late[0] / 1e6:.1f} MB in the last, "
        f"supervisor {early[1] / 1e6:.1f} and {late[1] / 1e6:.1f} MB ({growth[0] / 1e6:.2f} and {growth[1] / 1e6:.2f} MB a million steps), "
        f"handles {many}, metrics.jsonl {metrics:.0f} bytes a step, everything else {rest:,.0f} bytes"
    )
    assert len(last) > 5 and all(new <= old + 2 for old, new in many)
    assert all(new <= old * 1.02 + 2e6 for old, new in zip(early, late, strict=True)), (early, late)
    assert max(look.threads for look in last) == max(look.threads for look in second)
