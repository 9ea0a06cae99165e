"""The training loop: step, log, evaluate, save, stop? Must not know processes, pipes or files: it has a Link and parts that do.

train() is flat on purpose: to know what happens in a training, read it from top to bottom.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from trainerd.config.model import RunConfig
from trainerd.contract import phases, wire
from trainerd.contract.errors import TrainerdError
from trainerd.engine import cleaning, edited, guard, pressure, relief, schedules
from trainerd.engine import plan as plans
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.determinism import Exactness
from trainerd.engine.edited import Code
from trainerd.engine.evaluation import Evaluation
from trainerd.engine.finite import FiniteWatch
from trainerd.engine.fitting import Forecast
from trainerd.engine.guard import MemoryWatch
from trainerd.engine.metrics import MetricsLog, Rate, StepRecord
from trainerd.engine.pulse import Pulse
from trainerd.engine.saver import Saver
from trainerd.engine.spill import SpillWatch
from trainerd.engine.state import States
from trainerd.engine.step import Stepper
from trainerd.engine.task import Task

_REPORT_SECONDS = 0.25
FINISHED, LEFT, MADE_ROOM = "finished", "left", "made room"
T = TypeVar("T")


class Link:
    """The loop's only door to the outside; this one leads nowhere."""

    starts_again = False
    """Whether somebody outside starts a training again that has left by itself."""

    def send(self, event: str, **fields: Any) -> None:
        """Tell the outside; must neither block nor raise."""

    def give_up(self, error: TrainerdError | None) -> None:
        """Of a thread that cannot raise it where the work is: end the process, where that is ours to end. None: it leaves to make room."""

    def command(self) -> dict[str, Any] | None:
        """The next pending command, or None. Asked at every micro-batch: it must cost next to nothing."""
        return None


@dataclass
class Result:
    """How a training ended: "finished", "left" as asked, or "made room": left because others need the memory."""

    outcome: str
    step: int
    metrics: dict[str, Any]


class Asked:
    """What the outside has asked for and not been given yet."""

    def __init__(self, link: Link, pulse: Pulse) -> None:
        self._command = link.command
        self._pulse = pulse
        self.saves: list[str | None] = []
        self.leave: dict[str, Any] | None = None

    @property
    def outcome(self) -> str:
        """How the training has ended, when it ends now."""
        if self.leave is None:
            return FINISHED
        return MADE_ROOM if self.leave.get("why") == wire.NO_ROOM else LEFT

    @property
    def leaves_unsaved(self) -> bool:
        return self.leave is not None and not self.leave.get("save", True)

    def to_leave(self) -> bool:
        """Take in the pending commands; whether one of them was to leave. Whoever asks is alive: the pulse beats."""
        self._pulse.beat()
        while (command := self._command()) is not None:
            if command.get("do") == wire.SAVE:
                self.saves.append(command.get("id"))
            elif command.get("do") == wire.LEAVE and (self.outcome != LEFT or not command.get("save", True)):
                self.leave = command
        return self.leave is not None


