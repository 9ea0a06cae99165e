"""Numbers that are given twice, starts and stops that cross, a stop at every phase, readers against the writer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.supervised import RUN, Daemon, alive, starts, wait_for
from trainerd.contract import files, lock, requests, runs, status
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="namespaces and signals; tests/windows has its own")
ROOT = Path(__file__).resolve().parents[1]
LONG = {"steps": 100_000, "every": 1000, "pause": 0.01}
SHORT_AND_LONG = [pytest.param(0, id="short"), pytest.param(1, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


def test_a_stranger_with_the_number_of_ours_is_left_alone(home: Home) -> None:
    """In a PID namespace every dead trainer's and supervisor's number is given to a stranger at once: nobody touches it."""
    inside = ["unshare", *(["-r"] if os.getuid() else []), "-pf", "--mount-proc"]
    can = subprocess.run([*inside, "sh", "-c", "echo 100 > /proc/sys/kernel/ns_last_pid"], capture_output=True, check=False)
    if can.returncode != 0:
        pytest.skip(f"no PID namespace of our own here: {can.stderr.decode().strip()}")
    command = [*inside, sys.executable, "-m", "tests.pid_reuse", str(home.root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


PHASES = {
    "starting": {"slow_start": 60},
    "preparing": {"prepare": 100_000},
    "training": LONG,
    "evaluating": {**LONG, "phase": "evaluating"},
    "checkpointing": {**LONG, "every": 3, "phase": "checkpointing", "save_seconds": 0.3},
    "exporting": {**LONG, "phase": "exporting"},
    "recovering": {"do": "exit-first"},
    "waiting": LONG,
    "paused": LONG,
}


@pytest.mark.parametrize("now", [False, True], ids=["save", "now"])
@pytest.mark.parametrize("phase", list(PHASES))
def test_stop_in_every_phase(home: Home, phase: str, now: bool) -> None:
    """Whatever it is doing, `stop` ends everything within seconds: no process, no lock, `stopped`, and no run that is still wanted."""
    left_over = FileLock(home.trainer_lock)
    if phase == "waiting":
        assert left_over.acquire()
    with Daemon(home, PHASES[phase]) as daemon:
        if phase in ("recovering", "waiting"):
            reading = daemon.until_state(phase)
        elif phase == "paused":
            daemon.until_step(2)
            daemon.ask("pause")
            reading = daemon.until_state(phase)
        else:
            reading = daemon.until(lambda r: r.status and r.status.phase and r.status.phase.name == phase)
        daemon.ask("stop", now=now)
        assert daemon.process.wait(60) == 0
        assert reading.status is not None
        assert not alive(reading.status.trainer.pid or 0)
        ended, record = daemon.reading(), runs.read(home, RUN)
        assert (ended.state, ended.alive, record.wanted, record.outcome) == (status.STOPPED, False, "stopped", "stopped")
        left_over.release()
        assert not lock.is_held(home.trainer_lock)


@pytest.mark.parametrize("long", SHORT_AND_LONG)
def test_starts_and_stops_that_cross(home: Home, long: int) -> None:
    """Two starts at once and a stop at any moment after: one of them runs or none, never two; nothing is left, nothing is stuck."""
    chance = random.Random(5)
    for number in range(200 if long else 6):
        one = Daemon(home, LONG, resume=number > 0)
        other = Daemon(home, LONG, resume=True)
        time.sleep(chance.random() * 0.8)
        both = (one, other)
        deadline = time.monotonic() + 30
        while any(daemon.process.poll() is None for daemon in both):
            assert time.monotonic() < deadline, [daemon.errors.read_text("utf-8") for daemon in both]
            for daemon in both:
                requests.send(home, requests.Request("stop", daemon.instance, {"now": chance.random() < 0.5}))
            time.sleep(0.1)
        codes = sorted(daemon.process.returncode for daemon in both)
        # 4: the second one came first and there was no run yet to go on with. Both may win, one after the other.
        assert codes in ([0, 5], [0, 0]) or (number == 0 and codes in ([0, 4], [4, 5])), (number, codes)
        wait_for(lambda: not lock.is_held(home.trainer_lock), 10, "the trainer to leave")
        assert not lock.is_held(home.supervisor_lock)
        for daemon in both:
            daemon.errors.unlink()
        for path in requests.pending(home):
            path.unlink()
        assert number > 0 or runs.names(home), "nothing was started"
        reading = status.read(home)
        assert reading.state in (status.STOPPED, status.NEVER_STARTED), (number, reading)
    pids = [pid for _, pid, _ in starts(home)]
    assert not any(map(alive, pids))


_READER = """
import sys
from pathlib import Path
from trainerd.contract import files, status
from trainerd.contract.paths import Home
home, wanted, wrong, steps = Home(Path(sys.argv[1])), int(sys.argv[2]), 0, set()
for _ in range(wanted):
    try:
        steps.add(status.from_dict(files.read_json(home.status, "The status")).progress.step)
    except Exception as error:
        wrong += 1
        print(repr(error), file=sys.stderr)
print(wrong, len(steps))
"""


@pytest.mark.parametrize("long", SHORT_AND_LONG)
def test_eight_readers_against_the_writer(home: Home, long: int) -> None:
    """10^5 readings (2,000 in short) by eight processes while the status is written as fast as it goes: not one is torn."""
    document = json.loads((ROOT / "tests" / "data" / "status_schema1.json").read_text("utf-8"))
    shown = status.from_dict(document)
    status.write(home, shown)
    each = 12_500 if long else 250
    command = [sys.executable, "-c", _READER, str(home.root), str(each)]
    readers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    step = 0
    while any(reader.poll() is None for reader in readers):
        step += 1
        shown.progress.step, shown.reason = step, "x" * (step * 7 % 3000)
        status.write(home, shown)
    results = [reader.communicate() for reader in readers]
    assert [out.split()[0] for out, _ in results] == ["0"] * 8, results
    assert sum(int(out.split()[1]) for out, _ in results) > 8 and step > 100
    assert not [path for path in home.root.iterdir() if files.is_temporary(path)]
