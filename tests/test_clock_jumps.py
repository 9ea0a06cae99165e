"""The wall clock jumps by a day, ahead and back, under a real supervisor and a real trainer: nobody is killed, nothing waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.supervised import RUN, Daemon, journal, start_arguments, starts, trainer_command
from trainerd.config.model import RunConfig
from trainerd.contract import interpreter, requests, runs, status
from trainerd.contract.paths import Home
from trainerd.engine.loop import Link
from trainerd.engine.selftest import oracle, small_run
from trainerd.engine.selftest.small_task import Small
from trainerd.engine.trainer import Trainer
from trainerd.supervisor import logs
from trainerd.supervisor.loop import Timing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends processes by signals")
DAY_SECONDS = 86_400.0
TASK = Path(__file__).parent / "campaigns" / "unhurried_task.py"
OTHER_CLOCK = str(Path(__file__).with_name("other_clock.py"))


class Jumping(Daemon):
    """A supervisor, and its trainers, by a clock that the test sets."""

    def __init__(self, home: Home, trainer: list[str], **arguments: Any) -> None:
        self.home, self.instance = home, uuid.uuid4().hex
        self._clock = home.root / "clock"
        self.jumps(0)
        request = requests.Request("start", self.instance, start_arguments(**arguments))
        requests.send(home, request)
        words = ["--home", str(home.root), "--instance", self.instance, "--request", request.id]
        command = self._by_it("trainerd.supervisor", *words, "--trainer-command", json.dumps(self._by_it(*trainer)))
        self.errors = home.root / "errors.txt"
        with open(self.errors, "wb") as errors:
            environment = interpreter.environment({**os.environ, "OMP_NUM_THREADS": "1"})
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment, start_new_session=True
            )

    def _by_it(self, *words: str) -> list[str]:
        return [sys.executable, OTHER_CLOCK, str(self._clock), *words]

    def jumps(self, seconds: float) -> None:
        """The clock is so far ahead of the system's from now on."""
        new = self._clock.with_name("clock.new")
        new.write_text(str(seconds), encoding="ascii")
        new.replace(self._clock)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    root = tmp_path / "home"
    root.mkdir()
    yield Home(root)


def checkpoint(reading: status.Reading) -> status.Checkpoint:
    assert reading.status is not None and reading.status.checkpoint is not None
    return reading.status.checkpoint


def test_a_day_ahead_and_a_day_back_while_it_trains(home: Home) -> None:
    """The real engine: saves go on after each jump, nothing is restarted, the status stays fresh; and after a kill the next trainer,
    which finds checkpoints of tomorrow, goes on at once, saves, and ends with the same bits."""
    config = small_run.config(3, epochs=200).model_dump(mode="json") | {"task": f"{TASK}:Unhurried"}
    config["train"]["eval_every_steps"] = 600  # each takes more than a second
    config["checkpoint"]["exact"] = False  # by what a save costs and when the last one was: the schedule that looks at times
    config["checkpoint"]["every_steps"] = 10
    with Jumping(home, ["trainerd.engine"], config=config, task_file=str(TASK)) as daemon:

        def saved_after(step: int, such: Callable[[status.Reading], bool] = lambda reading: True) -> status.Reading:
            return daemon.until(lambda r: r.status and r.status.checkpoint and r.status.checkpoint.step > step and such(r), 90)

        reading = saved_after(0)
        assert reading.status is not None
        pid = reading.status.trainer.pid
        for seconds in (DAY_SECONDS, -DAY_SECONDS, DAY_SECONDS):
            daemon.jumps(seconds)
            before = checkpoint(reading)
            reading = saved_after(before.step + 10)
            assert abs(checkpoint(reading).at - time.time() - seconds) < 600, "it does not go by the clock that jumps"
            assert (reading.state, reading.status and reading.status.trainer.pid) == (status.RUNNING, pid), reading
        daemon.jumps(-DAY_SECONDS)
        assert pid is not None
        os.kill(pid, 9)
        killed_at, before = time.monotonic(), checkpoint(daemon.reading())
        daemon.until(lambda r: r.status is not None and r.status.trainer.pid not in (pid, None), 5)
        assert time.monotonic() - killed_at < 20, "it waited for the clock"
        saved_after(before.step + 10)
        assert daemon.process.wait(120) == 0
    kinds = [line["kind"] for line in journal(home)]
    assert (kinds.count("trainer started"), kinds.count("death"), kinds.count("hang"), kinds.count("slept")) == (2, 1, 0, 0)
    whole = RunConfig.model_validate(runs.read(home, RUN).config)
    assert Trainer(Small(), whole, home=home.root.with_name("whole"), run=RUN, link=Link()).train().outcome == "finished"
    here, there = (oracle.outcome(Home(root).run(RUN)) for root in (home.root, home.root.with_name("whole")))
    here.files = there.files  # what was killed saves at steps of its own
    here.compare(there)


def test_a_clock_that_is_set_back_does_not_take_the_new_log(home: Home) -> None:
    """Twenty logs of tomorrow: the one of today is kept, although it is the oldest by the clock, and one of the others goes."""
    home.logs.mkdir(parents=True)
    for number in range(logs.KEEP_LOGS):
        path = home.logs / f"training_20991231_0000{number:02}.log"
        path.touch()
        os.utime(path, (time.time() + DAY_SECONDS + number,) * 2)
    new, log = logs.open_new(home)
    log.close()
    left = {path.name for path in home.logs.iterdir()}
    assert new.name in left and len(left) == logs.KEEP_LOGS and "training_20991231_000000.log" not in left


def test_a_wait_between_deaths_is_none_of_the_clocks(home: Home) -> None:
    """A trainer that dies again and again, the clock jumping by a day at every one of its deaths: 0, 1, 2, 4 seconds, and then the end."""
    with Jumping(home, trainer_command({"do": "exit-first"})[1:]) as daemon:
        for number in range(1, 5):
            daemon.until(lambda r, so_far=number: len(starts(home)) >= so_far, 20)  # type: ignore[misc]
            daemon.jumps(DAY_SECONDS * (-1) ** number)
        assert daemon.process.wait(60) == 4
    assert Timing().backoff_seconds == 1.0
    gaps = [later - before for before, later in pairwise(at for at, _, _ in starts(home))]
    assert len(gaps) == 4 and all(wanted <= gap < wanted + 1.5 for gap, wanted in zip(gaps, (0, 1, 2, 4), strict=True)), gaps
