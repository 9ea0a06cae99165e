"""The trial: lives are begun, killed and their checkpoints spoiled, until every run has ended like the undisturbed one.

Must not know who watches: it tells events to a callable. It stops at the first promise that does not hold, and leaves
everything as it was then.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainerd.config.model import RunConfig
from trainerd.contract import wire
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home, RunPaths
from trainerd.engine.selftest import damage, oracle, small_run
from trainerd.engine.selftest.life import Life
from trainerd.engine.selftest.oracle import Broken, Ledger, Outcome

START, COMMIT, ANYWHERE = "start", "commit", "anywhere"
_SHARES = {START: 0.15, COMMIT: 0.5, ANYWHERE: 0.35}
_NUM_SEEDS = 3
_DAMAGE_EVERY = 5
# Commits a life may see at most: enough to get on, few enough that a run dies often.
_REACH = 8
_COMMITS_OF_A_RUN = 150
_SILENT_SECONDS = 120.0
_LOOK_SECONDS = 0.0003


@dataclass
class Tally:
    """What was done and found."""

    kills: int = 0
    inside_commit: int = 0
    at_start: int = 0
    at_end: int = 0
    damaged: int = 0
    noticed: int = 0
    runs: int = 0
    acknowledged: int = 0
    seconds: float = 0.0
    exact: bool = True
    because: str | None = None
    """Why the trainer itself says that it is not exact."""
    differs_by_itself: bool = False
    """Two undisturbed runs were not the same."""
    problem: str | None = None

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Seen:
    """What one life has told so far."""

    training: bool = False
    exporting: bool = False
    commits: int = 0
    named: set[str] = field(default_factory=set)
    error: str | None = None
    refused: str | None = None
    """Why the machine has no room for it just now."""


@dataclass
class Trial:
    """`begin(paths)` starts a life; `configure(seed)` gives a run's configuration; `watch()` raises when nobody waits any more."""

    home: Home
    seed: int
    kills: int
    begin: Callable[[RunPaths], Life]
    configure: Callable[[int], RunConfig]
    tell: Callable[..., None]
    watch: Callable[[], None]
    until: float
    """The monotonic time after which no more is killed."""
    damage_every: int = _DAMAGE_EVERY

    def __post_init__(self) -> None:
        self.tally = Tally()
        self.undisturbed: dict[int, Outcome] = {}
        self._chance = random.Random(self.seed)
        self._began = time.monotonic()
        self._start_seconds = self._end_seconds = self._commit_seconds = self._interval_seconds = 0.05
        self._reach = max(_REACH, 2 * _COMMITS_OF_A_RUN // max(1, self.kills))

    def run(self) -> Tally:
        """Everything; what does not hold is the tally's `problem`. Raises Refused when the machine has no room for a trainer."""
        try:
            while self._wants_more():
                seed = self.seed + self.tally.runs % _NUM_SEEDS
                if seed not in self.undisturbed:
                    self._tell("undisturbed")
                    self.undisturbed[seed] = self.live_undisturbed(f"undisturbed-{seed}", seed)
                self._disturb(f"killed-{self.tally.runs + 1}", seed)
                self.tally.runs += 1
        except Broken as broken:
            self.tally.problem = str(broken)
        self.tally.seconds = time.monotonic() - self._began
        return self.tally

    def _wants_more(self) -> bool:
        enough = self.tally.kills >= self.kills or time.monotonic() >= self.until
        return not self.tally.runs or not enough

    def _tell(self, phase: str) -> None:
        self.tell("progress", phase=phase, of=self.kills, **self.tally.document())

    def live_undisturbed(self, name: str, seed: int) -> Outcome:
        """One run from its beginning to its end in one life."""
        paths = small_run.begin(self.home, name, self.configure(seed))
        life, seen = self.begin(paths), _Seen()
        self._live(life, seen, None, paths)
        self._must_have_finished(life, seen)
        self._interval_seconds = max(0.002, (time.monotonic() - life.began - self._start_seconds) / _COMMITS_OF_A_RUN)
        oracle.nobody_left(paths)
        found = oracle.outcome(paths)
        small_run.remove(paths)
        return found

    def _disturb(self, name: str, seed: int) -> None:
        """One run, killed again and again until it has ended; then it must be the undisturbed one."""
        paths = small_run.begin(self.home, name, self.configure(seed))
        ledger = Ledger(paths)
        torn: set[str] = set()
        spoiled: set[str] = set()
        while True:
            aim = self._aim(after_damage=bool(spoiled))
            life, seen = self.begin(paths), _Seen()
            killed = self._live(life, seen, aim, paths, ledger)
            self._notice(spoiled, seen, killed)
            found = ledger.look()
            if seen.training and (left := {name for name in found.torn & torn if name.endswith(".tmp")}):
                raise Broken(f"{min(left)} was left by an earlier life, and not removed")
            if not killed:
                break
            self.tally.inside_commit += bool(found.torn - torn)
            torn = found.torn
            if self.tally.kills % self.damage_every == 0 and not paths.result.exists():  # a finished run loads none any more
                spoiled = self._spoil(ledger, found)
            self._tell("kills")
        self._must_have_finished(life, seen)
        oracle.nobody_left(paths)
        self._compare(oracle.outcome(paths), seed)
        small_run.remove(paths)

    def _aim(self, after_damage: bool) -> str | None:
        """When to kill the next life; None: never. After damage not before it has told what it found."""
        if self.tally.kills >= self.kills or time.monotonic() >= self.until:
            return None
        aims = [aim for aim in _SHARES if aim != START or not after_damage]
        return self._chance.choices(aims, [_SHARES[aim] for aim in aims])[0]

    def _live(self, life: Life, seen: _Seen, aim: str | None, paths: RunPaths, ledger: Ledger | None = None) -> bool:
        """Let it live until it is killed as aimed, or ends by itself; whether it was killed."""
        try:
            moment, heard = _Moment(self, aim, life.began, paths.checkpoints), life.began
            while not life.ended():
                self.watch()
                for event in life.events(moment.patience()):
                    heard = time.monotonic()
                    self._hear(event, seen, ledger)
                now = time.monotonic()
                if moment.has_come(seen, now):
                    if not life.ended():
                        self._count(seen)
                        return True
                    break
                if now - heard > _SILENT_SECONDS:  # however long a life takes on a slow disk
                    raise Broken(f"the trainer did nothing to be seen for {_SILENT_SECONDS:g} s")
            return False
        finally:
            life.kill()
            for event in life.last_events():
                self._hear(event, seen, ledger)

    def _count(self, seen: _Seen) -> None:
        self.tally.kills += 1
        self.tally.at_start += not seen.training
        self.tally.at_end += seen.exporting

    def _hear(self, event: dict[str, Any], seen: _Seen, ledger: Ledger | None) -> None:
        kind = event.get("event")
        if kind == wire.PHASE:
            seen.training = seen.training or event["name"] == "training"
            seen.exporting = seen.exporting or event["name"] == "exporting"
        elif kind == wire.CHECKPOINT:
            seen.commits += 1
            self.tally.acknowledged += 1
            self._commit_seconds = 0.9 * self._commit_seconds + 0.1 * event["seconds"]
            if ledger is not None:
                ledger.acknowledged.add(event["step"])
        elif kind == wire.NOTE and event.get("kind") in ("checkpoint_quarantine", "checkpoint_uncommitted"):
            seen.named.add(event["file"])
        elif kind == wire.EXACT and not event["now"] and self.tally.exact:
            self.tally.exact, self.tally.because = False, event["because"]
        elif kind == wire.EXCEPTION:
            seen.error = f"{event.get('type')}: {event.get('text')}"
            seen.refused = event.get("text") if event.get("type") == Refused.__name__ else None

    def _spoil(self, ledger: Ledger, found: oracle.Found) -> set[str]:
        """Damage the newest checkpoint, or the newest two; returns the names that the next life must give."""
        number = self._chance.choice((1, 1, 2))
        steps = sorted(found.manifests)
        if len(steps) <= number:
            return set()
        for step in steps[-number:]:
            damage.spoil(found.manifests[step], self._chance)
        self.tally.damaged += number
        ledger.spoiled(found, steps[-number:])
        return {found.manifests[step].with_suffix(".pt").name for step in steps[-number:]}

    def _notice(self, spoiled: set[str], seen: _Seen, killed: bool) -> None:
        missed = spoiled - seen.named
        if missed and (seen.training or not killed):
            raise Broken(f"{min(missed)} was damaged, and nobody noticed")
        self.tally.noticed += len(spoiled)
        spoiled.clear()

    def _must_have_finished(self, life: Life, seen: _Seen) -> None:
        if life.code == wire.EXIT_PERMANENT and seen.refused is not None:
            raise Refused(seen.refused)
        if life.code != wire.EXIT_FINISHED:
            raise Broken(f"the trainer ended by itself with {life.code}: {seen.error or 'see its log'}")

    def _compare(self, mine: Outcome, seed: int) -> None:
        try:
            mine.compare(self.undisturbed[seed])
        except Broken as broken:
            self._tell("again")
            try:
                self.live_undisturbed(f"undisturbed-{seed}-again", seed).compare(self.undisturbed[seed])
            except Broken:
                self.tally.differs_by_itself = True
                raise Broken(f"{broken}; two undisturbed runs differ as well: this device computes differently each time") from None
            raise


class _Moment:
    """When a life is to be killed."""

    def __init__(self, trial: Trial, aim: str | None, began: float, folder: Path) -> None:
        self._trial, self._aim, self._folder = trial, aim, folder
        self._chance = trial._chance
        self._at: float | None = None
        if aim == START:
            self._at = began + self._chance.uniform(0, trial._start_seconds)
        self._began = began
        self._commits = self._chance.randrange(trial._reach)
        self._exports = aim is not None and self._chance.random() < 0.5
        self._training = False

    def patience(self) -> float:
        """How long may be waited for events before the next look."""
        return _LOOK_SECONDS if self._training or self._at is not None else 0.002

    def has_come(self, seen: _Seen, now: float) -> bool:
        trial = self._trial
        if seen.training and not self._training:
            self._training = True
            trial._start_seconds = 0.8 * trial._start_seconds + 0.2 * (now - self._began)
            if self._aim == ANYWHERE:
                self._at = now + self._chance.uniform(0, trial._interval_seconds * trial._reach)
        if self._aim == COMMIT and self._at is None and self._training and seen.commits >= self._commits and _commits_now(self._folder):
            self._at = now + self._chance.uniform(0, trial._commit_seconds)
        if seen.exporting and self._exports:
            self._exports = False
            self._at = now + self._chance.uniform(0, trial._end_seconds)
        return self._at is not None and now >= self._at


def _commits_now(folder: Path) -> bool:
    """Whether a commit is going on: its temporary file is there."""
    try:
        return any(path.name.endswith(".tmp") for path in folder.iterdir())
    except FileNotFoundError:
        return False
