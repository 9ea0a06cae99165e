"""How much of the machine a person keeps while trainerd trains, and what training keeps when nobody else wants the CPU.

    python -m benchmarks.politeness [--rounds 5] [--seconds 8] [--data FILE]

Three trainings of the default model are started through the client, each in a home of its own, and all but the one being
measured are frozen (SIGSTOP), so that the conditions interleave (A B C D A B C D …) on one machine state:
  alone     nothing trains
  polite    `polite.priority: idle`, default threads: what every person gets
  cgroup    the same, in a cgroup with cpu.idle=1, where this user may make one: what a systemd user scope gives
  rude      `polite.priority: normal`, a thread per core: nice 0, what every other trainer does
The foreground job and the wake-up probe run in sessions of their own, as every terminal tab does. Linux, a C compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CGROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))


def client(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run_optimized_training.py"), "--home", str(home), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def status(home: Path) -> dict:
    return json.loads((home / "training_status.json").read_text("utf-8"))


class Training:
    """One training started as a person would; measured by the steps in its status."""

    def __init__(self, folder: Path, name: str, *words: str) -> None:
        self.name, self.home = name, folder / name
        self.home.mkdir()
        common = ("--epochs", "1000", "--set", "train.eval_every_steps=1000000", "--set", "settings.eval_prefixes=0")
        done = client(self.home, "start", *common, *words)
        if done.returncode != 0:
            raise SystemExit(f"start of {name} failed: {done.stdout}{done.stderr}")
        deadline = time.monotonic() + 240
        while (status(self.home)["progress"]["step"] or 0) < 10:
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} did not reach step 10: {status(self.home)}")
            time.sleep(0.2)
        self.pid = status(self.home)["trainer"]["pid"]
        self.freeze()

    def freeze(self) -> None:
        os.killpg(os.getpgid(self.pid), signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(os.getpgid(self.pid), signal.SIGCONT)

    def steps(self) -> int:
        path = self.home / "runs" / status(self.home)["run"] / "metrics.jsonl"
        with open(path, "rb") as file:
            return sum(b'"loss"' in line for line in file)

    def end(self) -> None:
        self.thaw()
        client(self.home, "stop", "--now")


def own_session(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, start_new_session=True).stdout


@contextlib.contextmanager
def idle_cgroup(pid: int) -> Iterator[bool]:
    """Put a process (with its threads) into a cgroup with cpu.idle=1 for a while; False where this user may not."""
    for top in CGROUPS:
        group = top / f"trainerd-bench-{os.getpid()}"
        home = top / "cgroup.procs"
        try:
            group.mkdir()
            (group / "cpu.idle").write_text("1")
            (group / "cgroup.procs").write_text(str(pid))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield True
        finally:
            home.write_text(str(pid))
            group.rmdir()
        return
    yield False


def compile_probes(folder: Path) -> tuple[str, str]:
    for name in ("wakeup", "foreground"):
        subprocess.run(["cc", "-O2", "-o", str(folder / name), str(HERE / f"{name}.c")], check=True)
    return str(folder / "wakeup"), str(folder / "foreground")


def measure(training: Training | None, seconds: float, probe: str, job: str) -> dict[str, float]:
    """Foreground work, wake-up delays, and steps per second with and without a foreground job."""
    found: dict[str, float] = {}
    if training:
        training.thaw()
        before, since = training.steps(), time.monotonic()
        time.sleep(seconds)
        time.sleep(0.6)  # metrics are written in small batches; the same lag at both ends
        found["steps_alone"] = (training.steps() - before) / (time.monotonic() - since)
    found["work"] = float(own_session(job, str(seconds), "2"))
    _, p50, p95, p99, worst, missed = map(float, own_session(probe, str(seconds)).split())
    found.update(p50=p50, p95=p95, p99=p99, worst=worst, missed=missed)
    if training:
        training.freeze()
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=8.0)
    options.add_argument("--data", help="queries or titles; without it the built-in ones, whose vocabulary is small")
    asked = options.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"alone": [], "polite": [], "cgroup": [], "rude": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TRAINERD_STATE"] = str(folder / "state-a")  # device locks of their own: two trainings on one CPU, on purpose
        probe, job = compile_probes(folder)
        data = ("--data", asked.data) if asked.data else ("--dataset-size", "50000")
        polite = Training(folder, "polite", *data)
        os.environ["TRAINERD_STATE"] = str(folder / "state-b")
        rude = Training(folder, "rude", *data, "--set", "polite.priority=normal", "--set", f"train.threads={os.cpu_count()}")
        try:
            for number in range(asked.rounds):
                rows["alone"].append(measure(None, asked.seconds, probe, job))
                rows["polite"].append(measure(polite, asked.seconds, probe, job))
                with idle_cgroup(polite.pid) as made:
                    if made:
                        rows["cgroup"].append(measure(polite, asked.seconds, probe, job))
                rows["rude"].append(measure(rude, asked.seconds, probe, job))
                print(f"round {number + 1} of {asked.rounds} done", file=sys.stderr, flush=True)
        finally:
            polite.end()
            rude.end()
    report(rows, asked)


def report(rows: dict[str, list[dict[str, float]]], asked: argparse.Namespace) -> None:
    def middle(name: str, key: str) -> float:
        return statistics.median(row[key] for row in rows[name])

    autogroup = Path("/proc/sys/kernel/sched_autogroup_enabled")
    print(f"{time.strftime('%Y-%m-%d')}  {os.cpu_count()} CPUs, Linux {platform.release()}, autogroup "
          f"{autogroup.read_text().strip() if autogroup.exists() else 'absent'}, {asked.rounds} interleaved rounds of {asked.seconds:g} s")
    print("condition | 2-process job keeps | wake p50 / p95 / p99 / worst ms | missed frames | training steps/s, nobody else")
    for name, found in rows.items():
        if not found:
            print(f"{name:9} | not measured: this user may not make a cgroup")
            continue
        kept = statistics.median(row["work"] / base["work"] for row, base in zip(found, rows["alone"], strict=False))
        waits = " / ".join(f"{middle(name, key):.3f}" for key in ("p50", "p95", "p99", "worst"))
        steps = f"{middle(name, 'steps_alone'):.1f}" if "steps_alone" in found[0] else "-"
        print(f"{name:9} | {kept:19.1%} | {waits} | {middle(name, 'missed'):.2f} % | {steps}")
    for name in ("polite", "cgroup"):
        if rows[name]:
            ratio = statistics.median(a["steps_alone"] / b["steps_alone"] for a, b in zip(rows[name], rows["rude"], strict=False))
            print(f"training speed, {name} / rude, nobody else on the CPU: {ratio:.2f}")


if __name__ == "__main__":
    main()
