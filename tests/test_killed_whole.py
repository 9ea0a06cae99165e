"""Supervisor, trainer and all they started end at one instant, by SIGKILL: as those of a session, a unit or a container that is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.scope import Scope
from tests.supervised import RUN, Daemon, alive, wait_for
from trainerd.contract import lock, runs, status
from trainerd.contract.paths import Home
from trainerd.supervisor.opening import committed_steps

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sessions, cgroups, namespaces; tests/windows has its own")
ROOT = Path(__file__).resolve().parents[1]
# A grandchild that holds the pipes and locks nothing: it has to go with them.
LONG = {"steps": 100_000, "every": 5, "pause": 0.01, "at": 7, "do": "grandchild:none"}
FAST = {"steps": 60, "every": 5, "pause": 0.001}


@pytest.fixture
def scope() -> Iterator[Scope]:
    found = Scope()
    yield found
    found.close()


def everybody(daemon: Daemon) -> list[int]:
    supervisor = psutil.Process(daemon.process.pid)
    return [supervisor.pid, *(child.pid for child in supervisor.children(recursive=True))]


def goes_on(home: Home, killed: list[int]) -> None:
    """Everybody is gone, nothing that was acknowledged is lost, readers say crashed, and the next start comes to the end."""
    wait_for(lambda: not any(map(alive, killed)), 5, "the dead to be dead")
    assert not lock.is_held(home.supervisor_lock) and not lock.is_held(home.trainer_lock)
    after = status.read(home)
    assert (after.state, after.alive, runs.read(home, RUN).wanted) == (status.CRASHED, False, "running")
    assert after.status is not None and after.status.checkpoint is not None
    before = committed_steps(home.run(RUN).checkpoints)
    assert before[-1] >= after.status.checkpoint.step
    with Daemon(home, FAST, resume=True, config=None) as daemon:
        assert daemon.process.wait(60) == 0
        ended = daemon.reading()
        assert ended.state == status.COMPLETED and ended.status is not None and ended.status.progress.step == max(60, before[-1])
    assert committed_steps(home.run(RUN).checkpoints)[: len(before)] == before


@pytest.mark.parametrize("times", [2, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_unit_that_is_killed_whole(tmp_path: Path, scope: Scope, times: int) -> None:
    """The kernel ends every process of the cgroup at once: no lock, no process, no lie in the status; then it goes on."""
    for number in range(times):
        home = Home(tmp_path / f"home-{number}")
        home.root.mkdir()
        with Daemon(home, LONG) as daemon:
            daemon.until_step(6 + number % 7)
            wait_for((home.root / "grandchild.pid").exists, 10, "the grandchild")
            scope.take(everybody(daemon))
            killed = everybody(daemon)
            assert len(killed) == 3 and set(scope.members()) >= set(killed)
            scope.kill()
            assert daemon.process.wait(60) == -signal.SIGKILL
        goes_on(home, killed)


def test_a_session_that_is_killed_whole(home: Home) -> None:
    """Every process group is sent SIGKILL, the trainer's first, as at the end of a session that is not waited for."""
    with Daemon(home, LONG) as daemon:
        daemon.until_step(6)
        wait_for((home.root / "grandchild.pid").exists, 10, "the grandchild")
        killed = everybody(daemon)
        for group in sorted({os.getpgid(pid) for pid in killed}, reverse=True):
            os.killpg(group, signal.SIGKILL)
        daemon.process.wait(60)
    goes_on(home, killed)


_INSIDE = """
import os, sys, time
from pathlib import Path
from tests.supervised import Daemon, wait_for
from trainerd.contract.paths import Home
from tests.test_killed_whole import LONG
home = Home(Path(sys.argv[1]))
if os.fork():  # the first process here, which no signal from inside would end; the one that sends it is left out, too
    os.wait()
    sys.exit()
daemon = Daemon(home, LONG)
daemon.until_step(6)
wait_for((home.root / "grandchild.pid").exists, 10, "the grandchild")
os.kill(-1, 9)
"""


def test_kill_minus_one(home: Home) -> None:
    """`kill -9 -1` in a PID namespace: every process there is, at one instant, as at a container's end."""
    inside = ["unshare", *(["-r"] if os.getuid() else []), "-pf", "--kill-child", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no PID namespace of our own here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*inside, sys.executable, "-c", _INSIDE, str(home.root)], env=environment, timeout=60, check=False)
    assert done.returncode == 0, "the first process did not outlive the others"
    wait_for(lambda: not lock.is_held(home.supervisor_lock) and not lock.is_held(home.trainer_lock), 5, "the namespace to be empty")
    goes_on(home, [])
