"""A real run under the real daemon, for campaigns: begun with the command, killed by its processes, compared at its end. No tests here."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil

from tests.person import Person
from tests.supervised import wait_for
from trainerd.contract import lock, status
from trainerd.contract.status import Reading
from trainerd.engine.selftest import oracle, small_run

# Longer than the selftest's: every life costs seconds here, so each should have something to be killed in.
_SMALL = (
    "--task", str(small_run.TASK_FILE) + ":Small", "--epochs", "400",
    "--set", "train.batch_size=8", "--set", "train.micro_batch=4", "--set", "train.lr=0.01", "--set", "train.eval_every_steps=10",
    "--set", "train.precision=fp32", "--set", "train.threads=1", "--set", "polite.priority=normal",
    "--set", "checkpoint.every_steps=4", "--set", "checkpoint.exact=true",
)  # fmt: skip
_SPAN_SECONDS = 0.8
_PATIENCE_SECONDS = 900.0


class Run:
    """One run in one home."""

    def __init__(self, root: Path, seed: int) -> None:
        self.person = Person(root)
        self.seed = seed
        self.words = (*_SMALL, "--set", f"seed={seed}", "--name", "small")
        self.paths = self.person.home.run("small")
        self.ledger = oracle.Ledger(self.paths)

    def start(self) -> None:
        done = self.person.types("start", *self.words, timeout=_PATIENCE_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr + self.person.log()

    def undisturbed(self) -> oracle.Outcome:
        self.start()
        self.person.waits_for_state("completed", seconds=_PATIENCE_SECONDS)
        self.gone()
        return self.outcome()

    def outcome(self) -> oracle.Outcome:
        found = oracle.outcome(self.paths)
        found.files -= {name for name in found.files if name.endswith((".log", "events.jsonl"))}
        return found

    def reading(self) -> Reading:
        """The status, and with it what it acknowledges."""
        reading = self.person.sees()
        if reading.status is not None and reading.status.checkpoint is not None and reading.status.checkpoint.step:
            self.ledger.acknowledged.add(reading.status.checkpoint.step)
        return reading

    def trains(self, trainer_not: int | None = None) -> Reading:
        """Wait until a trainer (another one than the one killed) trains, or everything has ended."""
        found: list[Reading] = []

        def look() -> bool:
            found[:] = [self.reading()]
            state, seen = found[0].state, found[0].status
            if state in status.END_STATES:
                return True
            if state != status.RUNNING or seen is None or seen.trainer is None or seen.phase is None:
                return False
            return seen.trainer.pid != trainer_not and seen.phase.name == "training"

        wait_for(look, _PATIENCE_SECONDS, "a trainer that trains")
        return found[0]

    def random_moment(self, chance: random.Random) -> None:
        """Some time passes; in half of the cases until a commit is going on."""
        until = time.monotonic() + chance.uniform(0, _SPAN_SECONDS)
        while time.monotonic() < until:
            self.reading()
            time.sleep(0.01)
        if chance.random() < 0.5:
            until = time.monotonic() + 0.3
            while time.monotonic() < until and not self.torn():
                time.sleep(0.0003)

    def torn(self) -> set[str]:
        """What a commit that is going on, or was cut off, shows."""
        try:
            names = {path.name for path in self.paths.checkpoints.iterdir()}
        except FileNotFoundError:
            return set()
        states = {n for n in names if n.startswith("checkpoint_") and n.endswith(".pt") and n.removesuffix(".pt") + ".json" not in names}
        return states | {n for n in names if n.endswith(".tmp")}

    def processes(self) -> list[psutil.Process]:
        """Everything that lives for this home."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            ours = any(str(self.person.home.root) in word for word in process.info["cmdline"] or ())
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process)
        return found

    def trainers(self) -> int:
        """How many trainers live: never more than one works, a second could only wait for the lock."""
        return sum("trainerd.engine" in process.info["cmdline"] for process in self.processes())

    def gone(self, seconds: float = 20) -> float:
        """Wait until nobody is left; how long it took."""
        began = time.monotonic()
        locks = (self.person.home.trainer_lock, self.person.home.supervisor_lock)
        wait_for(lambda: not (any(map(lock.is_held, locks)) or self.processes()), seconds, "the end")
        return time.monotonic() - began

    def kill(self, *pids: int | None) -> None:
        for pid in pids:
            if pid:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def compare(run: Run, undisturbed: oracle.Outcome) -> None:
    """The run has ended as if nothing had happened, and nothing is left over."""
    reading = run.person.waits_for_state(*status.END_STATES, "crashed", seconds=_PATIENCE_SECONDS)
    assert reading.state == "completed", f"{reading.state}: {reading.reason}"
    run.gone()
    run.outcome().compare(undisturbed)
    oracle.nobody_left(run.paths)
