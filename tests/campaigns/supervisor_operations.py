"""`python -m tests.campaigns.supervisor_operations FOLDER EVERY [KIND…]`: SIGKILL at a supervisor's file operations. No tests here.

run.json, config.yml, the copy of the task, the status, events, locks, logs, requests, the ballast: every operation of lives that are
paused, resumed, asked to save and stopped, that finish, and that only record a stop is listed first; then each EVERYth is died at,
before it, half way through it, or after it. A program of its own because supervisors are forked from a process with one thread.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.campaigns.every_operation import Point, Watching, points_of
from tests.supervised import RUN, start_arguments, trainer_command
from trainerd.contract import files, lock, requests, runs, status
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.contract.requests import Request
from trainerd.contract.runs import RunRecord
from trainerd.engine.selftest.oracle import Broken
from trainerd.machine import append
from trainerd.supervisor import __main__ as door
from trainerd.supervisor import opening

_GONE_SECONDS = 30.0
_STEPS = 40
_TASK = "answer = 42\n"
_UUID = re.compile(r"[0-9a-f]{32}")
_STAMP = re.compile(r"training_\d+_\d+(_\d+)?\.log")
WANTED = {"pause": runs.WANTED_PAUSED, "resume": runs.WANTED_RUNNING, "stop": runs.WANTED_STOPPED}


class WatchingSupervisor(Watching):
    """Names requests and logs the same in every life, and sees the locks and logs that do not go through files.disk."""

    def at(self, kind: str, path: Path, action: Callable[[], Any], detail: Any = None) -> Any:
        plain = _STAMP.sub("training.log", _UUID.sub("request", path.name))
        return super().at(kind, path.with_name(plain) if detail is None else path, action, detail)

    def _half(self, path: Path, action: Callable[[], Any], detail: Any) -> None:
        super()._half(path, action, detail if hasattr(detail[0], "write") else None)

    def take(self) -> None:
        """From here on this process's files are this disk's."""
        files.disk = self
        acquire, create = FileLock.acquire, append.create
        FileLock.acquire = lambda own, *words: self.at("lock", own.path, lambda: acquire(own, *words))  # type: ignore[method-assign]
        append.create = lambda path: self.at("log", path, lambda: create(path))


@dataclass
class Seen:
    """What a client saw of one life."""

    code: int | None = None
    answered: list[str] = field(default_factory=list)
    """Verbs whose outcome the status showed, in order."""
    step: int = 0
    """Of the newest checkpoint the status showed."""
    acknowledged: bool = False
    """Whether the status showed the start."""


class Stage:
    """One home, and how supervisors live in it."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.task = root.with_name("my_task.py")
        self.task.parent.mkdir(parents=True, exist_ok=True)
        self.task.write_text(_TASK, encoding="utf-8")

    def live(self, verbs: list[str], disk: WatchingSupervisor | None = None, verb: str = "start", **script: Any) -> Seen:
        """One supervisor, from the request it is called with to its end; `verbs` are asked for one after the other has come about."""
        instance = uuid.uuid4().hex
        resume = self.home.run(RUN).record.exists()
        arguments = start_arguments(resume=resume, task_file=str(self.task)) if verb == "start" else {"run": RUN}
        request = Request(verb, instance, arguments)
        requests.send(self.home, request)
        pid = os.fork()
        if pid == 0:
            _become_supervisor(self.home, instance, request.id, disk, {"steps": _STEPS, "every": 5, "pause": 0.01, **script})
        seen, left, until = Seen(), list(verbs), time.monotonic() + 120
        while seen.code is None:
            self._look(seen, left, instance)
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                seen.code = os.waitstatus_to_exitcode(code)
            elif time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                raise Broken(f"a supervisor did not end: {status.read(self.home)}")
            time.sleep(0.003)
        self._look(seen, [], instance)
        requests.withdraw(self.home.control / f"{request.id}.json")  # as the client does, whatever came of it
        return seen

    def _look(self, seen: Seen, left: list[str], instance: str) -> None:
        found = status.read(self.home)
        if found.state == status.UNREADABLE:
            raise Broken(f"the status cannot be read: {found.reason}")
        shown = found.status
        if shown is None or shown.supervisor is None or shown.supervisor.instance != instance:
            return
        seen.acknowledged = True
        seen.answered = [answer.verb for answer in shown.requests if not answer.outcome.startswith("refused")]
        seen.step = max(seen.step, shown.checkpoint.step if shown.checkpoint else 0)
        ready = {
            "pause": (shown.progress.step or 0) >= 3 and shown.state == status.RUNNING,
            "resume": shown.state == status.PAUSED,
            "save": shown.state == status.RUNNING and (shown.progress.step or 0) > seen.step,
            "stop": "save" in seen.answered,
        }
        if left and found.alive and ready[left[0]]:
            requests.send(self.home, Request(left.pop(0), instance))

    def everybody_leaves(self) -> None:
        """After a kill: the trainer sees the end of its commands."""
        until = time.monotonic() + _GONE_SECONDS
        while lock.is_held(self.home.trainer_lock) or lock.is_held(self.home.supervisor_lock):
            if time.monotonic() > until:
                raise Broken("a trainer outlives its supervisor")
            time.sleep(0.005)