@dataclass
class Training:
    """Everything a training consists of, and where it is. Built by trainer.py."""

    task: Task
    model: nn.Module
    config: RunConfig
    plan: plans.Plan
    link: Link
    pulse: Pulse
    asked: Asked
    stepper: Stepper
    evaluation: Evaluation
    states: States
    saver: Saver
    store: CheckpointStore
    metrics: MetricsLog
    finite: FiniteWatch
    exact: Exactness
    memory: MemoryWatch
    spill: SpillWatch | None
    """Only on a GPU."""
    steps_per_epoch: int
    total_steps: int
    about: dict[str, Any]
    foreseen: Forecast
    """What the memory estimate knows: for the receipt."""
    code: Code
    """What of a person's own the task imports."""
    step: int = 0
    """Steps done."""
    samples: int = 0
    saved: tuple[int, int] = (-1, -1)
    """The step of the newest saved state, and the last evaluation it knows."""
    rate: Rate = field(default_factory=Rate)
    next_report: float = 0.0

    @property
    def epoch(self) -> int:
        """The epoch that the last step belongs to, from 1."""
        return max(0, self.step - 1) // self.steps_per_epoch + 1

    def lr(self) -> float:
        """For the step about to be done."""
        train = self.config.train
        return train.lr * schedules.factor(train.scheduler, self.step, self.total_steps, train.warmup_steps)

    def facts(self) -> dict[str, Any]:
        """The part of the state that is neither weights nor random: plain values."""
        return {
            "step": self.step,
            "epoch": self.step // self.steps_per_epoch,
            "cursor": self.step % self.steps_per_epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "samples": self.samples,
            "metrics_bytes": self.metrics.bytes,
            "metrics_sha256": self.metrics.sha256,
            "evaluation": self.evaluation.document(),
            "exact": self.exact.document(),
            "plan": dict(self.plan),
            "about": dict(self.about),
            "oom_recoveries": self.memory.oom_recoveries,
            "speed": None if self.spill is None else self.spill.kept(self.about["device"], self.plan),
        }

    def leaving(self) -> bool:
        """Between micro-batches: whether to leave, because somebody asked, or because others need the memory."""
        wanted = self.memory.look(time.monotonic(), self.step)
        if wanted.what == pressure.LEAVE and self.asked.leave is None:
            relief.make_room(self, wanted)
        return self.asked.to_leave()

    def shrunk(self, micro_batch: int, error: str) -> None:
        """A step ran out of memory and is tried again: the plan changes, aloud. The step itself has lost nothing."""
        if micro_batch == self.plan["micro_batch"]:
            self._told("out of memory; the step is tried again as it is", error)
            return
        plans.set_micro_batch(self.plan, micro_batch)
        self._recovered(self.step + 1, f"out of memory; the micro-batch is now {micro_batch}", error)
        self.link.send(wire.PLAN, **plans.shown(self.plan))

    def evaluated_smaller(self, size: int | None, error: str, what: str) -> None:
        """An evaluation ran out of memory and is tried again, or a part of it."""
        if size is None:
            self._told("out of memory in an evaluation; it is tried again as it is", error)
            return
        self._recovered(self.step, f"out of memory in an evaluation; {what} is now {size}", error)

    def with_room(self, what: str, work: Callable[[], T]) -> T:
        """Something beside the steps, tried once more when it runs out of memory: it changes no bit of the training."""
        return guard.with_room(work, lambda error: self._told(f"out of memory {what}; tried again", error))

    def with_code(self, changed: list[str], since: str) -> None:
        """Every checkpoint names the code that is loaded. What has `changed` is told; with it the run is not exact any more."""
        self.about["code"] = dict(self.code.files)
        if changed:
            what = f"{edited.in_words(changed)}: code that the task imports, changed {since}"
            self.exact.lost(self.step + 1, what)
            self.link.send(wire.NOTE, kind="code_changed", step=self.step, files=changed)
            self.link.send(wire.WARNING, text=f"{what}. {edited.WHAT_NOW}")

    def lost_by(self, operation: str) -> None:
        """torch has met an operation that it has no deterministic kernel for."""
        self.exact.lost(self.step + 1, f"{operation} has no deterministic kernel")

    def _recovered(self, step: int, because: str, error: str) -> None:
        self.exact.lost(step, because)
        self._told(because, error, step)

    def _told(self, because: str, error: str, step: int | None = None) -> None:
        """One event for each recovery."""
        self.pulse.beat()
        self.memory.oom_recoveries += 1
        self.link.send(wire.NOTE, kind="out_of_memory", step=self.step if step is None else step, text=because, error=error)
        self.memory.tell()


def train(training: Training) -> Result:
    """Train from where the training stands to its end, or until asked to leave. The state is saved in both cases."""
    t, asked, checkpoint = training, training.asked, training.config.checkpoint
    _phase(t, phases.TRAINING)
    report(t)
    relief.inform(t)
    t.memory.look(time.monotonic(), t.step)
    if evaluate(t):  # due already when the training was left in the middle of it
        save(t)

    while t.step < t.total_steps and not t.evaluation.should_stop:
        # 1. Step: all samples of one effective batch, whatever the micro-batch.
        if asked.to_leave():
            break
        lr = t.lr()
        taken = relief.take(t, lr)
        if taken is None:
            break
        t.step += 1

        # 2. Log: nothing is read from the device here; a few times a second it is, for all steps since.
        t.samples += taken.num_samples
        t.rate.samples += taken.num_samples
        t.rate.tokens += taken.num_tokens
        t.metrics.add(StepRecord(t.step, taken.epoch + 1, taken.loss, lr, taken.grad_norm, taken.num_samples, taken.metrics))
        now = time.monotonic()
        if now >= t.next_report:
            report(t)
        relief.make_room(t, t.memory.look(now, t.step))
        if t.spill is not None:
            t.spill.step(now, taken.num_tokens or taken.num_samples)

        # 3. Evaluate, when due.
        best = evaluate(t)

        # 4. Save: when asked, when best, when the schedule says it is worth its cost.
        due = t.saver.schedule.due(t.step, now) and (checkpoint.exact or not t.saver.busy)
        if asked.saves or best or due:
            save(t)

    # 5. Stop: asked to, or done.
    report(t)
    if not asked.leaves_unsaved:
        _phase(t, phases.CHECKPOINTING)
        save(t)
        _until_saved(t)
    return Result(asked.outcome, t.step, summary(t))


