"""Runs in a PID namespace of its own (tests/test_races.py): strangers get the very PIDs of dead trainers and supervisors.

`python -m tests.pid_reuse HOME`; ends with 0 when no stranger was harmed and nobody took one for ours.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.person import Person
from tests.supervised import Daemon, wait_for
from trainerd.contract import lock, status
from trainerd.contract.paths import Home
from trainerd.machine.process_group import ProcessGroup

_LAST = Path("/proc/sys/kernel/ns_last_pid")
LONG = {"steps": 100_000, "every": 5, "pause": 0.01}


def stranger(pid: int) -> subprocess.Popen[bytes]:
    """A process with this very number, a group leader as a trainer would be."""
    for _ in range(1000):
        _LAST.write_text(str(pid - 1), encoding="ascii")
        made = subprocess.Popen(["sleep", "600"], start_new_session=True)
        if made.pid == pid:
            return made
        made.kill()
        made.wait()
    raise AssertionError(f"the number {pid} could not be had")


def unharmed(who: subprocess.Popen[bytes]) -> bool:
    time.sleep(0.05)  # a signal takes a moment to end somebody
    return who.poll() is None and os.getpriority(os.PRIO_PROCESS, who.pid) == 0


def dead_trainers(home: Home) -> None:
    """A trainer is killed and its number is a stranger's before the supervisor looks: restart, pause, resume and stop spare it."""
    with Daemon(home, *[LONG] * 9) as daemon:
        strangers = []
        for _ in range(3):
            reading = daemon.until_step(3)
            pid = reading.status.trainer.pid if reading.status else None
            assert pid
            os.kill(daemon.process.pid, signal.SIGSTOP)  # it will only learn of the death when the number is somebody else's
            os.kill(pid, signal.SIGKILL)
            os.kill(daemon.process.pid, signal.SIGCONT)
            wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 10, "the trainer to be reaped")  # type: ignore[misc]
            strangers.append(stranger(pid))
            daemon.until(lambda r, pid=pid: r.state == status.RUNNING and r.status and r.status.trainer.pid not in (None, pid))
        daemon.ask("pause")
        daemon.until_state(status.PAUSED)
        daemon.ask("resume")
        daemon.until_step(3)
        daemon.ask("stop", now=True)
        assert daemon.process.wait(60) == 0
        assert all(map(unharmed, strangers)), [who.poll() for who in strangers]
        for who in strangers:
            who.kill()
            who.wait()


def reaped_groups(home: Home) -> None:
    """A group whose leader was reaped, and whose number is a stranger's: killing or hurrying it touches nobody."""
    with open(home.root / "log", "ab") as log:
        group = ProcessGroup(["true"], environment=dict(os.environ), folder=home.root, log=log)
    group.wait()
    who = stranger(group.pid)
    group.kill()
    group.with_pid(lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 5))
    assert unharmed(who)
    group.close()
    who.kill()
    who.wait()


def dead_supervisors(home: Home) -> None:
    """A supervisor is killed and its number is a stranger's: it reads as crashed, nothing is asked of it, the next start goes on."""
    with Daemon(home, LONG, resume=True) as daemon:
        reading = daemon.until_step(8)
        pid = daemon.process.pid
        assert reading.status is not None
        daemon.process.kill()
        daemon.process.wait(60)
        wait_for(lambda: not lock.is_held(home.trainer_lock), 10, "the trainer to leave")
        who = stranger(pid)
        trainer = reading.status.trainer.pid or 0
        os.waitpid(trainer, 0)  # an orphan is the first process's to reap, and that is us
        with_old = stranger(trainer)
        assert status.read(home).state == status.CRASHED
        person = Person(home.root)
        assert person.types("status").returncode == 4 and person.types("stop").returncode == 0
        with Daemon(home, {"steps": 20, "pause": 0.001}, resume=True, run="fake-1") as second:
            assert second.process.wait(60) == 0
        assert unharmed(who) and unharmed(with_old)
        for each in (who, with_old):
            each.kill()
            each.wait()


def main() -> int:
    home = Home(Path(sys.argv[1]))
    reaped_groups(home)
    dead_trainers(home)
    dead_supervisors(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
