"""The trainer's process once torch is there: load the task, prepare its data, train. Must not know pipes or signals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainerd.contract import wire
from trainerd.engine import entry, preparing, taskfile
from trainerd.engine.commands import Command, Commands
from trainerd.engine.loop import Link
from trainerd.engine.process import TrainerProcess
from trainerd.engine.reporter import Reporter
from trainerd.engine.task import Task
from trainerd.engine.trainer import Trainer


class PipeLink(Link):
    """The loop's door to the supervisor."""

    def __init__(self, reporter: Reporter, commands: Commands) -> None:
        self._reporter = reporter
        self._commands = commands

    def send(self, event: str, **fields: Any) -> None:
        self._reporter.send(event, **fields)

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
        link=PipeLink(process.reporter, process.commands),
        plan=run.record.plan,
        before_step=process.before_step,
        cache_dir=cache_dir,
        holds_lock=True,
    )
    if trainer.train().outcome != "finished":
        return wire.EXIT_LEFT
    process.reporter.send(wire.FINISHED)
    return wire.EXIT_FINISHED


def _prepare(process: TrainerProcess, run: entry.Run, task: Task) -> Path:
    """The folder of the prepared data, after what is missing there has been done in a process of its own."""
    cache_dir = preparing.cache_folder(run.home, task, run.config, run.record.identity.get("data", {}))
    if preparing.is_needed(task, cache_dir):
        process.reporter.send(wire.PHASE, name="preparing", done=None, total=None, unit=None)
        process.child = preparing.PreparingChild(run)
        process.child.work(process.reporter.send)
        process.child = None
    else:
        record = preparing.prepared(cache_dir)
        if record is not None and record["data"]:
            process.reporter.send(wire.DATA, **record["data"])
    return cache_dir
