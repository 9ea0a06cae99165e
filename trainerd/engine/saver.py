"""Saves checkpoints beside the training, and says when a save is worth its cost. Must not touch the model: it gets a copy.

One thread, one save in flight. A save that fails is told (since when progress is unsaved, how many bytes are missing), the
training goes on, and the next save that succeeds clears it.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainerd.config.model import CheckpointConfig, parse_bytes
from trainerd.contract import clock, wire
from trainerd.contract.errors import TrainerdError
from trainerd.engine.checkpoints import CheckpointStore, State, size_of
from trainerd.engine.manifest import Manifest

Send = Callable[..., None]
_LONG_SECONDS, _WORTH_SECONDS = 30.0, 10.0
_COST_SHARE = 0.01
_DAY_SECONDS = 86_400.0
# What may be written at once although the day's rate does not cover it yet: a restarted run must be able to save early.
_WRITE_AHEAD_SECONDS = 600.0
_FIRST_RETRY_SECONDS = 10.0
_END_SECONDS = 10.0
_DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class SaveSchedule:
    """Whether to save at a step: densest at the marks of every_steps, spaced out by what saving has been measured to cost.

    Cost is (seconds the training thread was blocked + CPU seconds of the saver / cores); all times are monotonic.
    """

    def __init__(self, config: CheckpointConfig, now: float | None = None, cores: int | None = None) -> None:
        self._config = config
        self._began = self._last_save = self._last_commit = self._spent_at = time.monotonic() if now is None else now
        self._bytes_per_second = parse_bytes(config.max_write_per_day) / _DAY_SECONDS
        self._cores = cores or os.cpu_count() or 1
        self._cost_seconds = self._next_cost_seconds = 0.0
        self._blocked_seconds = self._cpu_seconds = 0.0
        self._num_saves = 0
        self._spent_bytes = 0.0
        self._next_bytes = 0
        self._retry_at: float | None = None
        self._retry_pause = _FIRST_RETRY_SECONDS

    def go_on(self, spent_bytes: float, seconds_ago: float) -> None:
        """What was written before this process, and when: a run that dies again and again must not write more than one that lives."""
        self._last_commit = self._spent_at - max(0.0, seconds_ago)
        self._spent_bytes = max(0.0, spent_bytes - self._bytes_per_second * max(0.0, seconds_ago))

    def spent_bytes(self, now: float) -> float:
        """What has been written beyond what the day's rate has covered by now."""
        return max(0.0, self._spent_bytes - self._bytes_per_second * (now - self._spent_at))

    def due(self, step: int, now: float) -> bool:
        """Whether to save after this step. Called at every step."""
        if self._retry_at is not None:
            return now >= self._retry_at
        at_mark = step % self._config.every_steps == 0
        if at_mark and self._config.exact:
            return True
        if now - self._last_save >= self._config.every_minutes * 60:
            return True
        return at_mark and self._affordable(now)

    def worth_before(self, seconds: float | None, now: float) -> bool:
        """Whether to save before something that takes so long (None: not known) and is no step: a kill in it would take with it what
        was done since the last save."""
        is_long = seconds is None or seconds >= _LONG_SECONDS
        return is_long and now - self._last_save >= _WORTH_SECONDS and self._retry_at is None and self._affordable(now)

    def _affordable(self, now: float) -> bool:
        if self._cost_seconds + self._next_cost_seconds > _COST_SHARE * (now - self._began):
            return False
        # Lives shorter than every_minutes would save nothing at all for their bytes: the time before this one counts.
        if now - self._last_commit >= self._config.every_minutes * 60:
            return True
        return self.spent_bytes(now) + self._next_bytes <= max(self._bytes_per_second * _WRITE_AHEAD_SECONDS, self._next_bytes)

    def began(self, now: float) -> None:
        """A save begins: the next is spaced from here."""
        self._last_save = now

    def saved(self, size_bytes: int, blocked_seconds: float, cpu_seconds: float, now: float) -> None:
        """A save succeeded; its cost is expected of the next one too."""
        self._next_cost_seconds = blocked_seconds + cpu_seconds / self._cores
        self._cost_seconds += self._next_cost_seconds
        self._blocked_seconds += blocked_seconds
        self._cpu_seconds += cpu_seconds
        self._num_saves += 1
        self._next_bytes = size_bytes
        self._spent_bytes, self._spent_at = self.spent_bytes(now) + size_bytes, now
        self._last_commit = now
        self._retry_at, self._retry_pause = None, _FIRST_RETRY_SECONDS

    def failed(self, now: float, blocked_seconds: float) -> None:
        """A save failed; the next attempt waits, longer each time, but never longer than every_minutes."""
        self.waited(blocked_seconds)
        longest = self._config.every_minutes * 60
        self._retry_at = now + min(self._retry_pause, longest)
        self._retry_pause = min(self._retry_pause * 2, longest)

    def waited(self, seconds: float) -> None:
        """The training thread stood still that long for a save that was under way, or for one that failed."""
        self._cost_seconds += seconds
        self._blocked_seconds += seconds

    @property
    def cost_seconds(self) -> float:
        """What saving has cost this process so far."""
        return self._cost_seconds

    def facts(self, now: float) -> dict[str, float]:
        """What saving has cost this process, and of what time."""
        return {
            "saves": self._num_saves,
            "blocked_seconds": round(self._blocked_seconds, 6),
            "cpu_seconds": round(self._cpu_seconds, 6),
            "cores": self._cores,
            "cost_seconds": round(self._cost_seconds, 6),
            "of_seconds": round(now - self._began, 3),
            "checkpoint_bytes": self._next_bytes,
        }


