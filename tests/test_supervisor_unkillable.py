"""A trainer that cannot be killed, as one stuck in a driver: nobody waits for it without end, and the status says what stands."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.freezer import Freezer, state_of
from tests.supervised import QUICK, RUN, alive, journal, start_arguments, starts, trainer_command, wait_for
from trainerd.contract import requests, runs, status
from trainerd.contract.paths import Home
from trainerd.contract.status import Status
from trainerd.supervisor import opening
from trainerd.supervisor.loop import Supervisor
from trainerd.supervisor.trainer import TrainerProcess

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and /proc")
HANGS = {"steps": 100_000, "every": 5, "pause": 0.01, "at": 12, "do": "hang"}
BRIEF = replace(QUICK, unkillable_seconds=0.4)
WORDS = "cannot be killed: it is stuck in a driver or on a disk"


class Stuck:
    """Makes a trainer one that no signal ends: frozen by the kernel, or, where there is no freezer, its kills are lost on the way."""

    def __init__(self, freezer: Freezer | None) -> None:
        self._freezer = freezer
        self._lost: list[TrainerProcess] = []

    def hold(self, pid: int) -> None:
        if self._freezer is not None:
            self._freezer.freeze(pid)
            wait_for(lambda: state_of(pid) == "D", 10, "the trainer to stand in the kernel")

    def lose(self, trainer: TrainerProcess) -> None:
        """In the place of TrainerProcess.kill."""
        self._lost.append(trainer)

    def let_go(self) -> None:
        """The driver answers again: what was killed dies."""
        if self._freezer is not None:
            self._freezer.thaw()
        for trainer in self._lost:
            trainer._group.kill()

    def close(self) -> None:
        self.let_go()
        if self._freezer is not None:
            self._freezer.close()


@pytest.fixture(params=["frozen", "kills are lost"])
def stuck(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    found = Stuck(Freezer() if request.param == "frozen" else None)
    if request.param != "frozen":
        monkeypatch.setattr(TrainerProcess, "kill", lambda trainer: found.lose(trainer))
    yield found
    found.close()


class Watched:
    """A supervisor in a thread of this process, so that its lengths of time can be short, and its client."""

    def __init__(self, root: Path, *scripts: dict[str, Any], **arguments: Any) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.home = Home(root)
        start = opening.open_run(self.home, start_arguments(**arguments))
        self.supervisor = Supervisor(self.home, uuid.uuid4().hex, start, command=trainer_command(*scripts), timing=BRIEF)
        self.thread = threading.Thread(target=self.supervisor.run, daemon=True)
        self.thread.start()

    def until(self, condition: Callable[[Status], object], what: str) -> Status:
        found: list[Status] = []

        def look() -> bool:
            shown = status.read(self.home).status
            found[:] = [shown] if shown is not None else []
            return bool(found and condition(found[0]))

        try:
            wait_for(look, 15, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; last: {found}") from None
        return found[0]

    def hangs(self) -> int:
        """The trainer's process, once it gives no sign of life any more."""
        pid = self.until(lambda shown: shown.progress.step == 12 and shown.trainer.pid, "step 12").trainer.pid
        assert pid is not None
        return pid

    def says(self, *words: str) -> Status:
        return self.until(lambda shown: all(word in shown.reason for word in words), f"the words {words}")

    def ask(self, verb: str, **arguments: Any) -> None:
        requests.send(self.home, requests.Request(verb, self.supervisor.instance, arguments))

    def ended(self) -> Status:
        self.thread.join(10)
        assert not self.thread.is_alive(), f"it still waits: {status.read(self.home).status}"
        return self.until(lambda shown: shown.state in status.END_STATES, "an end")

    def bury(self) -> None:
        """What was left standing can die now: wait for it, and give its pipes back."""
        left = self.supervisor.trainer
        if left is not None:
            wait_for(lambda: left.exit_code is not None, 10, "the trainer to die at last")
            left.drain()


def noted(home: Home) -> list[str]:
    return [str(line["why"]) for line in journal(home) if line["kind"] == "cannot be killed"]


