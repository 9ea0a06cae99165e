"""Where everything lies inside a home. Must not create, read or choose anything: it only names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STATUS_FILE = "training_status.json"


@dataclass(frozen=True)
class Home:
    """One folder that holds a person's trainings: status, logs, checkpoints, models, runs and requests."""

    root: Path

    @property
    def status(self) -> Path:
        return self.root / STATUS_FILE

    @property
    def supervisor_lock(self) -> Path:
        return self.root / "supervisor.lock"

    @property
    def trainer_lock(self) -> Path:
        return self.root / "trainer.lock"

    @property
    def control(self) -> Path:
        return self.root / "control"

    @property
    def logs(self) -> Path:
        return self.root / "training_logs"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def cache(self) -> Path:
        """Prepared data, keyed by content; safe to delete while nothing runs."""
        return self.root / "cache"

    @property
    def ballast(self) -> Path:
        """1 MB that is given up on a full disk, so that status and events can still be written."""
        return self.root / "control" / ".ballast"

    @property
    def optimal_config(self) -> Path:
        """A configuration for this machine and a task, as --config takes it. Written by the client."""
        return self.root / "optimal_config.json"

    @property
    def autostart(self) -> Path:
        """What the person wants at log-in. Written by the client."""
        return self.root / "autostart.json"

    def run(self, name: str) -> RunPaths:
        return RunPaths(self, name)


@dataclass(frozen=True)
class RunPaths:
    """Where one run's files lie."""

    home: Home
    name: str

    @property
    def folder(self) -> Path:
        return self.home.runs / self.name

    @property
    def record(self) -> Path:
        """run.json: what the run is, what is wanted of it, how it ended. Written by the supervisor."""
        return self.folder / "run.json"

    @property
    def config(self) -> Path:
        return self.folder / "config.yml"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: each step once. Written by the engine."""
        return self.folder / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """events.jsonl: restarts, pauses, saves, with cause. Written by the supervisor."""
        return self.folder / "events.jsonl"

    @property
    def committed(self) -> Path:
        """committed.json: this run has had a checkpoint. So that losing them all is told from a beginning. Written by the engine."""
        return self.folder / "committed.json"

    @property
    def task(self) -> Path:
        """The run's own copy of a user's task file; restarts use the copy."""
        return self.folder / "task"

    @property
    def trained_task(self) -> Path:
        """The copy the run was trained with, once the file was edited to mend its export()."""
        return self.folder / "trained_task"

    @property
    def checkpoints(self) -> Path:
        return self.home.checkpoints / self.name

    @property
    def model(self) -> Path:
        return self.home.models / self.name

    @property
    def result(self) -> Path:
        """models/<run>/result.json: the finished record; exit 0 without it is a crash. Written last, by the engine."""
        return self.model / "result.json"
