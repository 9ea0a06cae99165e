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
from trainerd.contract import clock, files, phases, wire
from trainerd.contract.errors import Refused, TrainerdError, UsageError
from trainerd.contract.paths import Home, RunPaths
from trainerd.engine import cleaning, compiling, finishing, gpu_use, guard, loop, optimizers, precision, preparing, provenance, receipt
from trainerd.engine import plan as plans
from trainerd.engine.building import build
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.determinism import arrange_cublas, deterministic
from trainerd.engine.export import weights_bytes
from trainerd.engine.locks import HomeLock
from trainerd.engine.loop import Link, Result, Training
from trainerd.engine.saver import note_to
from trainerd.engine.task import Task
from trainerd.machine.filesystem import free_bytes
from trainerd.memory import disk


class PrintingLink(Link):
    """What a library user sees: a line per evaluation and per warning."""

    def send(self, event: str, **fields: Any) -> None:
        if event == wire.PROGRESS and fields["eval"] != getattr(self, "_shown", {}):
            self._shown = dict(fields["eval"])
            values = ", ".join(f"{name} {'n/a' if value is None else format(value, '.4g')}" for name, value in self._shown.items())
            print(f"epoch {fields['epoch']}/{fields['epochs']}, step {fields['step']}/{fields['total_steps']}: {values}", flush=True)
        elif event == wire.WARNING:
            print(f"warning: {fields['text']}", flush=True)


