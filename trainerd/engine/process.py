"""The trainer's process, from its first line to its last: pipes, priority, commands, locks, and the exit code. Must not
import torch: that comes with engine/training.py, after the locks, so that a person's stop is heard from the first moment.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from trainerd.contract import phases, wire
from trainerd.contract.errors import Unreadable
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.engine import arenas, dumps, entry, missing
from trainerd.engine.commands import Command, Commands
from trainerd.engine.locks import REMOVED, DeviceLock, device_name, hold, keep, let_the_holder_go_first
from trainerd.engine.reporter import Reporter, say
from trainerd.memory import heap

if TYPE_CHECKING:
    from trainerd.engine.preparing import PreparingChild

_TEARDOWN_SECONDS = 2.0


class TrainerProcess:
    """What stage after stage needs: where to report, whom to obey, which run this is."""

    def __init__(self, home: Path, run: str, before_step: int | None, commands: int, events: int | None) -> None:
        self.before_step = before_step
        self.reporter = Reporter(events)
        self.commands = Commands(commands, self._leave_at_once, _hurry, self._dump, self._abandoned)
        self.child: PreparingChild | None = None
        """The preparing process while there is one: it must not outlive us."""
        self.has_stepped: Callable[[], bool] = lambda: False
        """Whether a step of this process's life was finished."""
        self.in_first_evaluation: Callable[[], bool] = lambda: False
        """Whether it is at an evaluation, and none was ever whole."""
        self._home = home
        self._name = run
        self._device_lock: DeviceLock | None = None
        self._trainer_lock: FileLock | None = None

    def work(self) -> int:
        """Everything; returns the exit code. Nothing is raised: what goes wrong is told and logged."""
        self.reporter.start()
        try:
            self.commands.start()
            self.reporter.send(wire.HELLO, pid=os.getpid())
            run = entry.read_run(self._home, self._name)
            self._step_back(run)
            if run.paths.result.exists() and self.before_step is None:
                self.reporter.send(wire.FINISHED)  # died between the finished record and its exit
                return wire.EXIT_FINISHED
            self._take_locks(run)
            _set_environment(run)
            arenas.hold(heap.GIVEN_BACK)
            code: int = _training().work(self, run)
            return code
        except BaseException as error:  # the one place where everything ends, SystemExit of a user's task too
            return self._failed(error)

    def _step_back(self, run: entry.Run) -> None:
        from trainerd.machine import priority

        achieved = priority.lower_self(run.record.config.get("polite", {}).get("priority", priority.IDLE))
        say(f"trainer {os.getpid()} for {run.record.id}" + (f"; {', '.join(achieved)}" if achieved else ""))

    def _take_locks(self, run: entry.Run) -> None:
        self.reporter.send(wire.PHASE, name="starting", done=None, total=None, unit=None)
        self._trainer_lock = FileLock(run.home.trainer_lock)
        if any(run.paths.checkpoints.glob("checkpoint_*")):  # a trainer was here before, and such a file is never deleted
            let_the_holder_go_first(self._trainer_lock)
        hold(self._trainer_lock, lambda: "Waiting for an earlier trainer of this home to end.", self._tell_waiting)
        keep(self._trainer_lock, self._home_is_anothers, lambda: self._warn(f"{REMOVED}; it was made again. Leave it where it is."))
        try:
            self._device_lock = DeviceLock(device_name(run.record.plan), run.home.root)
            self._device_lock.acquire(self._tell_waiting)
            self._device_lock.keep(self._warn)
        except (OSError, Unreadable) as error:  # no folder of ours to lock in: train, but say what is not prevented
            why = f"{error.filename}: {error.strerror}." if isinstance(error, OSError) else error.message
            self._warn(f"The device is not locked against other homes: {why}")

    def _warn(self, text: str) -> None:
        self.reporter.send(wire.WARNING, text=text)

    def _home_is_anothers(self) -> None:
        """Our lock's file was removed and another trainer has locked the new one: two must not write into one run."""
        say("another trainer has taken this home; leaving without saving")
        self.reporter.close(0.3)
        os._exit(wire.EXIT_LEFT)

    def _tell_waiting(self, reason: str) -> None:
        self.reporter.send(wire.WAITING, reason=reason)

    def _leave_at_once(self, command: Command) -> None:
        """Nothing has been trained yet, so there is nothing to commit: go, whatever the main thread is doing."""
        say(f"leaving before the training began ({command.get('why')})")
        if self.child is not None:
            self.child.kill()
        self.reporter.close(0.3)
        os._exit(wire.EXIT_LEFT)

    def _dump(self) -> None:
        """It seems to hang: leave the stacks in the log, those of a preparing process too."""
        dumps.write()
        child = self.child
        if child is not None:
            child.dump()

    def _abandoned(self) -> None:
        dumps.abandoned(phases.TRAINING)

    def _failed(self, error: BaseException) -> int:
        traceback.print_exception(error)
        if isinstance(error, entry.PreparingFailed) and error.told:
            return error.code
        error = missing.in_words(error, Home(self._home).run(self._name))
        # With a checkpoint there is one before it to try, should this one be poisoned. Without one, and without a single step
        # that went well, the same would happen again; so it would in an evaluation where none ever went well.
        begun = self.has_stepped() or any(Home(self._home).run(self._name).checkpoints.glob("checkpoint_*.json"))
        code, fields = entry.verdict(error, retry_helps=begun and not self.in_first_evaluation())
        self.reporter.send(wire.EXCEPTION, **fields)
        return code

    def end(self, code: int) -> NoReturn:
        """Leave the process. What libraries registered for the end gets a short while; a wedged driver must not keep us."""
        threading.Timer(_TEARDOWN_SECONDS, os._exit, [code]).start()
        self.reporter.close()
        for child in multiprocessing.active_children():
            child.terminate()
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)