def _become_supervisor(home: Home, instance: str, request: str, disk: WatchingSupervisor | None, script: dict[str, Any]) -> NoReturn:
    code = 70
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        said = os.open(home.root.with_name("supervisors.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for source, target in ((null, 0), (said, 1), (said, 2)):
            os.dup2(source, target)
        if disk is not None:
            disk.take()
        words = ["--home", str(home.root), "--instance", instance, "--request", request]
        code = door.main([*words, "--trainer-command", json.dumps(trainer_command(script))])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def look(stage: Stage, seen: Seen) -> None:
    """After a kill: what was told stands on the disk, and everything there can be read. Raises Broken."""
    try:
        record: RunRecord | None = runs.read(stage.home, RUN)
    except FileNotFoundError:
        record = None
    if record is None:
        if seen.acknowledged:
            raise Broken("the start was shown in the status, and there is no run.json")
        return
    if (stage.home.run(RUN).task / stage.task.name).read_text("utf-8") != _TASK:
        raise Broken("run.json is there, and the copy of the task is not whole")
    last = next((verb for verb in reversed(seen.answered) if verb in WANTED), None)
    # A verb that has come about may be followed by one that is recorded and not answered yet; never by an earlier wish.
    order = [runs.WANTED_RUNNING, runs.WANTED_PAUSED, runs.WANTED_RUNNING, runs.WANTED_STOPPED]
    reached = {None: 0, "pause": 1, "resume": 2, "stop": 3}[last]
    if record.wanted not in order[reached:]:
        raise Broken(f"{last} was answered, and run.json says {record.wanted}")
    newest = max(opening.committed_steps(stage.home.run(RUN).checkpoints), default=0)
    if newest < seen.step:
        raise Broken(f"the status acknowledged step {seen.step}, the newest checkpoint is of step {newest}")


def goes_on(stage: Stage, before: int) -> None:
    """The next start, or resume, brings the run to its end, and leaves nothing behind that does not belong there. Raises Broken."""
    stage.live([], pause=0.0)
    stage.everybody_leaves()
    found, paths = status.read(stage.home), stage.home.run(RUN)
    if found.state != status.COMPLETED or found.status is None or (found.status.progress.step or 0) < _STEPS:
        raise Broken(f"the next life ended {found.state}: {found.reason}")
    record = runs.read(stage.home, RUN)
    if (record.wanted, record.outcome, runs.names(stage.home)) != (runs.WANTED_RUNNING, status.COMPLETED, [RUN]):
        raise Broken(f"run.json says {record.wanted}, {record.outcome}; the runs are {runs.names(stage.home)}")
    if paths.config.read_text("utf-8") != opening.to_yaml(record.config):
        raise Broken("config.yml is not the run's configuration")
    torn = [line for line in paths.events.read_text("utf-8").splitlines() if not _is_json(line)]
    if len(torn) > 1:
        raise Broken(f"more than the one line that was being written is torn: {torn}")
    left = [path for path in stage.home.root.rglob("*") if files.is_temporary(path) or path in requests.pending(stage.home)]
    if left:
        raise Broken(f"{left[0].relative_to(stage.home.root)} is left over")
    if max(opening.committed_steps(paths.checkpoints)) < before:
        raise Broken("it went back")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Scene:
    """A kind of life: what it begins with, what it is called for, and what it is asked."""

    verbs: tuple[str, ...] = ()
    called_for: str = "start"
    after_a_kill: bool = False


SCENES = {
    "asked": Scene(("pause", "resume", "save", "stop")),
    "finishing": Scene(),
    "stop recorded": Scene(called_for="stop", after_a_kill=True),
}


def campaign(folder: Path, name: str, every: int) -> tuple[int, int]:
    """(points, points reached)."""
    scene, seen_file = SCENES[name], folder / f"{name}.operations"
    script = {"steps": 10**6} if scene.verbs else {}

    def stage() -> Stage:
        shutil.rmtree(folder / "home", ignore_errors=True)
        made = Stage(folder / "home")
        if scene.after_a_kill:
            made.live([], WatchingSupervisor(None, ("rename", "training_status.json", 3), "after"))
            made.everybody_leaves()
        return made

    recorded = stage().live(list(scene.verbs), WatchingSupervisor(seen_file), scene.called_for, **script)
    if recorded.code != 0:
        raise SystemExit(f"{name}: an undisturbed life ended {recorded.code}: {status.read(Home(folder / 'home'))}")
    points: list[tuple[Point, str]] = points_of(seen_file)[every // 2 :: every]
    reached = 0
    for point, when in points:
        here = stage()
        found = here.live(list(scene.verbs), WatchingSupervisor(None, point, when), scene.called_for, **script)
        reached += found.code == -signal.SIGKILL
        try:
            here.everybody_leaves()
            if scene.called_for == "start":
                look(here, found)
            goes_on(here, found.step)
        except Exception as broken:
            raise SystemExit(f"{name}, {when} {point}: {type(broken).__name__}: {broken}") from None
    return len(points), reached


def main() -> None:
    folder, every = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["TRAINERD_STATE"] = str(folder / "state")
    print(json.dumps({name: campaign(folder / name, name, every) for name in sys.argv[3:] or SCENES}))


if __name__ == "__main__":
    main()
