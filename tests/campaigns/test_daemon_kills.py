"""Kills through the command a person types: real spawns, the real daemon. Trainer, supervisor, or both at once."""

from __future__ import annotations

import random
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.campaigns import size
from tests.campaigns.daemon import Run, compare
from tests.scope import Scope
from trainerd.contract import status
from trainerd.engine.selftest.oracle import Outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL; Windows' tier ends processes in tests/windows"),
]


@dataclass
class Campaign:
    """Runs that are killed until there were `kills`; each is compared with an undisturbed one of its seed."""

    folder: Path
    whom: str
    kills: int
    scope: Scope | None = None
    """Everybody is killed by the kernel at one instant."""
    done: int = 0
    inside: int = 0
    runs: int = 0
    waited: list[float] = field(default_factory=list)
    """Seconds from a kill of the supervisor until nobody was left."""

    def go(self) -> Campaign:
        chance = random.Random(self.whom)
        undisturbed: dict[int, Outcome] = {}
        while self.done < self.kills:
            seed = self.runs % 3
            if seed not in undisturbed:
                undisturbed[seed] = Run(self.folder / f"undisturbed-{seed}", seed).undisturbed()
            run = Run(self.folder / f"killed-{self.runs}", seed)
            try:
                self._disturb(run, chance)
                compare(run, undisturbed[seed])
            finally:
                run.person.leaves()
            shutil.rmtree(run.person.home.root)
            self.runs += 1
            size.tell(f"... {self.whom}: {self.done} kills, {self.runs} runs, {self.inside} inside a commit")
        return self

    def _disturb(self, run: Run, chance: random.Random) -> None:
        run.start()
        killed: int | None = None
        while self.done < self.kills:
            if run.trains(killed).state in status.END_STATES:
                return
            run.random_moment(chance)
            seen = run.reading().status
            if seen is None or seen.state in status.END_STATES or not (seen.trainer and seen.supervisor):
                return
            assert run.trainers() <= 1, "two trainers"
            killed = seen.trainer.pid
            pids = {"trainer": [killed], "supervisor": [seen.supervisor.pid]}.get(self.whom, [killed, seen.supervisor.pid])
            chance.shuffle(pids)
            if self.scope is not None:
                self.scope.take(process.pid for process in run.processes())
                self.scope.kill()
            else:
                run.kill(*pids)
            self.inside += bool(run.torn()) and killed in pids
            self.done += 1
            if self.whom != "trainer" and not self._goes_on(run, chance):
                return

    def _goes_on(self, run: Run, chance: random.Random) -> bool:
        """After the supervisor's death: everybody leaves, nothing is lost, nothing reads as alive; then it is begun again."""
        self.waited.append(run.gone())
        run.ledger.look()
        state = run.person.sees().state
        assert state in ("crashed", "completed"), state
        if state == "completed":
            return False
        if chance.random() < 0.5 or run.person.types("resume", timeout=900).returncode:
            run.start()
        return True


def test_the_trainer_is_killed_again_and_again(tmp_path: Path) -> None:
    """300 kills of the trainer; the supervisor begins it again each time, and nothing is lost."""
    kills = size.of("SPAWNED_KILLS", 300)
    found = Campaign(tmp_path, "trainer", kills).go()
    share = f"{found.inside / kills:.0%} inside a commit"
    size.tell(f"trainer, real spawns: {kills} kills ({share}) in {found.runs} runs: nothing lost, all identical")


def test_the_supervisor_is_killed_again_and_again(tmp_path: Path) -> None:
    """300 kills of the supervisor: the trainer commits and is gone soon, never doubled, and start or resume goes on."""
    kills = size.of("SUPERVISOR_KILLS", 300)
    found = Campaign(tmp_path, "supervisor", kills).go()
    took = f"trainer gone after {statistics.median(found.waited):.2f} s (median), {max(found.waited):.2f} s (longest)"
    size.tell(f"supervisor: {kills} kills in {found.runs} runs, {took}: nothing lost, all identical")


def test_both_are_killed_at_once(tmp_path: Path) -> None:
    """200 kills of supervisor and trainer together, in either order, as a power cut or a session's end does."""
    kills = size.of("BOTH_KILLS", 200)
    found = Campaign(tmp_path, "both", kills).go()
    share = f"{found.inside / kills:.0%} inside a commit"
    size.tell(f"both at once: {kills} kills ({share}) in {found.runs} runs: nothing lost, all identical")


def test_a_whole_unit_is_killed_again_and_again(tmp_path: Path) -> None:
    """100 kills of everything that lives for the home at one instant, by the kernel, as a unit or a container that is ended."""
    kills, scope = size.of("UNIT_KILLS", 100), Scope()
    try:
        found = Campaign(tmp_path, "unit", kills, scope).go()
    finally:
        scope.close()
    share = f"{found.inside / kills:.0%} inside a commit"
    size.tell(f"a whole unit: {kills} kills ({share}) in {found.runs} runs: nothing lost, all identical")
