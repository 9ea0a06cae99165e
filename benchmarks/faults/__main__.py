"""How fast faults are found and mended, and whether one is seen where there is none. Linux. Each part prints one line.

    python -m benchmarks.faults deaths   --count 200     SIGKILL of a trainer -> the status shows another one
    python -m benchmarks.faults restart  --count 10      the same with the real engine -> its first new step, beside `import torch`
    python -m benchmarks.faults hangs    --count 10      real trainings that hang in five ways -> found, restarted, finished
    python -m benchmarks.faults alarms   --count 20      what only looks like a hang -> nobody is killed

Must not be run beside other work: the deadlines are real.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faults import restart as restarts
from tests.hangs import HANGS, hang_once
from tests.supervised import Daemon, journal
from trainerd.contract import status
from trainerd.contract.paths import Home
from trainerd.contract.status import Reading

_LONG = {"steps": 10**7, "every": 5, "pause": 0.005}
_LIMIT_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*_PARTS])
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a killed supervisor's trainer may still be leaving
        os.environ.update(TRAINERD_STATE=str(Path(folder) / "state"), CUDA_VISIBLE_DEVICES="")
        return _PARTS[options.part](Path(folder), options.count)


def deaths(folder: Path, count: int) -> int:
    """From SIGKILL to the dead trainer gone from the status, and to a new trainer in it; each after new progress."""
    noticed, replaced = [], []
    home = _home(folder / "home")
    with Daemon(home, _LONG) as daemon:
        reading = daemon.until_step(6)
        for _ in range(count):
            pid, step = _pid(reading), _step(reading)
            reading = daemon.until(lambda r, least=step + 6: _step(r) > least)  # type: ignore[misc]
            time.sleep(random.uniform(0, 0.05))
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            _until(home, lambda r, gone=pid: _pid(r) != gone)  # type: ignore[misc]
            noticed.append(time.monotonic() - began)
            reading = _until(home, lambda r, gone=pid: _pid(r) not in (gone, 0))  # type: ignore[misc]
            replaced.append(time.monotonic() - began)
    print(f"{count} deaths: noticed in the status {_spread(noticed)}; a new trainer process {_spread(replaced)}")
    return 0 if _at(noticed, 0.99) <= 1.0 else 1


def restart(folder: Path, count: int) -> int:
    """From SIGKILL of a real trainer to the first step nobody had done, beside what importing torch costs a fresh process."""
    imports = restarts.imports(count)
    seconds, parts = restarts.restarts(folder, count)
    imports += restarts.imports(count)
    mean = sum(imports) / len(imports)
    over = [total - mean for total in seconds]
    print(f"{count} restarts: to the first new step {_spread(seconds)}; beyond the mean import {_spread(over)}")
    for name, values in zip((*restarts.PHASES, "to the first new step"), zip(*parts, strict=True), strict=True):
        print(f"  {name}: {_spread(values)}")
    print(f"import torch, accelerate: {_spread(imports)}")
    return 0 if max(over) <= 2.0 else 1


def hangs(folder: Path, count: int) -> int:
    """Every way to hang, so often; all must be found within the limit and a tick or two, and end completed."""
    wrong = 0
    for way in HANGS:
        found = [hang_once(folder / f"{way}-{number}", way, _LIMIT_SECONDS) for number in range(count)]
        good = [f for f in found if f.result == status.COMPLETED and f.stack]
        wrong += count - len(good)
        late = _spread([f.silent_seconds - f.limit_seconds for f in found])
        gone = _spread([f.restart_seconds for f in found])
        print(f"hang by {way}: {len(good)} of {count} found, stack kept, completed", flush=True)
        print(f"  beyond the limit {late}; then until it was gone {gone}", flush=True)
    return 1 if wrong else 0


def alarms(folder: Path, count: int) -> int:
    """What is slow, stopped, starved or suspended, with a limit of two seconds: no hang may be seen."""
    seen = 0
    for name, scenario in _ALARMS.items():
        killed = 0
        for number in range(count):
            home = _home(folder / f"{name}-{number}")
            scenario(home)
            killed += sum(event["kind"] in ("hang", "death") for event in journal(home))
        seen += killed
        print(f"{name}: {count} times, {killed} false kills", flush=True)
    return 1 if seen else 0


def _slow_step(home: Home) -> None:
    """One step 160 times as slow as the others, close below the limit."""
    with _trained(home, {**_LONG, "at": 20, "do": "slow:1.6"}) as daemon:
        daemon.until_step(40)


def _slow_save(home: Home) -> None:
    """A save of twice the limit of a step."""
    with _trained(home, {**_LONG, "every": 20, "save_seconds": 2 * _LIMIT_SECONDS}) as daemon:
        daemon.until_step(25)


def _short_stop(home: Home) -> None:
    """SIGSTOP of the trainer, and SIGCONT before the limit."""
    with _trained(home, _LONG) as daemon:
        _stopped(daemon, 0.75 * _LIMIT_SECONDS, trainer=True)


def _stopped_supervisor(home: Home) -> None:
    with _trained(home, _LONG) as daemon:
        _stopped(daemon, 1.5 * _LIMIT_SECONDS, supervisor=True)


def _suspended(home: Home) -> None:
    """Everything stands still for longer than the limit: a laptop's lid."""
    with _trained(home, _LONG) as daemon:
        _stopped(daemon, 1.5 * _LIMIT_SECONDS, supervisor=True, trainer=True)


