"""Trainer: builds a training from a task and a configuration, brings it back to where it was, runs it, writes the result.

For a library user it is the whole interface: Trainer(MyTask(), RunConfig()).train(). Must not know the supervisor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from trainerd.config.model import RunConfig
from trainerd.contract import wire
from trainerd.contract.errors import Refused
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home, RunPaths
from trainerd.engine import loop, precision, preparing, provenance
from trainerd.engine import plan as plans
from trainerd.engine.building import build
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.determinism import arrange_cublas, deterministic
from trainerd.engine.export import export
from trainerd.engine.loop import Link, Result, Training
from trainerd.engine.saver import note_to
from trainerd.engine.task import Task


class PrintingLink(Link):
    """What a library user sees: a line per evaluation and per warning."""

    def send(self, event: str, **fields: Any) -> None:
        if event == wire.PROGRESS and fields["eval"] != getattr(self, "_shown", {}):
            self._shown = dict(fields["eval"])
            values = ", ".join(f"{name} {'n/a' if value is None else format(value, '.4g')}" for name, value in self._shown.items())
            print(f"epoch {fields['epoch']}/{fields['epochs']}, step {fields['step']}/{fields['total_steps']}: {values}", flush=True)
        elif event == wire.WARNING:
            print(f"warning: {fields['text']}", flush=True)


class Trainer:
    """Trains one run in one home. train() resumes the run of that name when it is unfinished.

    `home`: a folder; by default TRAINERD_HOME, else the current folder. The process entry passes what only it knows: the
    run's name, its link to the supervisor, the recorded plan, the prepared cache_dir, the fingerprint of the data the run began
    with, and that it holds the trainer's lock.
    """

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        *,
        home: Path | str | None = None,
        run: str | None = None,
        link: Link | None = None,
        plan: dict[str, Any] | None = None,
        before_step: int | None = None,
        cache_dir: Path | None = None,
        data: provenance.Fingerprint | None = None,
        holds_lock: bool = False,
    ) -> None:
        self.task = task
        self.config = config
        self.home = Home(Path(home or os.environ.get("TRAINERD_HOME") or Path.cwd()).absolute())
        name = run or config.name or f"{type(task).__name__.lower()}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.paths: RunPaths = self.home.run(name)
        self._link = link or PrintingLink()
        self._plan = plan
        self._before_step = before_step
        self._cache_dir = cache_dir
        self._data = data
        self._holds_lock = holds_lock

    def train(self) -> Result:
        """Train to the end, or until asked to leave. Raises TrainerdError with what to do, or what the task raises."""
        with ExitStack() as stack:
            if not self._holds_lock:
                stack.enter_context(self._lock())
            store = CheckpointStore(
                self.paths.checkpoints,
                keep=self.config.checkpoint.keep,
                keep_best=self.config.checkpoint.keep_best or self.config.train.early_stopping is not None,
                note=note_to(self._link.send),
            )
            cache_dir = self._cache_dir or self._prepare(store)
            found = store.load(self._before_step)
            state = found[0] if found else None
            plan = dict(state["plan"] if state else self._plan or plans.resolve(self.config, self.task))
            self._tell_plan(plan)
            if plan["device"] != "cpu":
                arrange_cublas(plan["deterministic"])
            stack.enter_context(_threads(plan["threads"]))
            training = build(self.task, self.config, plan, self.paths, cache_dir, self._link, store, state, stack)
            self._vouch_for_data(training, cache_dir, state)
            del found, state  # as large as the model
            training.exact.tell()
            stack.enter_context(deterministic(plan["deterministic"], training.lost_by))
            result = loop.train(training)
            if result.outcome == loop.FINISHED:
                self._export(training, result)
            return result

    def _tell_plan(self, plan: plans.Plan) -> None:
        self._link.send(wire.PLAN, **plans.shown(plan))
        slow = precision.slow_here(plan["precision"], plans.device_of(plan))
        if slow:
            self._link.send(wire.WARNING, text=slow)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = FileLock(self.home.trainer_lock)
        if not lock.acquire():
            raise Refused(f"Another training holds {self.home.root}.", "Wait for it, stop it, or give this one a home of its own.")
        try:
            yield
        finally:
            lock.release()

    def _prepare(self, store: CheckpointStore) -> Path:
        """The prepared data, for a library user: of the data that the newest checkpoint was trained on, if there is one."""
        committed = store.committed()
        self._data = committed[-1].about.get("data") if committed else None
        if self._data is None:
            self._data = provenance.fingerprint(self.task, self.config)
        cache_dir = preparing.cache_folder(self.home, self.task, self.config, self._data)
        if preparing.has_prepare(self.task) and preparing.verified(cache_dir, self._link.send) is None:
            preparing.prepare_here(self.task, self.config, cache_dir, self._link.send, self._data)
        else:
            preparing.look_at_data(self.task, self.config, self._data, self._link.send)
        return cache_dir

    def _vouch_for_data(self, training: Training, cache_dir: Path, state: dict[str, Any] | None) -> None:
        """Every checkpoint names the data it was trained on. What was opened meanwhile must still be that."""
        if self.task.reads_data and self._data:
            provenance.check(self.task, self.config, self._data)
        training.about["data"] = dict(self._data or {})
        if preparing.has_prepare(self.task):
            prepared = training.about["prepared_sha256"] = preparing.digest_of(cache_dir)
            before = state["about"].get("prepared_sha256", prepared) if state else prepared
            if before != prepared:
                training.exact.lost(training.step + 1, "the data was prepared anew, and came out differently")

    def _export(self, training: Training, result: Result) -> None:
        """The result's files. With early stopping, the weights of the best evaluation; without, the last."""
        self._link.send(wire.PHASE, name="exporting", done=None, total=None, unit=None)
        step = training.step
        best_step = int(training.evaluation.best.get("step", step))
        if self.config.train.early_stopping is not None and best_step != step:
            state = training.store.read_step(best_step)
            if state is None:
                text = f"The checkpoint of the best evaluation (step {best_step}) is not there: the last weights are exported."
                self._link.send(wire.WARNING, text=text)
            else:
                training.states.restore_weights(state)
                step = best_step
        facts = {**result.metrics, "exported_step": step, "exact": training.exact.document()}
        export(self.task, training.model, self.config, self.paths, frozen=training.states.frozen, facts=facts)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """torch's thread count for the time of the training: another number gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
