"""The trainer's process once torch is there: load the task, prepare its data, train. Must not know pipes or signals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trainerd.contract import wire
from trainerd.contract.errors import TrainerdError
from trainerd.engine import aside, dumps, entry, preparing, provenance, space, taskfile
from trainerd.engine.commands import Command, Commands
from trainerd.engine.loop import FINISHED, MADE_ROOM, Link
from trainerd.engine.process import TrainerProcess
from trainerd.engine.reporter import Reporter
from trainerd.engine.task import Task
from trainerd.engine.trainer import Trainer

_LAST_WORDS_SECONDS = 1.0


class PipeLink(Link):
    """The loop's door to the supervisor."""

    starts_again = True

    def __init__(self, reporter: Reporter, commands: Commands, faults: dict[str, Any]) -> None:
        self._reporter = reporter
        self._commands = commands
        self._faults = faults

    def send(self, event: str, **fields: Any) -> None:
        self._reporter.send(event, **fields)
        if event in (wire.BEAT, wire.PHASE):
            dumps.wind_up(str(fields.get("phase") or fields.get("name")), self._faults)

    def give_up(self, error: TrainerdError | None) -> None:
        code = wire.EXIT_NO_ROOM
        if error is not None:
            code, fields = entry.verdict(error, retry_helps=False)
            self._reporter.send(wire.EXCEPTION, **fields)
        self._reporter.close(_LAST_WORDS_SECONDS)
        os._exit(code)

    def command(self) -> Command | None:
        return self._commands.next()


def work(process: TrainerProcess, run: entry.Run) -> int:
    """Train the run to its end, or until asked to leave; returns the exit code. Raises whatever goes wrong."""
    task = taskfile.load_task(run.config, run.paths.task)
    process.reporter.send(wire.CHECKED)
    cache_dir = _prepare(process, run, task)
    trainer = Trainer(
        task,
        run.config,
        home=run.home.root,
        run=run.record.id,
        link=PipeLink(process.reporter, process.commands, run.config.faults.model_dump()),
        plan=run.record.plan,
        before_step=process.before_step,
        cache_dir=cache_dir,
        data=provenance.of_identity(run.record.identity),
        reached_step=run.record.step,
        too_large_micro_batch=run.record.too_large_micro_batch,
        holds_lock=True,
        traces=True,
    )
    process.has_stepped, process.in_first_evaluation = lambda: trainer.has_stepped, lambda: trainer.in_first_evaluation
    outcome = trainer.train().outcome
    if outcome != FINISHED:
        return wire.EXIT_NO_ROOM if outcome == MADE_ROOM else wire.EXIT_LEFT
    process.reporter.send(wire.FINISHED)
    return wire.EXIT_FINISHED


def _prepare(process: TrainerProcess, run: entry.Run, task: Task) -> Path:
    """The folder of the prepared data, after what is missing there has been done in a process of its own. Raises UsageError
    when data.path holds other data than the run began with."""
    cache_dir = preparing.cache_folder(run.home, task, run.config, run.record.identity.get("data", {}), run.paths.trained_task)
    send = process.reporter.send
    record = preparing.verified(cache_dir, send) if preparing.has_prepare(task) else None
    if preparing.has_prepare(task) and record is None:
        _prepare_in_child(process, run)
    else:
        preparing.look_at_data(task, run.config, provenance.of_identity(run.record.identity), send)
    if record is not None and record["data"]:
        send(wire.DATA, **record["data"])
    return cache_dir


def _prepare_in_child(process: TrainerProcess, run: entry.Run) -> None:
    waiting = space.Wait(run.home.cache, "Preparing the data", process.reporter.send)
    others = aside.Waiting(process.reporter.send)
    while True:
        process.reporter.send(wire.PHASE, name="preparing", done=None, total=None, unit=None)
        process.child = preparing.PreparingChild(run)
        try:
            process.child.work(process.reporter.send)
            return
        except entry.PreparingFoundNoRoom:
            process.child = None
            waiting.until_room(None)  # a LEAVE ends the process from the thread that hears it
        except aside.SteppedAside as error:
            process.child = None
            others.until_room(error.wanted)
        finally:
            process.child = None
