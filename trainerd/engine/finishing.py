"""Writes the result of a training that has come to its end, whatever the disk says. Must not train.

A full disk is waited for, a failing one is tried again, and the trained state is never given up for it: the trainer ends
without a result only when everything is in a checkpoint, and then the next start writes the result from that.
"""

from __future__ import annotations

import time
from pathlib import Path

from trainerd.contract import files, wire
from trainerd.contract.errors import ExportFailed, NotExported
from trainerd.contract.paths import RunPaths
from trainerd.engine import guard, loop, space
from trainerd.engine.export import export, weights_bytes
from trainerd.engine.loop import Result, Training

_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0)
"""Between attempts on a disk that fails: three minutes, in which a cable is put back and a file system mounted again."""
_LOOK_SECONDS = 0.25


def finish(training: Training, result: Result, paths: RunPaths) -> Result:
    """Write the result; asked to leave meanwhile, leave. Raises NotExported when the disk does not take it, ExportFailed when the
    task's own export() raises; neither before everything is in a checkpoint."""
    t, root = training, paths.home.root
    room = space.Wait(root, "Writing the finished model", t.link.send)
    failures = 0

    def write() -> None:
        t.states.let_go()  # as large as the model and its optimizer; everything is saved
        _export(t, result, paths)

    while True:
        problem: BaseException
        try:
            _make_safe(t)
            with guard.worded("write the finished model"):
                t.with_room("while writing the finished model", write)
            return result
        except Exception as error:
            by_task = isinstance(error, ExportFailed)
            if (by_task and t.saver.failure is None) or not (by_task or space.is_full(error, root) or space.is_of_the_disk(error)):
                raise
            problem = error
        full = space.is_full(problem, root)
        t.link.send(wire.NOTE, kind="export_waits", attempt=room.attempts + failures + 1, error=str(problem))
        if full:
            need_bytes = t.states.size_bytes() if problem is t.saver.error else weights_bytes(t.model)
            go_on = room.until_room(need_bytes, t.asked.to_leave)
        else:
            if failures >= len(_PAUSES_SECONDS) and t.saver.failure is None:
                raise NotExported(_why(problem, t, paths), _WHAT_TO_DO) from problem
            pause_seconds = _PAUSES_SECONDS[min(failures, len(_PAUSES_SECONDS) - 1)]
            failures += 1
            go_on = _wait(t, pause_seconds, f"{_why(problem, t, paths)} Trying again in {pause_seconds:.0f} s.")
        if not go_on:
            return Result(loop.LEFT, result.step, result.metrics)


_WHAT_TO_DO = "Look at the disk (its cable, its rights, its health); then `resume` writes the result, and trains nothing again."


def _make_safe(t: Training) -> None:
    """Before a result there is either the last checkpoint or, where only that has no room, the whole of the metrics. Raises OSError."""
    if t.saver.failure is not None:
        loop.save(t)
        t.saver.wait()
    error = t.saver.error
    if error is None:
        return
    if _replaces_weights(t):  # then the model's weights are not the last ones any more, and nothing could save those
        raise error
    t.metrics.flush()
    if t.metrics.waits:
        raise error
    files.sync_file(t.metrics.path)


def _replaces_weights(t: Training) -> bool:
    return t.config.train.early_stopping is not None and _best_step(t) != t.step


def _best_step(t: Training) -> int:
    return int(t.evaluation.best.get("step", t.step))


def _export(t: Training, result: Result, paths: RunPaths) -> None:
    """The result's files. With early stopping, the weights of the best evaluation; without, the last."""
    t.link.send(wire.PHASE, name="exporting", done=None, total=None, unit=None)
    step = t.step
    if _replaces_weights(t):
        state = t.store.read_step(_best_step(t))
        if state is None:
            text = f"The checkpoint of the best evaluation (step {_best_step(t)}) is not there: the last weights are exported."
            t.link.send(wire.WARNING, text=text)
        else:
            t.states.restore_weights(state)
            step = _best_step(t)
    facts = {**result.metrics, "exported_step": step, "exact": t.exact.document()}
    export(t.task, t.model, t.config, paths, frozen=t.states.frozen, facts=facts)


def _why(error: BaseException, t: Training, paths: RunPaths) -> str:
    where = _shown(error, paths)
    if t.saver.failure is not None:
        return f"The finished model cannot be written{where}, and the last steps are only in memory: {t.saver.failure}"
    return f"The finished model cannot be written{where}. All that was trained is saved (step {t.step:,})."


def _shown(error: BaseException, paths: RunPaths) -> str:
    name = getattr(error, "filename", None)
    place = Path(str(name)) if name else paths.model
    said = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return f" to {place}: {said}"


def _wait(t: Training, seconds: float, reason: str) -> bool:
    """Whether nobody asked to leave meanwhile."""
    until = time.monotonic() + seconds
    t.link.send(wire.WAITING, reason=reason)
    while not t.asked.to_leave():
        if time.monotonic() >= until:
            return True
        time.sleep(min(_LOOK_SECONDS, seconds))
    return False