def evaluate(t: Training) -> bool:
    """Evaluate if it is due; whether it was better than ever and that is worth a checkpoint.

    Being asked to leave breaks it off without a trace.
    """
    if not t.evaluation.due(t.step, t.steps_per_epoch, t.total_steps):
        return False
    began = time.monotonic()
    if t.saved[0] != t.step and not t.saver.busy and t.saver.schedule.worth_before(t.evaluation.seconds, began):
        save(t)  # the first one may take long: nobody knows yet
    _phase(t, phases.EVALUATING)
    began = time.monotonic()
    flush(t)
    better = t.evaluation.run(t.step, t.epoch - 1, t.leaving, t.evaluated_smaller)
    if better is None:
        return False
    t.metrics.add_evaluation(t.step, t.evaluation.values)
    t.evaluation.seconds = time.monotonic() - began
    t.rate.idle(t.evaluation.seconds)
    _phase(t, phases.TRAINING)
    report(t)
    return better and (t.config.checkpoint.keep_best or t.config.train.early_stopping is not None)


def save(t: Training) -> None:
    """Take the state and hand it to the saving thread, once for everybody who asked."""
    if t.spill is not None:
        t.spill.pause()
    _until_saved(t)  # it reads the buffers that the next state is copied into
    position = (t.step, t.evaluation.last_step)
    if t.saved == position and t.saver.failure is None and not t.asked.saves:
        return
    began = time.perf_counter()
    flush(t)
    t.with_room("while looking at the weights", lambda: t.finite.look_at_weights(t.step, t.epoch))
    # Left in the middle of an evaluation, this step was saved without it; a committed name is never written again.
    again = t.saved[0] == t.step and t.saved != position
    state = _captured(t)
    blocked_seconds = time.perf_counter() - began
    if state is None:
        t.saver.schedule.failed(time.monotonic(), blocked_seconds)
        return
    for request in t.asked.saves or [None]:
        _until_saved(t)
        t.pulse.num_saves += 1
        t.saver.submit(
            state,
            epoch=t.epoch + again,
            step=t.step,
            best=t.evaluation.best_value,
            metrics=t.metrics.path,
            metrics_bytes=t.metrics.bytes,
            metrics_sha256=t.metrics.sha256,
            about=t.about,
            request=request,
            blocked_seconds=blocked_seconds,
        )
        blocked_seconds = 0.0
    t.asked.saves.clear()
    t.saved = position


def _captured(t: Training) -> dict[str, Any] | None:
    """The state, copied; None when even a second time there was no memory for the copy: told, and the training goes on."""
    try:
        return t.with_room("while copying a checkpoint", lambda: t.states.capture(t.facts()))
    except (MemoryError, RuntimeError) as error:
        if not guard.is_out_of_memory(error):
            raise
        text = guard.in_words(error)
    cleaning.free()
    for request in t.asked.saves or [None]:
        t.saver.not_copied(t.step, text, request)
    t.asked.saves.clear()
    return None


def _until_saved(t: Training) -> None:
    """Wait for the save that is under way: a slow disk is no slow step, and has its own limit of silence."""
    if t.saver.busy:
        began = time.perf_counter()
        with t.pulse.within(phases.CHECKPOINTING):
            t.saver.wait()
        t.saver.schedule.waited(time.perf_counter() - began)


def flush(t: Training) -> None:
    """Write the metrics that have gathered. Raises NotFinite when one of them is no number, before anything is made of it."""
    t.finite.look(t.with_room("while reading the metrics", t.metrics.flush))
    if t.code.has_grown():
        t.with_code(t.code.look(), "since this trainer began, before it was loaded")


def report(t: Training) -> None:
    """Write the metrics that have gathered, and tell how far it is."""
    flush(t)
    t.rate.mark()
    per_second, tokens_per_second = t.rate.per_second()
    last = t.metrics.last
    values, best = t.evaluation.shown()
    left = (t.total_steps - t.step) * t.config.train.batch_size
    t.link.send(
        wire.PROGRESS,
        epoch=t.epoch,
        epochs=t.config.train.epochs,
        step=t.step,
        total_steps=t.total_steps,
        samples=t.samples,
        loss=last.get("loss"),
        eval=values,
        best=best,
        lr=last.get("lr"),
        grad_norm=last.get("grad_norm"),
        samples_per_second=per_second,
        tokens_per_second=tokens_per_second,
        eta_seconds=left / per_second if per_second else None,
    )
    t.next_report = time.monotonic() + _REPORT_SECONDS


def _phase(t: Training, name: str) -> None:
    t.pulse.enter(name)
    if t.spill is not None:
        t.spill.pause()
    t.link.send(wire.PHASE, name=name, done=None, total=None, unit=None)


def summary(t: Training) -> dict[str, Any]:
    """The numbers of a result."""
    values, best = t.evaluation.shown()
    return {"step": t.step, "epoch": t.epoch, "samples": t.samples, "loss": t.metrics.last.get("loss"), "eval": values, "best": best}