def test_stop_does_not_wait_for_it(tmp_path: Path, stuck: Stuck) -> None:
    """stop ends within its limit and the unkillable one's; the status says what stands, the run is stopped, and later it goes on."""
    watched = Watched(tmp_path / "home", HANGS)
    pid = watched.hangs()
    stuck.hold(pid)
    began = time.monotonic()
    watched.ask("stop", timeout_seconds=0.5)
    ended = watched.ended()
    assert time.monotonic() - began < 0.5 + BRIEF.unkillable_seconds + 10.0
    assert (ended.state, ended.trainer.pid, ended.phase) == (status.STOPPED, pid, None) and alive(pid)
    assert (
        ended.reason
        == f"Stopped at step 10, but the trainer (process {pid}) {WORDS}; a reboot ends it. Then `resume` goes on from the last checkpoint."
    )
    record = runs.read(watched.home, RUN)
    assert (record.wanted, record.outcome, noted(watched.home)) == ("stopped", "stopped", ["stop"])
    another = Watched(tmp_path / "home", {"steps": 20, "pause": 0.001}, resume=True, config=None)
    another.until(lambda shown: shown.state == status.WAITING and "still leaving" in shown.reason, "a wait for the one that is stuck")
    stuck.let_go()
    assert another.ended().state == status.COMPLETED
    watched.bury()


def test_a_stop_after_a_pause_does_not_begin_to_wait_anew(tmp_path: Path, stuck: Stuck) -> None:
    """pause says that it cannot, and keeps its supervisor at work; stop then ends at once; a trainer that dies after all is paused."""
    watched = Watched(tmp_path / "first", HANGS)
    pid = watched.hangs()
    stuck.hold(pid)
    watched.ask("pause", timeout_seconds=0.5)
    shown = watched.says("The training is paused as soon as its trainer is gone", f"(process {pid}) {WORDS}", "`stop` does not wait")
    assert (shown.state, runs.read(watched.home, RUN).wanted) == (status.RUNNING, "paused")
    watched.until(lambda later: later.updated_monotonic > shown.updated_monotonic + 2 * BRIEF.unkillable_seconds, "a supervisor at work")
    assert noted(watched.home) == ["pause"], "said more than once"
    watched.ask("stop", timeout_seconds=60)
    assert WORDS in watched.ended().reason
    stuck.let_go()
    watched.bury()


@pytest.mark.parametrize("verb", ["pause", "resume"])
def test_the_pause_and_the_resume_come_about_when_the_driver_answers(tmp_path: Path, stuck: Stuck, verb: str) -> None:
    """The stuck trainer dies at last: what was asked last comes about, and there was never a second one beside it."""
    watched = Watched(tmp_path / "home", HANGS, {"steps": 20, "pause": 0.001})
    pid = watched.hangs()
    stuck.hold(pid)
    watched.ask("pause", timeout_seconds=0.3)
    watched.says("is paused as soon as", WORDS)
    if verb == "resume":
        watched.ask("resume")
        assert watched.says("is started again as soon as", WORDS).state == status.RECOVERING
        assert len(starts(watched.home)) == 1
        stuck.let_go()
        assert watched.ended().state == status.COMPLETED
        return
    stuck.let_go()
    paused = watched.until(lambda shown: shown.state == status.PAUSED, "the pause")
    assert WORDS not in paused.reason and paused.trainer.pid is None
    watched.ask("stop")
    assert watched.ended().state == status.STOPPED


def test_a_hang_that_nothing_ends_is_not_doubled(tmp_path: Path, stuck: Stuck) -> None:
    """It hangs and cannot be killed: `recovering` with the reason, no second trainer beside it; when it dies at last, it goes on."""
    faults = {"task": "fake", "seed": 1, "faults": {"hang": 1}}
    watched = Watched(tmp_path / "home", HANGS, {"steps": 20, "pause": 0.001}, config=faults)
    pid = watched.hangs()
    stuck.hold(pid)
    shown = watched.says("is started again as soon as its trainer is gone", f"(process {pid}) {WORDS}")
    assert (shown.state, len(starts(watched.home))) == (status.RECOVERING, 1)
    watched.ask("save")
    refused = watched.until(lambda later: any(answer.verb == "save" for answer in later.requests), "an answer")
    assert refused.requests[-1].outcome.startswith("refused")
    stuck.let_go()
    assert watched.ended().state == status.COMPLETED
    assert [before for _, _, before in starts(watched.home)] == ["None", "None"] and noted(watched.home) == ["hang"]


def test_a_finished_one_that_wedges_on_its_way_out_is_complete(tmp_path: Path, stuck: Stuck) -> None:
    """The result is on disk and said; the process cannot be ended: completed, with what is left standing."""
    watched = Watched(tmp_path / "home", {"steps": 12, "pause": 0.01, "wedge": 600})
    pid = watched.hangs()
    watched.until(lambda shown: watched.supervisor.leaving is not None, "the end of the training")
    stuck.hold(pid)
    ended = watched.ended()
    assert ended.state == status.COMPLETED
    assert ended.reason == f"Completed. The model is in models/{RUN}. But the trainer (process {pid}) {WORDS}; a reboot ends it."
    assert runs.read(watched.home, RUN).outcome == "completed"
    stuck.let_go()
    watched.bury()