def _training() -> ModuleType:
    """engine/training.py, and with it torch. Nothing of 150,000 new objects is garbage: looking for some, again and again while
    they come, is a sixth of the import, and they are not looked at later either."""
    gc.disable()
    try:
        from trainerd.engine import training
    finally:
        gc.freeze()
        gc.enable()
    return training


def _hurry() -> None:
    from trainerd.machine import priority

    priority.raise_process(os.getpid())


CACHES = {
    # oneDNN keeps what it has compiled for 1,024 shapes: 0.3 GB more than for 256, where lengths vary (docs/log.md).
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    # torch's ideep keeps 1,024 of them besides, whatever oneDNN lets go: bf16 grew by 0.2 GB over 1,000 steps, and rests with 64.
    "LRU_CACHE_CAPACITY": "64",
}
"""How much is kept of what was compiled for shapes; read when torch is imported."""


def _set_environment(run: entry.Run) -> None:
    """What must be set before torch is imported, as the supervisor does for us; a trainer started by hand is right too."""
    defaults: dict[str, Any] = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        **CACHES,
    }
    if run.config.train.deterministic is not False:
        defaults["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    threads = (run.record.plan or {}).get("threads") or run.config.train.threads
    if isinstance(threads, int):
        defaults["OMP_NUM_THREADS"] = defaults["MKL_NUM_THREADS"] = threads
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))


def _hear_signals(process: TrainerProcess) -> None:
    """SIGTERM is a LEAVE (a log-out); Ctrl-C and the terminal's end are the supervisor's business."""
    signal.signal(signal.SIGTERM, lambda *_: process.commands.put({"do": wire.LEAVE, "why": "SIGTERM", "save": True}))
    for name in ("SIGINT", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry of `python -m trainerd.engine`."""
    asked = entry.parse("trainerd.engine", arguments)
    commands, events = entry.take_pipes()
    dumps.arrange()
    process = TrainerProcess(asked.home, asked.run, asked.before_step, commands, events)
    _hear_signals(process)
    process.end(process.work())
