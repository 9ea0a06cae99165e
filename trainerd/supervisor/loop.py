"""The supervisor: keeps one trainer alive, obeys requests, tells the truth. Must not import torch or create a CUDA context.

Read tick() first. It is called when a second has passed, a request file has appeared, the trainer has said something or
died, or a deadline is due; the disk and the process are looked at anew each time, so that a lost wake-up costs a second.
"""

from __future__ import annotations

import os
import queue
import time
import traceback
from dataclasses import dataclass
from typing import Any

from trainerd.contract import clock, runs, status, wire
from trainerd.contract.errors import AlreadyRunning, Refused
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.contract.status import SupervisorInfo
from trainerd.supervisor import aftermath, commands, events, journal, opening, report
from trainerd.supervisor.hang import Hang
from trainerd.supervisor.opening import Opening
from trainerd.supervisor.power import AUTO, Power
from trainerd.supervisor.restart import DeviceWait, RestartPolicy
from trainerd.supervisor.room import Room
from trainerd.supervisor.sensors import Sensors
from trainerd.supervisor.starter import Starter
from trainerd.supervisor.trainer import Inbox, TrainerProcess
from trainerd.supervisor.upkeep import Upkeep
from trainerd.supervisor.vigil import Vigil


@dataclass(frozen=True)
class Timing:
    """Every length of time the supervisor lives by."""

    tick_seconds: float = 1.0
    backoff_seconds: float = 1.0
    device_seconds: float = 10.0
    """Until a lost device is looked for again; then twice as long each time."""
    room_seconds: float = 15.0
    """So long there must be memory again before a trainer that made room is started."""
    lacking_seconds: float = 5.0
    """Until a start that a full disk or a machine without memory did not allow is tried again."""
    leave_seconds: float = 60.0
    """For a trainer with something to save; ten times the last save's duration is added."""
    leave_now_seconds: float = 2.0
    """For one with nothing to save."""
    unkillable_seconds: float = 10.0
    """After a kill: a process stuck in a driver cannot be ended, and nobody waits for it forever."""
    hung_seconds: float = 10.0
    """For a trainer that gave no sign of life: it may come to itself and save."""
    slept_seconds: float = 10.0
    """A tick this late means that the machine or the supervisor slept: deadlines move."""


@dataclass
class Leaving:
    """The trainer is about to be gone: why ("stop", "pause", "signal", "finished", "hang"), and until when."""

    why: str
    save: bool
    deadline: float
    killed_at: float | None = None
    hang: Hang | None = None

    @property
    def for_good(self) -> bool:
        """Whether the run ends with it, or goes on with another trainer."""
        return self.why not in ("pause", "hang")


