"""Keeps the home whole under a living supervisor: what somebody deletes by hand is noticed, said, and made again.

Must not touch the trainer or decide about the run. What only the trainer has (metrics, checkpoints) it makes again itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainerd.contract import files
from trainerd.contract.errors import AlreadyRunning, Unreadable
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import RunPaths
from trainerd.supervisor import journal, logs

if TYPE_CHECKING:
    from trainerd.supervisor.loop import Supervisor


class Upkeep:
    """Looks after one run's place in the home. `lock` is the supervisor's own; None in tests that run without one."""

    def __init__(self, paths: RunPaths, lock: FileLock | None) -> None:
        self._paths = paths
        self._lock = lock
        self._kept = _written_once(paths)

    def look(self, supervisor: Supervisor) -> None:
        """Once a tick: three calls of stat when all is well. Raises AlreadyRunning when another supervisor has taken the home."""
        if self._lock is not None and self._lock.displaced():
            self._take_lock_again(supervisor, self._lock)
        if supervisor.trainer is not None:
            self._keep_log_small(supervisor.trainer.log_path)
        if not self._paths.record.exists():
            self._make_run_again(supervisor)

    def _keep_log_small(self, log: Path) -> None:
        try:
            logs.cut(log)
        except FileNotFoundError:
            pass  # removed by hand: the next trainer has a new one
        except OSError as error:
            journal.say(f"cannot cut {log}: {error}")

    def _take_lock_again(self, supervisor: Supervisor, lock: FileLock) -> None:
        try:
            again = lock.retake()
        except (OSError, Unreadable) as error:
            # Trained on, for a person's folder is no reason to lose a training; readers see a crash until it is mended.
            supervisor.report.warn(f"The lock {lock.path.name} was removed and cannot be made again: {error}")
            return
        if not again:
            raise AlreadyRunning(
                f"{lock.path} was removed, and another supervisor has taken the home: this one ends and leaves it everything.",
                "Nothing is lost: the trainer saves and leaves, the other one goes on.",
            )
        supervisor.report.warn(f"{lock.path.name} was removed while the training runs; it was made again. Leave it where it is.")
        supervisor.journal.note("lock made again", file=lock.path.name)

    def _make_run_again(self, supervisor: Supervisor) -> None:
        folder = self._paths.folder
        shown = f"runs/{folder.name}"
        whole = folder.is_dir()
        try:
            for name, content in self._kept.items():
                path = folder / name
                if not path.exists():
                    files.make_folder(path.parent)
                    files.write_atomic(path, content, durable=True)
        except OSError as error:
            supervisor.report.warn(f"{shown} was removed while the training runs, and cannot be made again: {error.strerror or error}.")
            return
        supervisor.journal.save_record()
        what = f"{shown}/run.json" if whole else shown
        supervisor.journal.note("run made again", what=what)
        lost = "" if whole else " The events up to now are lost."
        supervisor.report.warn(f"{what} was removed while the training runs; it was made again.{lost}")


def _written_once(paths: RunPaths) -> dict[str, bytes]:
    """The run's files that nobody writes again, by their place in it, for the day somebody removes them; a few kilobytes."""
    found: dict[str, bytes] = {}
    for path in (paths.config, *sorted(paths.task.glob("*.py"))):
        try:
            found[path.relative_to(paths.folder).as_posix()] = path.read_bytes()
        except OSError as error:
            journal.say(f"cannot read {path}: {error}")
    return found
