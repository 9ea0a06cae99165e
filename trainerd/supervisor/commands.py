"""What the supervisor does about each request; each verb is the client's file of the same name. Must not touch processes.

An outcome in the status is "accepted" (under way: the effect will show in the state), "done", or "refused: …" with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainerd.contract import files, requests, runs, status, wire
from trainerd.contract.errors import Refused, Unreadable
from trainerd.contract.requests import Request
from trainerd.supervisor.journal import say

if TYPE_CHECKING:
    from trainerd.supervisor.loop import Supervisor

ACCEPTED, DONE = "accepted", "done"
_MOST_SECONDS = 0.2
_TELL_REFUSALS = 8


def answer_all(supervisor: Supervisor) -> None:
    """Answer the request files in control/, oldest first, and delete them. Of a flood of them, as many as a tick has time for."""
    began, refused = time.monotonic(), 0
    try:
        waiting = requests.pending(supervisor.home)
    except Refused as error:
        supervisor.report.warn(str(error))
        return
    for path in waiting:
        if time.monotonic() - began > _MOST_SECONDS:
            break
        try:
            request = requests.read(path)
        except Unreadable as error:
            refused += 1
            _refuse(supervisor, path, str(error), refused)
            if refused <= _TELL_REFUSALS:
                supervisor.report.answer(path.stem[:64], "?", f"refused: {error}")
            continue
        if request.instance != supervisor.instance:  # of an earlier life: nobody waits for an answer
            refused += 1
            _refuse(supervisor, path, "It is meant for another supervisor.", refused)
            continue
        try:
            if not _seen(supervisor, request):
                handle = _HANDLERS.get(request.verb)
                outcome = handle(supervisor, request) if handle else f"refused: a running supervisor does not {request.verb}."
                if outcome is not None:
                    supervisor.report.answer(request.id, request.verb, outcome)
        finally:
            _delete(path)  # whatever came of it: seen before, it is gone without effect
    if len(waiting) == requests.MOST_PENDING or time.monotonic() - began > _MOST_SECONDS:
        supervisor.inbox.put(None)  # the rest at the next tick, which is now


def _refuse(supervisor: Supervisor, path: Path, why: str, number: int) -> None:
    """Delete what is no request to us, with an event; a flood is told by its first drops, or it would wash all else away."""
    if number <= _TELL_REFUSALS:
        supervisor.journal.note("request refused", file=path.name, reason=why)
    _delete(path)


def _seen(supervisor: Supervisor, request: Request) -> bool:
    """The same id twice is one request."""
    return supervisor.report.answered(request.id) or request.id in supervisor.saves_asked


def _delete(path: Path) -> None:
    try:
        files.remove(path)
    except OSError as error:
        say(f"cannot delete the request {path}: {error}")  # its id is known: it is not obeyed twice


def stop(supervisor: Supervisor, request: Request) -> str:
    """Commit and leave for good; `now`: without saving."""
    now = bool(request.arguments.get("now"))
    supervisor.journal.note("stop", now=now)
    supervisor.journal.save_record(wanted=runs.WANTED_STOPPED)
    if supervisor.trainer is None:
        supervisor.end(status.STOPPED, "Stopped.")
        return DONE
    supervisor.leave("stop", save=not now, limit_seconds=_limit(request))
    return ACCEPTED


def pause(supervisor: Supervisor, request: Request) -> str:
    """Commit and let the trainer go, so that its memory is free; the supervisor stays."""
    if supervisor.leaving is not None and supervisor.leaving.for_good:
        return "refused: it is stopping."
    if supervisor.journal.record.wanted == runs.WANTED_PAUSED:
        return DONE
    supervisor.journal.note("pause")
    supervisor.journal.save_record(wanted=runs.WANTED_PAUSED)
    if supervisor.trainer is None:
        supervisor.rest_paused()
        return DONE
    supervisor.leave("pause", save=True, limit_seconds=_limit(request))
    return ACCEPTED


def resume(supervisor: Supervisor, request: Request) -> str:
    """Bring a paused trainer back."""
    if supervisor.leaving is not None and supervisor.leaving.for_good:
        return "refused: it is stopping."
    if supervisor.journal.record.wanted != runs.WANTED_PAUSED:
        return DONE
    supervisor.journal.note("resume")
    supervisor.journal.save_record(wanted=runs.WANTED_RUNNING)
    if supervisor.trainer is None:
        supervisor.start_at = time.monotonic()
    return ACCEPTED  # when the trainer is still leaving, its end starts the next one


def save(supervisor: Supervisor, request: Request) -> str | None:
    """Commit a checkpoint now; answered when it is on disk."""
    if supervisor.trainer is None or supervisor.leaving is not None:
        return f"refused: no trainer is at work ({supervisor.report.status.state})."
    phase = supervisor.report.status.phase
    if phase is None or phase.name in ("starting", "preparing"):
        return "refused: there is nothing to save yet, training has not begun."
    supervisor.journal.note("save")
    supervisor.saves_asked.add(request.id)
    supervisor.trainer.send(wire.SAVE, id=request.id)
    return None


def _limit(request: Request) -> float | None:
    seconds = request.arguments.get("timeout_seconds")
    return None if seconds is None else float(seconds)


def not_saved(supervisor: Supervisor, message: Mapping[str, Any]) -> None:
    """A save that somebody asked for has failed: answered now, with the reason; it is tried again all the same."""
    ident = message.get("request")
    if message.get("event") == wire.UNSAVED and ident in supervisor.saves_asked:
        supervisor.saves_asked.discard(ident)
        supervisor.report.answer(ident, "save", f"refused: {message.get('error') or 'it could not be saved.'}")


_HANDLERS: dict[str, Callable[[Supervisor, Request], str | None]] = {"stop": stop, "pause": pause, "resume": resume, "save": save}