class _Evicted(Link):
    """A library user's link, while the home is his: once it has become another training's, this one leaves without a trace."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.starts_again = link.starts_again
        self._leave: dict[str, Any] | None = None

    def evict(self) -> None:
        self._leave = {"do": wire.LEAVE, "why": "lock", "save": False}

    def send(self, event: str, **fields: Any) -> None:
        self._link.send(event, **fields)

    def give_up(self, error: TrainerdError | None) -> None:
        self._link.give_up(error)

    def command(self) -> dict[str, Any] | None:
        leave, self._leave = self._leave, None
        return leave or self._link.command()


class Trainer:
    """Trains one run in one home. train() resumes the run of that name when it is unfinished.

    `home`: a folder; by default TRAINERD_HOME, else the current folder. The process entry passes what only it knows: the
    run's name, its link to the supervisor, the recorded plan, the prepared cache_dir, the fingerprint of the data the run began
    with, the last step it acknowledged, the micro-batch it was ended with for want of RAM, and that it holds the trainer's lock.
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
        reached_step: int | None = None,
        too_large_micro_batch: int | None = None,
        holds_lock: bool = False,
        traces: bool = False,
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
        self._reached_step = reached_step
        self._too_large_micro_batch = too_large_micro_batch
        self._training: Training | None = None
        self._began_at = 0
        self._holds_lock = holds_lock
        self._home_lost = False
        self._traces = traces

    def train(self) -> Result:
        """Train to the end, or until asked to leave. Raises TrainerdError with what to do, or what the task raises."""
        with ExitStack() as stack:
            if not self._holds_lock:
                stack.enter_context(self._lock())
            self._refuse_links()
            store = CheckpointStore(
                self.paths.checkpoints,
                keep=self.config.checkpoint.keep,
                keep_best=self.config.checkpoint.keep_best or self.config.train.early_stopping is not None,
                mark=self.paths.committed,
                reached_step=self._reached_step,
                note=note_to(self._link.send),
            )
            cache_dir = self._cache_dir or self._prepare(store)
            found = store.load(self._before_step)
            state = found[0] if found else None
            begun = found is not None or _size(self.paths.metrics) > 0
            if begun and found is None:
                text = "No step of this run was ever saved, although some were trained: it begins again at its beginning."
                self._link.send(wire.WARNING, text=text)
            recorded = state["plan"] if state else self._plan
            others = {} if recorded and recorded["device"] == "cpu" else gpu_use.before_context()  # a GPU that is not used may sleep
            plan = dict(recorded or plans.resolve(self.config, self.task))
            plans.follow(plan, self.config)
            halved = plans.halve_after_kill(plan, self._too_large_micro_batch, self.task)
            self._tell_plan(plan)
            if plan["device"] != "cpu":
                arrange_cublas(plan["deterministic"])
            stack.enter_context(_threads(plan["threads"]))
            with guard.worded("build the model and its optimizer" + (" and load what the run had saved" if found is not None else "")):
                parts = (self.task, self.config, plan, self.paths, cache_dir, self._link, store, state, stack)
                # Code that was edited afterwards only writes the result: it is not run for an estimate.
                training = build(*parts, traces=self._traces and not self.paths.trained_task.is_dir(), begun=begun)
            self._refuse_other_code(training)
            self._vouch_for_data(training, cache_dir, state)
            self._vouch_for_code(training, state)
            if found is not None:
                training.saver.schedule.go_on(found[1].spent_bytes, clock.wall() - found[1].at)
            del found, state, parts  # as large as the model
            self._training, self._began_at = training, training.step
            training.memory.driver = gpu_use.of(plans.device_of(plan), others)
            self._make_room(training, store)
            if halved is not None:
                training.exact.lost(training.step + 1, halved)
                self._link.send(wire.NOTE, kind="halved", step=training.step + 1, micro_batch=plan["micro_batch"], text=halved)
            training.exact.tell()
            stack.enter_context(deterministic(plan["deterministic"], training.lost_by))
            stack.enter_context(cleaning.settled())
            stack.enter_context(training.memory.looked_after())
            result = loop.train(training)
            saving = training.saver.schedule.facts(time.monotonic())
            self._link.send(wire.NOTE, kind="saving", staged_bytes=training.states.staged_bytes, **saving)
            if self._home_lost:
                what = f"Another training has taken {self.home.root}; nothing more of this one was saved there."
                raise Refused(what, "Give each training a home of its own.")
            receipt.write(training.foreseen, training.plan, self.config, self.paths, training.step, training.memory, self._link.send)
            return finishing.finish(training, result, self.paths) if result.outcome == loop.FINISHED else result

    @property
    def has_stepped(self) -> bool:
        """Whether train() has finished a step of its own: then what fails later may go better from a checkpoint."""
        return self._training is not None and self._training.step > self._began_at

    @property
    def in_first_evaluation(self) -> bool:
        """Whether train() is at an evaluation and none of this run was ever whole: what fails there fails again from any checkpoint."""
        t = self._training
        return t is not None and t.pulse.phase == phases.EVALUATING and t.evaluation.last_step == 0

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """The home's lock for a library user. Raises Refused when another training has it."""
        given = self._link
        self._link = mine = _Evicted(given)

        def taken() -> None:
            self._home_lost = True
            mine.evict()
            if self._training is not None:
                self._training.metrics.abandon()

        with HomeLock(self.home, lambda text: mine.send(wire.WARNING, text=text), taken):
            try:
                yield
            finally:
                self._link = given

    def _refuse_links(self) -> None:
        """Nothing is written out of the home through a link that somebody has put into it."""
        result = sorted(self.paths.model.rglob("*")) if self.paths.model.is_dir() else []
        for path in (self.paths.checkpoints, self.paths.metrics, self.paths.committed, self.paths.model, *result):
            files.refuse_links(self.home.root, path)

    def _tell_plan(self, plan: plans.Plan) -> None:
        self._link.send(wire.PLAN, **plans.shown(plan))
        slow = precision.slow_here(plan["precision"], plans.device_of(plan))
        for text in (slow, optimizers.warning(self.config.train), compiling.warning(plan.get("compile", False))):
            if text:
                self._link.send(wire.WARNING, text=text)

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

    def _make_room(self, training: Training, store: CheckpointStore) -> None:
        """Keep fewer checkpoints when not all would fit. Raises Refused for a run that has not begun and cannot be saved."""
        free, there = free_bytes(store.folder), len(store.committed())
        if free is None:
            return
        one = training.states.size_bytes()
        metrics = disk.metrics_bytes(training.total_steps - training.step)
        found = disk.room(free, one, weights_bytes(training.model) + metrics, store.keep, store.keep_best, there=there)
        if found.missing_bytes and training.step == 0:
            message, hint = disk.too_little(str(self.home.root), found, one, metrics)
            raise Refused(message, hint)
        if (found.keep, found.keep_best) == (store.keep, store.keep_best):
            return
        best = store.keep_best and self.config.train.early_stopping is not None  # its result is the best one
        store.keep, store.keep_best = found.keep, found.keep_best or best
        kept = f"the last {store.keep}" + (" and the best" if store.keep_best else "")
        text = f"The disk has no room for all checkpoints that were asked for ({found.need_bytes:,} bytes): {kept} will be kept."
        self._link.send(wire.WARNING, text=text)
        self._link.send(wire.NOTE, kind="keep_lowered", keep=store.keep, keep_best=store.keep_best, free_bytes=free, checkpoint_bytes=one)

    def _refuse_other_code(self, training: Training) -> None:
        """A task file that was edited to mend its export() may write the result, and train no step. Raises UsageError."""
        if training.step < training.total_steps and not training.evaluation.should_stop and self.paths.trained_task.is_dir():
            text = f"The task file was edited after step {training.step:,}, and there are steps left: they would be trained by other code."
            raise UsageError(text, f"`start` with the file as it is in {self.paths.trained_task}; edit it again when all is trained.")

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


    def _vouch_for_code(self, training: Training, state: dict[str, Any] | None) -> None:
        """Every checkpoint names the code that trained it. A module that was edited since is no reason not to go on: nobody can tell a
        comment from another model, and there is no copy of it to go on with."""
        only_writes = self.paths.trained_task.is_dir()  # by code that was edited, and trains no step
        recorded = None if state is None or only_writes else state["about"].get("code")
        training.with_code(training.code.unlike(recorded), f"since step {training.step:,} was saved")


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """torch's thread count for the time of the training: another number gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
