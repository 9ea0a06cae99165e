"""What follows the end of a trainer process: it finished, left as it was asked to, or died; or there was none to begin with.

Must not start or kill one.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, Any

from trainerd.contract import errors, phases, runs, status, wire
from trainerd.contract.paths import Home
from trainerd.machine import memory
from trainerd.supervisor import death, journal, logs, opening, report, smaller
from trainerd.supervisor.death import Death
from trainerd.supervisor.hang import Hang
from trainerd.supervisor.restart import MAX_DEATHS
from trainerd.supervisor.trainer import TrainerProcess

if TYPE_CHECKING:
    from trainerd.supervisor.loop import Leaving, Supervisor

_WHILE = {
    phases.PREPARING: "preparing the data",
    phases.CHECKPOINTING: "writing a checkpoint",
    phases.EXPORTING: "writing the finished model",
}
# Too many processes, no memory, too many open files on the whole machine: none of it is the trainer's.
_NO_MEMORY = (errno.EAGAIN, errno.ENOMEM, errno.ENFILE)
_NO_MEMORY_ON_WINDOWS = (8, 14, 1450, 1455)
_MOST_STEPS = 32
"""Of steps whose numbers were none, kept in the run."""


def follow(supervisor: Supervisor, gone: TrainerProcess, leaving: Leaving | None) -> None:
    """Bring record and state up to date with a trainer that is gone, and decide what comes next."""
    _refuse_saves(supervisor)
    at_stake = report.at_stake_in(supervisor.report.status)
    supervisor.room.left(gone.pid, supervisor.report.status)
    supervisor.report.trainer_gone()
    run = supervisor.journal.record.id
    if gone.said_finished or result_stamp(supervisor.home, run) not in (None, gone.result_before):
        supervisor.end(status.COMPLETED, _completed(supervisor))
    elif leaving is not None and leaving.hang is not None and leaving.why == "hang":
        _died(supervisor, gone, Death(_hung(gone, leaving.hang)))
    elif leaving is None and gone.exit_code == wire.EXIT_NO_ROOM:
        _made_room(supervisor, gone)
    elif leaving is not None:
        _left(supervisor, gone, leaving, at_stake)
    else:
        _died(supervisor, gone, _explain(supervisor, gone))


def _refuse_saves(supervisor: Supervisor) -> None:
    for ident in supervisor.saves_asked:
        supervisor.report.answer(ident, "save", "refused: the trainer ended before it had saved.")
    supervisor.saves_asked.clear()


def _completed(supervisor: Supervisor) -> str:
    return f"Completed. The model is in models/{supervisor.journal.record.id}."


def _where(supervisor: Supervisor) -> str:
    step = supervisor.journal.record.step
    return "" if step is None else f" at step {step:,}"


def result_stamp(home: Home, run: str) -> tuple[int, int] | None:
    """Tells one finished record from another: a run that was resumed for more epochs has an old one. None: there is none."""
    try:
        seen = home.run(run).result.stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_ino


def _left(supervisor: Supervisor, gone: TrainerProcess, leaving: Leaving, at_stake: str) -> None:
    words = ""
    if gone.exit_code not in (wire.EXIT_LEFT, wire.EXIT_NO_ROOM):
        how = "it did not leave in time and was killed" if leaving.killed_at is not None else errors.plain(_explain(supervisor, gone).words)
        words = f" The trainer ended before it could save ({how})."
        if at_stake:
            words += f" Computed again on resume: {at_stake}"
        supervisor.journal.note("left badly", exit_code=gone.exit_code, how=how, at_stake=at_stake)
        supervisor.report.status.trainer.last_exit = how
    if leaving.why != "pause":
        supervisor.end(status.STOPPED, f"Stopped{_where(supervisor)}; {how_to_go_on(supervisor)}{words}")
    elif supervisor.journal.record.wanted == runs.WANTED_RUNNING:
        supervisor.start_at = time.monotonic()  # resume came while it was leaving
    else:
        supervisor.rest_paused(words)


def cannot_be_killed(supervisor: Supervisor, stuck: TrainerProcess, leaving: Leaving) -> None:
    """It was killed and is still there, as a process inside a driver can be: the person is told what stands, and a stop does not wait.

    No other trainer is started beside it: it holds the device, the lock of the home and, for all we know, a file half written.
    """
    words = f"the trainer (process {stuck.pid}) cannot be killed: it is stuck in a driver or on a disk"
    if leaving.for_good:
        _refuse_saves(supervisor)
        supervisor.report.trainer_gone(stuck.pid)
        supervisor.journal.note("cannot be killed", pid=stuck.pid, why=leaving.why, log=stuck.log_path.name)
        if stuck.said_finished:
            supervisor.end(status.COMPLETED, f"{_completed(supervisor)} But {words}; a reboot ends it.")
        else:
            supervisor.end(status.STOPPED, f"Stopped{_where(supervisor)}, but {words}; a reboot ends it. Then {how_to_go_on(supervisor)}")
        return
    paused = supervisor.journal.record.wanted == runs.WANTED_PAUSED
    then = "paused" if paused else "started again"
    reason = f"The training is {then} as soon as its trainer is gone, but {words}. A reboot ends it; `stop` does not wait for it."
    if supervisor.report.status.reason != reason:
        supervisor.journal.note("cannot be killed", pid=stuck.pid, why=leaving.why, log=stuck.log_path.name)
        supervisor.report.state(status.RUNNING if paused else status.RECOVERING, reason)
        supervisor.report.urgent()


def _made_room(supervisor: Supervisor, gone: TrainerProcess) -> None:
    """It left by itself, for others need the memory: it is started again when there is some. No death."""
    told = gone.last_words.get(wire.NO_ROOM, {})
    facts = {name: told.get(name) for name in ("resource", "reason", "ceiling_bytes", "own_bytes")}
    supervisor.journal.note("made room", **facts, **({"needs_bytes": told["needs_bytes"]} if "needs_bytes" in told else {}))
    supervisor.room.made(told, time.monotonic())
    supervisor.start_at = time.monotonic() + supervisor.room.look_seconds
    supervisor.report.state(status.WAITING, f"Waiting for memory: {told.get('reason') or 'the machine is short of it'}.")


def not_started(supervisor: Supervisor, error: Exception) -> None:
    """No trainer could be started. What the machine will have again is waited for; anything else is tried five times."""
    lacking = _lacking(error, supervisor.home)
    if lacking is not None:
        supervisor.start_at = time.monotonic() + supervisor.timing.lacking_seconds
        if lacking != supervisor.lacking:
            supervisor.lacking = lacking
            supervisor.journal.note("start waits", error=str(error), lacking=lacking)
        supervisor.report.state(status.WAITING, f"{lacking} The training goes on by itself when there is; `stop` ends it.")
        return
    restart = supervisor.policy.died(())
    supervisor.journal.note("cannot start", error=str(error))
    if restart is None:
        supervisor.end(status.FAILED, f"The trainer cannot be started: {error}.")
        return
    supervisor.start_at = time.monotonic() + max(restart.delay_seconds, supervisor.timing.backoff_seconds)
    supervisor.report.state(status.RECOVERING, f"The trainer cannot be started: {error}; trying again.")


def _lacking(error: Exception, home: Home) -> str | None:
    """What the machine has too little of just now, as a sentence; None when it is something else."""
    if not isinstance(error, OSError):
        return None
    if journal.is_full(error):
        return f"The disk is full: there is no room for the log of a new trainer in {home.logs}."
    if error.errno in _NO_MEMORY or getattr(error, "winerror", None) in _NO_MEMORY_ON_WINDOWS:
        return f"The machine has no memory or no process left to start the trainer with ({error.strerror or error})."
    return None


def how_to_go_on(supervisor: Supervisor) -> str:
    """What `resume` will do, as the end of a sentence."""
    steps = opening.committed_steps(supervisor.home.run(supervisor.journal.record.id).checkpoints)
    return "`resume` goes on from the last checkpoint." if steps else "nothing was saved yet: `resume` begins at the beginning."


def _hung(gone: TrainerProcess, hang: Hang) -> str:
    where = _WHILE.get(hang.phase, hang.phase)
    return f"it gave no sign of life for {hang.silent_seconds:.0f} s while {where} (its stacks are in training_logs/{gone.log_path.name})"


def _died(supervisor: Supervisor, gone: TrainerProcess, why: Death) -> None:
    supervisor.starter.can_wrap &= gone.said_hello  # systemd-run may have failed in place of the trainer
    supervisor.report.status.trainer.last_exit = why.words
    run = supervisor.journal.record.id
    supervisor.journal.save_record(slowest=supervisor.vigil.hang.learned(), trained=why.trained)
    if why.device_lost and _waits_for_device(supervisor, gone, why):
        return
    if why.no_memory and smaller.goes_on(supervisor, gone, why):
        return
    ours, said = errors.is_ours(why.words), errors.plain(why.words).rstrip(".?!")
    if gone.not_finite_again:  # the first time the last checkpoint helps, if it was an accident of the hardware
        said = f"For the second time at the same step: {said}"
        why = Death(said, permanent=True)
    restart = None if why.permanent else supervisor.policy.died(opening.committed_steps(supervisor.home.run(run).checkpoints))
    deaths = supervisor.policy.deaths
    supervisor.journal.note("death", exit_code=gone.exit_code, why=why.words, log=gone.log_path.name, deaths=deaths)
    if restart is None:
        often = "" if why.permanent else f" {deaths} times without a new checkpoint"
        died = f"The trainer {'ended' if ours else 'died'}{often}: " if often or not (ours or why.trained) else ""
        supervisor.end(status.FAILED, f"{died}{said}.")
        return
    supervisor.report.status.trainer.restarts += 1
    supervisor.before_step = restart.before_step
    supervisor.start_at = time.monotonic() + restart.delay_seconds
    when = f"starting again in {restart.delay_seconds:.0f} s" if restart.delay_seconds else "starting again"
    if restart.before_step is not None:
        when += f" from the checkpoint before step {restart.before_step:,}"
        supervisor.journal.note("fallback", before_step=restart.before_step)
    count = f" (death {deaths} of {MAX_DEATHS} without a new checkpoint)" if deaths > 1 else ""
    supervisor.report.state(status.RECOVERING, f"{'' if ours else 'The trainer died: '}{said}; {when}{count}.")


def _waits_for_device(supervisor: Supervisor, gone: TrainerProcess, why: Death) -> bool:
    """The device is gone: look for it again after a while, by starting a trainer. Whether that is what to do."""
    delay_seconds = supervisor.device.lost(gone.has_trained)
    if delay_seconds is None:
        return False
    supervisor.journal.note("device lost", why=why.words, log=gone.log_path.name, next_look_seconds=delay_seconds)
    supervisor.start_at = time.monotonic() + delay_seconds
    when = f"Looking for it again in {delay_seconds:.0f} s."
    supervisor.report.state(status.WAITING, f"Waiting for the GPU: {errors.plain(why.words).rstrip('.?!')}. {when}")
    return True


def not_finite(supervisor: Supervisor, sender: TrainerProcess, message: dict[str, Any]) -> None:
    """A number is none. Kept in the run at once: this supervisor may be killed before the trainer's end is looked at."""
    step, record = message.get("step"), supervisor.journal.record
    facts = {name: message.get(name) for name in ("step", "epoch", "what", "samples", "num_samples")}
    supervisor.journal.note("not finite", **facts)
    if not isinstance(step, int) or step < 0:
        return
    sender.not_finite_again = step in record.not_finite_steps
    if not sender.not_finite_again:
        supervisor.journal.save_record(not_finite_steps=[*record.not_finite_steps, step][-_MOST_STEPS:])


def _explain(supervisor: Supervisor, gone: TrainerProcess) -> Death:
    killer = memory.kills(in_our_group=gone.is_our_group).since(gone.kills_before)
    return death.explain(gone.exit_code or 0, gone.last_words.get(wire.EXCEPTION), logs.tail(gone.log_path), out_of_memory_killed=killer)