def _starved(home: Home) -> None:
    """An idle-priority trainer whose only processor is taken by others for several times the limit."""
    processor = str(max(os.sched_getaffinity(0)))
    with _trained(home, {**_LONG, "polite": True}) as daemon:
        pid = _pid(daemon.until_step(6))
        subprocess.run(["taskset", "-a", "-p", "-c", processor, str(pid)], check=True, stdout=subprocess.DEVNULL)
        words = ["taskset", "-c", processor, sys.executable, "-c", "while True: pass"]
        others = [subprocess.Popen(words, start_new_session=True) for _ in range(8)]
        try:
            time.sleep(4 * _LIMIT_SECONDS)
        finally:
            for other in others:
                other.kill()
                other.wait()
        daemon.until_step(_step(daemon.reading()) + 20)


def _stopped(daemon: Daemon, seconds: float, *, supervisor: bool = False, trainer: bool = False) -> None:
    reading = daemon.until_step(20)
    pids = [daemon.process.pid] * supervisor + [_pid(reading)] * trainer
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    daemon.until_step(_step(daemon.reading()) + 50)


def _trained(home: Home, script: dict[str, object]) -> Daemon:
    faults = {"hang": _LIMIT_SECONDS, "hang_limits": {"checkpointing": 60}}
    return Daemon(home, script, config={"task": "fake", "seed": 1, "faults": faults})


def _home(root: Path) -> Home:
    root.mkdir(parents=True)
    return Home(root)


def _until(home: Home, condition: Callable[[Reading], bool], seconds: float = 15.0) -> Reading:
    deadline = time.monotonic() + seconds
    while not condition(reading := status.read(home)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{reading}")
        time.sleep(0.002)
    return reading


def _pid(reading: Reading) -> int:
    return (reading.status.trainer.pid if reading.status else None) or 0


def _step(reading: Reading) -> int:
    return (reading.status.progress.step if reading.status else None) or 0


def _at(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _spread(values: Sequence[float]) -> str:
    return f"p50 {_at(values, 0.5):.3f} s, p99 {_at(values, 0.99):.3f} s, most {max(values):.3f} s"


_PARTS: dict[str, Callable[[Path, int], int]] = {"deaths": deaths, "restart": restart, "hangs": hangs, "alarms": alarms}
_ALARMS: dict[str, Callable[[Home], None]] = {
    "a slow step": _slow_step,
    "a slow save": _slow_save,
    "stopped for less than the limit": _short_stop,
    "a stopped supervisor": _stopped_supervisor,
    "a suspended machine": _suspended,
    "starved at idle priority": _starved,
}

if __name__ == "__main__":
    sys.exit(main())