class Supervisor:
    """Lives from start to the end of one run."""

    def __init__(
        self,
        home: Home,
        instance: str,
        start: Opening,
        *,
        command: list[str] | None = None,
        timing: Timing | None = None,
        lock: FileLock | None = None,
    ) -> None:
        self.home, self.instance = home, instance
        self._upkeep = Upkeep(home.run(start.record.id), lock)
        self.timing = timing or Timing()
        self.journal = journal.Journal(home, start.record)
        self.report = report.Report(home, start.record, SupervisorInfo(os.getpid(), instance, clock.wall()))
        self.inbox: Inbox = queue.SimpleQueue()  # of what wakes us; None is a bare wake-up
        self.starter = Starter(home, instance, command)
        self.policy = RestartPolicy(self.timing.backoff_seconds)
        self.device = DeviceWait(self.timing.device_seconds)
        self.room = Room(self.timing.room_seconds, note=self.journal.note)
        self.start_at: float | None = time.monotonic()  # when the next trainer is due; None: not at all
        self.before_step: int | None = None  # it shall go back before this step
        self.lacking = ""  # what the machine has too little of to start one
        self.trainer: TrainerProcess | None = None
        self.leaving: Leaving | None = None
        self.saves_asked: set[str] = set()
        self.signals = 0  # how often the system or the terminal asked us to end; set by a signal handler
        self.stop_wanted = False  # whether that was the person at the terminal
        self.result: str | None = None
        self._arrived: list[tuple[TrainerProcess, dict[str, Any] | None] | None] = []
        self._signals_seen = 0
        self.vigil = Vigil(start.record, self.timing.tick_seconds)
        self._sensors = Sensors(start.record.config.get("memory") or {})
        keep_awake = str((start.record.config.get("polite") or {}).get("keep_awake", AUTO))
        self._power = Power(keep_awake, lambda: self.inbox.put(None))
        self._last_tick = time.monotonic()
        self._open(start)

    def run(self) -> str:
        """Until the run has ended: completed, stopped or failed."""
        self._power.start()
        while self.result is None:
            try:
                self.tick()
            except AlreadyRunning:
                raise  # the home is another supervisor's now: not a word more into its files
            except Exception:
                # One of three places that catch everything: a supervisor that dies of a surprise keeps nobody alive.
                journal.say(traceback.format_exc())
                self.report.warn("The supervisor met an error it did not expect; see its log in training_logs.")
                self.report.write_if_due(0.0)
                time.sleep(min(1.0, self.timing.tick_seconds))
                self._go_on_all_the_same()
            self._rest()
        if not self.journal.write_last():
            self.report.warn("run.json cannot be written: what was wanted last is forgotten, and the run may go on at the next log-in.")
        self.report.write_last()
        self._power.close()
        return self.result

    def _go_on_all_the_same(self) -> None:
        """A surprise in the middle of a death must not leave a run that is wanted without a trainer that is due."""
        idle = self.trainer is None and self.start_at is None and self.result is None
        if idle and self.journal.record.wanted == runs.WANTED_RUNNING:
            self.start_at = time.monotonic() + self.timing.backoff_seconds

    def tick(self) -> None:
        """One look at everything."""
        self._allow_for_sleep()
        self._upkeep.look(self)
        self.take_events()
        self.notice_death()
        self.obey()
        self.watch()
        self.keep_deadlines()
        self.start_if_due()
        self._power.look(self)
        self.tell()

    # --- what has happened ---------------------------------------------------------------------------------------------

    def take_events(self) -> None:
        """What the trainer has said since the last tick."""
        try:
            while True:
                self._arrived.append(self.inbox.get_nowait())
        except queue.Empty:
            pass
        arrived, self._arrived = self._arrived, []
        if self.trainer is not None:
            latest, self.trainer.latest = self.trainer.latest, {}
            arrived = [*((self.trainer, message) for message in latest.values()), *arrived]
        for sender, message in filter(None, arrived):
            if sender is self.trainer and message is not None:
                self._heard(sender, message)

    def _heard(self, sender: TrainerProcess, message: dict[str, Any]) -> None:
        events.apply(self.report.status, message)
        event = message.get("event")
        self.vigil.hear(sender, message)
        if event == wire.HELLO:
            sender.said_hello = True
        elif event == wire.WAITING and self.leaving is None:
            self.report.state(status.WAITING, str(message.get("reason") or "Waiting."))
        elif event == wire.CHECKPOINT:
            self._saved(message)
        elif event in (wire.EXCEPTION, wire.NO_ROOM):
            sender.last_words[str(event)] = message
        elif event == wire.NAN:
            aftermath.not_finite(self, sender, message)
        elif event == wire.FINISHED:
            sender.said_finished = aftermath.result_stamp(self.home, self.journal.record.id) is not None
            if sender.said_finished:  # a process may wedge in a driver on its way out, with all its work done
                self.leaving = Leaving("finished", False, time.monotonic() + self.timing.leave_seconds)
        elif event == wire.WARNING and self.report.warn(str(message.get("text"))):
            self.journal.note("warning", text=str(message.get("text")))
        elif event in (wire.NOTE, wire.UNSAVED) or (event == wire.EXACT and message.get("now") is False):
            facts = {k: v for k, v in message.items() if k not in ("event", "at", "monotonic", "kind")}
            self.journal.note(str(message.get("kind") or event), **facts)
        elif event == wire.PLAN and isinstance(message.get("record"), dict):
            self.journal.save_record(plan=message["record"])
        self._power.answered(self, message)
        commands.not_saved(self, message)
        if event in (wire.CHECKED, wire.PHASE):
            self._working(event == wire.CHECKED or message.get("name") != "starting")

    def _working(self, past_starting: bool) -> None:
        """The trainer works: it no longer waits for anything."""
        if self.leaving is None:
            self.report.state(status.RUNNING if past_starting else status.STARTING, report.doing(self.report.status))

    def _saved(self, message: dict[str, Any]) -> None:
        saved = self.report.status.checkpoint
        if saved is None:
            return
        self.policy.acknowledged(saved.step)
        if self.policy.deaths == 0:  # it is beyond what was there before
            self.vigil.hang.progressed()
            self.device.acknowledged()
        if self.journal.record.step is None:
            self.journal.save_record(step=saved.step)  # from now on, losing all checkpoints is no beginning
        self.journal.record.step = saved.step
        request = message.get("request")
        if request in self.saves_asked:
            self.saves_asked.discard(request)
            self.report.answer(request, "save", commands.DONE)
            self.journal.note("saved", step=saved.step, path=saved.path)

    def notice_death(self) -> None:
        """The trainer is gone: finished, left as asked, or died."""
        gone = self.trainer
        if gone is None or gone.exit_code is None:
            return
        gone.drain()
        self.take_events()
        self.trainer, leaving, self.leaving = None, self.leaving, None
        aftermath.follow(self, gone, leaving)

    # --- what is asked -------------------------------------------------------------------------------------------------

    def obey(self) -> None:
        """Requests, then signals: a first one commits and leaves, a second one does not wait. `wanted` stays."""
        if self.result is None:
            commands.answer_all(self)
        if self.signals == self._signals_seen or self.result is not None:
            return
        self._signals_seen = self.signals
        self.journal.note("signal", count=self.signals)
        if self.stop_wanted:
            self.journal.save_record(wanted=runs.WANTED_STOPPED)
        if self.trainer is None:
            self.end(status.STOPPED, f"Stopped by a signal; {aftermath.how_to_go_on(self)}")
        else:
            self.leave("signal", save=self.signals == 1, limit_seconds=None)

    def leave(self, why: str, *, save: bool, limit_seconds: float | None) -> None:
        """Ask the trainer to commit and leave, and give it its ordinary weight back so that this is quick."""
        if self.trainer is None:
            return
        if self.leaving is not None and self.leaving.for_good and save:
            return  # it is at it already
        current = self.report.status
        nothing_yet = current.phase is None or current.phase.name in ("starting", "preparing") or current.state == status.WAITING
        if not save or (nothing_yet and why != "hang"):
            limit = self.timing.leave_now_seconds
        else:
            last = current.checkpoint.seconds if current.checkpoint else None
            limit = limit_seconds or self.timing.leave_seconds + 10 * (last or 0.0)
        before, deadline = self.leaving, time.monotonic() + limit
        if before is not None and (before.hang is not None or before.killed_at is not None):
            deadline = min(deadline, before.deadline)  # it was not alive before, either
        self.leaving = Leaving(why, save, deadline, before.killed_at if before else None)
        self.trainer.send(wire.LEAVE, why="pause" if why == "pause" else "stop", save=save)
        self.trainer.hurry()
        what = "the trainer saves and leaves" if save and not nothing_yet else "the trainer leaves"
        if why == "pause":
            self.report.state(status.RUNNING, f"Pausing: {what}.")
        elif why == "hang":
            self.report.state(status.RECOVERING, "The trainer gives no sign of life: it is ended and started again.")
        else:
            self.report.state(status.STOPPING, f"Stopping: {what}.")
        self.report.urgent()

    def watch(self) -> None:
        """A trainer that gives no sign of life for longer than its phase may take has hung: its stacks are kept, and it has to go."""
        trainer = self.trainer
        hang = self.vigil.look(trainer if self.leaving is None else None)
        if hang is None or trainer is None:
            return
        facts = {"phase": hang.phase, "silent_seconds": round(hang.silent_seconds, 1), "limit_seconds": round(hang.limit_seconds, 1)}
        self.journal.note("hang", **facts, log=trainer.log_path.name)
        trainer.dump()
        self.leave("hang", save=True, limit_seconds=self.timing.hung_seconds)
        if self.leaving is not None:
            self.leaving.hang = hang

    def keep_deadlines(self) -> None:
        """A trainer that does not leave in time is killed; one that cannot be killed is not waited for."""
        leaving, now = self.leaving, time.monotonic()
        if leaving is None or self.trainer is None or now < leaving.deadline:
            return
        if leaving.killed_at is None:
            leaving.killed_at = now
            leaving.deadline = now + self.timing.unkillable_seconds
            self.trainer.kill()
        else:
            leaving.deadline = now + self.timing.unkillable_seconds
            aftermath.cannot_be_killed(self, self.trainer, leaving)

    # --- what is done --------------------------------------------------------------------------------------------------

    def start_if_due(self) -> None:
        """Start the trainer when it is time."""
        if self.trainer is not None or self.result is not None or self.start_at is None or time.monotonic() < self.start_at:
            return
        if (short := self.room.waits(time.monotonic())) is not None:
            self.start_at = time.monotonic() + self.room.look_seconds
            self.report.state(status.WAITING, short)
            return
        self.start_at = None
        if not self.lacking:  # a wait goes on until there is a trainer
            self.report.state(status.STARTING, "Starting the trainer.")
            self.report.write_if_due(self.timing.tick_seconds)
        before, record = self.before_step, self.journal.record
        steps = opening.committed_steps(self.home.run(record.id).checkpoints)
        self.policy.started(next((step for step in reversed(steps) if before is None or step < before), None))
        try:
            self.trainer = self.starter.start(record, before, self.inbox)
        except Refused as error:
            self.end(status.FAILED, f"The trainer cannot be started: {error}")
            return
        except (OSError, ValueError) as error:
            aftermath.not_started(self, error)
            return
        self.before_step, self.lacking = None, ""
        self.report.state(status.STARTING, "Starting the trainer.")
        self.vigil.hang.started()
        self.report.trainer_started(self.trainer.pid, self.trainer.started_at, self.trainer.log_path)
        self.journal.note("trainer started", pid=self.trainer.pid, log=self.trainer.log_path.name, before_step=before)

    def rest_paused(self, words: str = "") -> None:
        """Nothing runs; the supervisor stays, so that resume needs no start."""
        self.start_at = None
        step = self.journal.record.step
        where = "" if step is None else f" at step {step:,}"
        self.report.state(status.PAUSED, f"Paused{where}: the trainer is gone, its memory is free; `resume` brings it back.{words}")

    def end(self, state: str, reason: str) -> None:
        """The run, or this supervisor's part of it, is over."""
        # A signal ends the processes only: the run has no outcome and is still wanted, after the next log-in.
        over = state != status.STOPPED or self.journal.record.wanted == runs.WANTED_STOPPED
        self.result = state
        self.report.state(state, reason)
        self.journal.note(state, reason=reason)
        self.journal.save_record(outcome=state if over else None, reason=reason, ended_at=clock.wall())

    # --- what is told --------------------------------------------------------------------------------------------------

    def tell(self) -> None:
        """Measure the machine and write the status: at once when something changed, else once a second."""
        if self.report.status.state == status.RUNNING and self.leaving is None:
            self.report.state(status.RUNNING, f"{report.doing(self.report.status)} {self.vigil.hang.words()}".rstrip())
        self._sensors.sample(self.report.status)
        self.journal.retry()
        self.report.write_if_due(self.timing.tick_seconds * 0.95)

    def _open(self, start: Opening) -> None:
        saved = opening.newest_checkpoint(self.home, start.record.id)
        if saved is not None:
            events.apply(self.report.status, saved)
        if self.report.status.checkpoint is not None:
            self.journal.record.step = self.report.status.checkpoint.step
        for text in start.warnings:
            self.report.warn(text)
        if not journal.keep_ballast(self.home):
            self.report.warn("The disk is nearly full: there is no room for the 1 MB kept in reserve.")
        self.journal.note("resumed" if start.resumed else "started", instance=self.instance, changes=start.changes)
        self.report.state(status.STARTING, "Starting the trainer.")
        self.report.write_if_due(0.0)

    def _allow_for_sleep(self) -> None:
        now = time.monotonic()
        late = now - self._last_tick - self.timing.tick_seconds
        self._last_tick = now
        if late > self.timing.slept_seconds:
            self.journal.note("slept", seconds=round(late, 1))
            if self.leaving is not None:
                self.leaving.deadline += late

    def _rest(self) -> None:
        """Until something happens, a deadline is due, or a second has passed."""
        if self.result is not None:
            return
        due = [self.start_at if self.trainer is None else None, self.leaving.deadline if self.leaving else None]
        wait = min([self.timing.tick_seconds, *(at - time.monotonic() for at in due if at is not None)])
        try:
            self._arrived.append(self.inbox.get(timeout=max(0.005, wait)))
        except queue.Empty:
            pass
