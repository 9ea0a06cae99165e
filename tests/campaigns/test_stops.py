"""`stop` at random moments of every phase of the real engine under the real daemon: quick, nothing left, nothing lost, the same result."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.campaigns import size
from tests.campaigns.daemon import Run
from tests.campaigns.unhurried_task import Unhurried
from trainerd.config.model import RunConfig
from trainerd.contract import requests, runs, status
from trainerd.contract.paths import Home
from trainerd.engine.loop import Link
from trainerd.engine.selftest import oracle
from trainerd.engine.selftest.oracle import Outcome
from trainerd.engine.selftest.small_task import Small
from trainerd.engine.trainer import Trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="looks at processes by their command line")
TASK = str(Path(__file__).with_name("unhurried_task.py"))
PHASES = ("starting", "preparing", "training", "evaluating", "checkpointing", "exporting")
_MOST_SECONDS = 15.0
"""For one stop, on a machine that is busy otherwise; what it took is told."""
_WORDS = ("--task", f"{TASK}:Unhurried", "--epochs", "40", "--set", "train.eval_every_steps=60")


class UnhurriedRun(Run):
    """A run of that task; in the others of the campaign everything is as in any."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root, seed)
        kept = self.words[self.words.index("--set") :]
        self.words = (*_WORDS[:4], *kept, *_WORDS[4:])

    def in_phase(self, phase: str, seconds: float = 60.0) -> str | None:
        """Wait until it is in that phase, or has come past it; which one it is then. None: the run has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            reading = self.reading()
            seen = reading.status.phase.name if reading.status is not None and reading.status.phase is not None else None
            if reading.state in status.END_STATES:
                return None
            torn = phase == "checkpointing" and seen == "training" and self.torn()
            if seen == phase or torn:
                return phase
            if seen is not None and PHASES.index(phase) < PHASES.index("training") <= PHASES.index(seen):
                return seen  # what is prepared is not prepared again
            time.sleep(0.001 if seen == "training" else 0.03)
        raise AssertionError(f"no {phase} within {seconds:g} s: {self.person.sees()}\n{self.person.log()}")

    def stop(self) -> float:
        """Ask for it, wait until nobody is left; how long that took."""
        began = time.monotonic()
        self.person.asks("stop")
        self.gone(60)
        return time.monotonic() - began


@dataclass
class Campaign:
    """Runs that are stopped until there were `stops`; each is compared with an undisturbed one of its seed."""

    folder: Path
    stops: int
    took: list[float] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)
    runs: int = 0

    def go(self) -> Campaign:
        chance = random.Random(self.stops)
        undisturbed: dict[int, Outcome] = {}
        while len(self.took) < self.stops:
            seed = self.runs % 2
            if seed not in undisturbed:
                undisturbed[seed] = UnhurriedRun(self.folder / f"undisturbed-{seed}", seed).undisturbed()
            run = UnhurriedRun(self.folder / f"stopped-{self.runs}", seed)
            try:
                self._disturb(run, chance)
                found = run.person.waits_for_state(*status.END_STATES, "crashed", seconds=300)
                assert found.state == status.COMPLETED, found
                run.gone()
                compare_but_for_leaving(run, undisturbed[seed])
            finally:
                run.person.leaves()
            shutil.rmtree(run.person.home.root)
            self.runs += 1
            size.tell(f"... stop: {len(self.took)} stops, {self.runs} runs, longest {max(self.took):.2f} s")
        return self

    def _disturb(self, run: UnhurriedRun, chance: random.Random) -> None:
        # The beginning is the same for every life: preparing comes once a run, the end ends it.
        wanted = ["starting", "preparing", *chance.choices(PHASES[2:5], k=3), "exporting"]
        for phase in wanted[: self.stops - len(self.took)]:
            self.stop_in(run, phase, chance)
            if run.person.sees().state == status.COMPLETED:
                return
        run.start()

    def stop_in(self, run: UnhurriedRun, phase: str, chance: random.Random) -> None:
        """Start it, and stop it somewhere in that phase, or soon after."""
        run.start()
        found = run.in_phase(phase)
        if found is None:
            return
        time.sleep(chance.uniform(0.0, 0.005 if phase == "checkpointing" else 0.9))
        if run.reading().state not in status.END_STATES:
            self._stop(run, found)

    def _stop(self, run: UnhurriedRun, phase: str) -> None:
        self.took.append(run.stop())
        self.phases[phase] += 1
        reading, record = run.reading(), runs.read(run.person.home, "small")
        assert reading.state in (status.STOPPED, status.COMPLETED), reading
        assert record.outcome == reading.state and requests.pending(run.person.home) == []
        oracle.nobody_left(run.paths)
        found = run.ledger.look()
        if reading.state == status.STOPPED and run.paths.metrics.exists():
            done = [row["step"] for row in run.person.metrics("small") if "loss" in row]
            assert max(found.manifests, default=0) == max(done, default=0), f"stopped in {phase}: not saved up to the last step"
        assert self.took[-1] < _MOST_SECONDS, f"a stop in {phase} took {self.took[-1]:.1f} s: {reading.reason}"


def compare_but_for_leaving(run: UnhurriedRun, undisturbed: Outcome) -> None:
    """Leaving has saved at steps of its own: which checkpoints are kept in the end may differ, nothing else may."""
    here = run.outcome()
    kept = {name for name in here.files ^ undisturbed.files if name.startswith("checkpoint_")}
    here.files -= kept
    here.compare(Outcome(undisturbed.lines, undisturbed.weights, undisturbed.files - kept))
    oracle.nobody_left(run.paths)


def trained_here(task: Small, home: Path, config: RunConfig) -> Outcome:
    """What the engine makes of a run, inside this process: without a second torch to import."""
    assert Trainer(task, config, home=home, run="small", link=Link()).train().outcome == "finished"
    return oracle.outcome(Home(home).run("small"))


def test_five_stops(tmp_path: Path) -> None:
    """One in each phase but the last, at a random moment: committed up to the last step, everybody gone, then on to the same bits."""
    chance, campaign, run = random.Random(5), Campaign(tmp_path, 5), UnhurriedRun(tmp_path / "home", 1)
    try:
        for phase in ("starting", "preparing", "evaluating", "checkpointing", "training"):
            campaign.stop_in(run, phase, chance)
        assert len(campaign.took) == 5, campaign.phases
    finally:
        run.person.leaves()
    config = RunConfig.model_validate(runs.read(run.person.home, "small").config)
    here = trained_here(Unhurried(), run.person.home.root, config)
    undisturbed = trained_here(Small(), tmp_path / "undisturbed", config)
    here.compare(Outcome(undisturbed.lines, undisturbed.weights, here.files))  # a supervisor leaves files of its own
    oracle.nobody_left(run.paths)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_stop_at_a_hundred_random_moments(tmp_path: Path) -> None:
    """100 stops (TRAINERD_CAMPAIGN_STOPS) over all six phases: committed, everybody gone in bounded time, and exact when it goes on."""
    found = Campaign(tmp_path, size.of("STOPS", 100)).go()
    took = sorted(found.took)
    where = ", ".join(f"{phase} {found.phases[phase]}" for phase in PHASES)
    p99 = took[min(len(took) - 1, round(0.99 * (len(took) - 1)))]
    size.tell(
        f"stop: {len(took)} in {found.runs} runs ({where}): gone after {took[len(took) // 2]:.2f} s (median), {p99:.2f} s (p99), "
        f"{took[-1]:.2f} s (longest): committed, nothing left, all identical"
    )
    assert set(found.phases) == set(PHASES)
