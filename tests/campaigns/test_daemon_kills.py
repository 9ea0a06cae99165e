"""Kills through the command a person types: real spawns, the real daemon. Trainer, supervisor, or both at once."""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import pytest

from tests.campaigns import size
from tests.campaigns.daemon import Run, compare
from trainerd.contract import lock, status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL; Windows' tier ends processes in tests/windows"),
]


def campaign(tmp_path: Path, whom: str, kills: int) -> tuple[int, int, list[float]]:
    """(runs, kills inside a commit, seconds until what was left had gone); every run is compared with an undisturbed one."""
    chance = random.Random(f"{whom} {kills}")
    done = inside = runs = 0
    waited: list[float] = []
    while done < kills:
        seed = runs % 3
        undisturbed = Run(tmp_path / f"undisturbed-{runs}", seed)
        expected = undisturbed.undisturbed()
        run = Run(tmp_path / f"killed-{runs}", seed)
        run.start()
        killed: int | None = None
        while done < kills:
            reading = run.trains(killed)
            if reading.state in status.END_STATES:
                break
            run.random_moment(chance)
            reading = run.reading()
            if reading.state in status.END_STATES or reading.status is None or not (reading.status.trainer and reading.status.supervisor):
                break
            assert run.trainers() <= 1, "two trainers"
            killed = reading.status.trainer.pid
            before = run.torn()
            began = time.monotonic()
            if whom == "trainer":
                run.kill(killed)
            elif whom == "supervisor":
                run.kill(reading.status.supervisor.pid)
            else:
                pids = [reading.status.supervisor.pid, killed]
                chance.shuffle(pids)
                run.kill(*pids)
            inside += bool(run.torn() or before) if whom != "supervisor" else 0
            done += 1
            if whom == "trainer":
                continue
            waited.append(run.gone(20))
            run.ledger.look()
            assert run.person.sees().state in ("crashed", *status.END_STATES), f"{time.monotonic() - began:.1f} s after the kill"
            assert not lock.is_held(run.person.home.supervisor_lock)
            if chance.random() < 0.5 or run.person.types("resume").returncode:
                run.start()
        compare(run, expected)
        runs += 1
        shutil.rmtree(tmp_path / f"killed-{runs - 1}")
        shutil.rmtree(tmp_path / f"undisturbed-{runs - 1}")
        size.tell(f"... {whom}: {done} kills, {runs} runs, {inside} inside a commit")
    return runs, inside, waited


def test_the_trainer_is_killed_again_and_again(tmp_path: Path) -> None:
    """300 kills of the trainer; the supervisor begins it again each time, and nothing is lost."""
    kills = size.of("SPAWNED_KILLS", 300)
    runs, inside, _ = campaign(tmp_path, "trainer", kills)
    size.tell(f"trainer, real spawns: {kills} kills ({inside / kills:.0%} inside a commit) in {runs} runs: nothing lost, all identical")


def test_the_supervisor_is_killed_again_and_again(tmp_path: Path) -> None:
    """300 kills of the supervisor: the trainer commits and is gone soon, never doubled, and start or resume goes on."""
    kills = size.of("SUPERVISOR_KILLS", 300)
    runs, _, waited = campaign(tmp_path, "supervisor", kills)
    took = f"trainer gone after {statistics.median(waited):.2f} s (median), {max(waited):.2f} s (longest)"
    size.tell(f"supervisor: {kills} kills in {runs} runs, {took}: nothing lost, all identical")
    assert max(waited) < 10


def test_both_are_killed_at_once(tmp_path: Path) -> None:
    """200 kills of supervisor and trainer together, in either order, as a power cut or a session's end does."""
    kills = size.of("BOTH_KILLS", 200)
    runs, inside, _ = campaign(tmp_path, "both", kills)
    size.tell(f"both at once: {kills} kills ({inside / kills:.0%} inside a commit) in {runs} runs: nothing lost, all identical")