@dataclass
class _Save:
    state: State
    facts: dict[str, Any]
    request: str | None
    blocked_seconds: float
    captured_at: float


class Saver:
    """The saving thread. submit() hands it a state it may keep until `busy` is False again."""

    def __init__(
        self, store: CheckpointStore, schedule: SaveSchedule, send: Send, home: Path | None = None, limit_seconds: float | None = None
    ) -> None:
        """`send(event, **fields)` gets CHECKPOINT and UNSAVED events; paths in them are relative to `home`. `limit_seconds`: nobody else
        ends a training whose disk answers no more; so long a save is waited for."""
        self.schedule = schedule
        self.last: Manifest | None = None
        self.failure: str | None = None
        """Why the last save failed, in words; None when it did not."""
        self.error: Exception | None = None
        """The same as it was raised."""
        self._store = store
        self._limit_seconds = limit_seconds
        self._stuck: TrainerdError | None = None
        self._send = send
        self._home = home
        self._saved_until = clock.wall()
        self._condition = threading.Condition()
        self._next: _Save | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._next is not None

    def submit(
        self,
        state: State,
        *,
        epoch: int,
        step: int,
        best: float | None,
        metrics: Path | None,
        metrics_bytes: int,
        metrics_sha256: str | None = None,
        about: dict[str, Any],
        request: str | None = None,
        blocked_seconds: float = 0.0,
    ) -> None:
        """Save `state`, a copy nobody changes while busy. Waits for a running save first.

        `blocked_seconds` is what taking the copy cost the training thread; `request` is named in the CHECKPOINT event.
        """
        waited = time.monotonic()
        self.wait()
        facts: dict[str, Any] = {"epoch": epoch, "step": step, "best": best, "about": about}
        facts |= {"metrics": metrics, "metrics_bytes": metrics_bytes, "metrics_sha256": metrics_sha256}
        now = time.monotonic()
        self.schedule.began(now)
        with self._condition:
            self._next = _Save(state, facts, request, blocked_seconds + now - waited, clock.wall())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def not_copied(self, step: int, why: str, request: str | None) -> None:
        """There was no memory for the copy that would have been saved. It is tried again as after a disk that was full."""
        self.failure = f"The checkpoint at step {step} could not be copied: {why}."
        self._send(wire.UNSAVED, since=self._saved_until, missing_bytes=None, error=self.failure, request=request)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Wait until nothing is being saved; False when the time was up first. Without one, raises TrainerdError after the limit."""
        if self._next is None:
            return True
        limit_seconds = self._limit_seconds if timeout_seconds is None else timeout_seconds
        with self._condition:
            if (self._stuck is None or timeout_seconds is not None) and self._condition.wait_for(lambda: self._next is None, limit_seconds):
                return True
        if timeout_seconds is not None:
            return False
        if self._stuck is None:  # nobody waits for it a second time
            said = f"A checkpoint in {self._store.folder} is not finished after {limit_seconds:.0f} s: the disk answers no more."
            hint = "Look at the disk; the checkpoint before it counts. How long is waited: faults.hang_limits.checkpointing."
            self._stuck = TrainerdError(said, hint)
        raise self._stuck

    def close(self) -> None:
        """Finish the running save and end the thread. Raises TrainerdError after the limit; the thread keeps no process alive."""
        self.wait()
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._next is not None or self._closing)
                save = self._next
            if save is None:
                return
            self._save(save)
            with self._condition:
                self._next = None
                self._condition.notify_all()

    def _save(self, save: _Save) -> None:
        cpu_began = time.thread_time()
        try:
            spent = self.schedule.spent_bytes(time.monotonic())
            manifest = self._store.commit(
                save.state, **save.facts, spent_bytes=spent, acknowledge=lambda done: self._acknowledge(done, save)
            )
        except Exception as error:  # whatever it is: training goes on, and the person is told
            self.schedule.failed(time.monotonic(), save.blocked_seconds)
            self._tell_unsaved(error, save)
        else:
            self.schedule.saved(manifest.bytes, save.blocked_seconds, time.thread_time() - cpu_began, time.monotonic())

    def _acknowledge(self, manifest: Manifest, save: _Save) -> None:
        self.last = manifest
        self._saved_until = save.captured_at
        if self.failure is not None:
            self.failure = self.error = None
            self._send(wire.UNSAVED, since=None, missing_bytes=None, error=None)
        self._send(
            wire.CHECKPOINT,
            path=_shown(manifest.path, self._home),
            epoch=manifest.epoch,
            step=manifest.step,
            at=manifest.at,
            bytes=manifest.bytes,
            seconds=manifest.seconds,
            request=save.request,
        )

    def _tell_unsaved(self, error: Exception, save: _Save) -> None:
        missing_bytes = None
        if isinstance(error, OSError):
            text = f"{error.strerror or error}"
            if error.errno in _DISK_FULL:
                missing_bytes = _missing_bytes(save.state, self._store.folder)
        else:
            text = f"{type(error).__name__}: {error}"
            traceback.print_exception(error)
        self.error = error
        self.failure = f"The checkpoint at step {save.facts['step']} could not be saved: {text}."
        self._send(wire.UNSAVED, since=self._saved_until, missing_bytes=missing_bytes, error=self.failure, request=save.request)


def _missing_bytes(state: State, folder: Path) -> int | None:
    """How much more space the state needs than there is; at least 1, for a disk that is full by quota."""
    try:
        return max(1, size_of(state) - shutil.disk_usage(folder).free)
    except OSError:
        return None


def _shown(path: Path, home: Path | None) -> str:
    if home is not None and path.is_relative_to(home):
        return path.relative_to(home).as_posix()
    return str(path)


def note_to(send: Send) -> Callable[..., None]:
    """The `note` of a CheckpointStore that sends events, and a warning to the person for what was set aside."""

    def note(kind: str, **facts: Any) -> None:
        send(wire.NOTE, kind=f"checkpoint_{kind}", **facts)
        if kind == "quarantine":
            send(wire.WARNING, text=f"The checkpoint {facts['file']} was set aside: {facts['why']}. The one before it is used.")

    return note
