"""Speaks the trainer's side of the pipes without torch, and dies in chosen ways. Must not import the engine.

`python fake_trainer.py SCRIPT… --home H --run R [--before-step N]`. A script is a JSON object; the n-th start of a run uses
the n-th script (the last one again and again):

    {"steps": 20, "every": 5, "pause": 0.01,   train that many steps, a checkpoint every so often
     "polite": true, "save_bytes": 50000000,   steps back like the real one, writes as much
     "at": 7 (or "start"), "do": "exit:1" | "signal:9" | "raise:text" | "hang" | "lock" | "slow:2" | "permanent" | "deaf" | ...}
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import mmap
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

if sys.platform != "win32":
    import resource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainerd.contract import clock, wire
from trainerd.contract.lock import FileLock
from trainerd.contract.paths import Home
from trainerd.machine import priority


class FakeTrainer:
    """Counts steps, writes manifests, obeys."""

    def __init__(self, home: Home, run: str, script: dict[str, object], before_step: int | None) -> None:
        self.home, self.paths, self.script = home, home.run(run), script
        self.commands: queue.SimpleQueue[dict[str, object]] = queue.SimpleQueue()
        self.events = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        self.step = self.load(before_step)
        self.total = int(str(script.get("steps", 20)))

    def send(self, event: str, **fields: object) -> None:
        message = {"event": event, "at": clock.wall(), "monotonic": clock.monotonic(), **fields}
        try:
            self.events.write(wire.encode(message))
        except OSError:
            pass

    def listen(self) -> None:
        rest = b""
        while content := os.read(0, 4096):  # not sys.stdin: a thread that reads it cannot be ended with the process
            *lines, rest = (rest + content).split(b"\n")
            for message in filter(None, map(wire.decode, lines)):
                self.commands.put(message)
        self.commands.put({"do": wire.LEAVE, "why": "eof", "save": True})

    def load(self, before_step: int | None) -> int:
        steps = [int(path.stem.rpartition("_")[2]) for path in self.paths.checkpoints.glob("checkpoint_epoch_*.json")]
        return max((step for step in steps if before_step is None or step < before_step), default=0)

    def save(self, request: object = None) -> None:
        self.send(wire.BEAT, phase="checkpointing", save=None)
        time.sleep(float(str(self.script.get("save_seconds", 0))))
        if self.script.get("do") == "unsaved":
            error = f"The checkpoint at step {self.step} could not be saved: No space left on device."
            self.send(wire.UNSAVED, since=clock.wall(), missing_bytes=1, error=error, request=request)
            return
        folder = self.paths.checkpoints
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"checkpoint_epoch_1_step_{self.step}"
        content = os.urandom(int(str(self.script.get("save_bytes", 5))))
        hashlib.sha256(content).digest()
        with open(folder / f"{stem}.pt", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        manifest = {"epoch": 1, "step": self.step, "at": clock.wall(), "bytes": 5, "seconds": 0.01}
        (folder / f"{stem}.json").write_text(json.dumps(manifest), encoding="utf-8")
        path = f"checkpoints/{self.paths.name}/{stem}.pt"
        self.send(wire.CHECKPOINT, path=path, request=request, **manifest)
        self.send(wire.BEAT, phase="training", save=None)

    def obey(self) -> None:
        while not self.commands.empty():
            command = self.commands.get()
            if self.script.get("do") == "deaf":
                continue
            if command["do"] == wire.SAVE:
                self.save(command.get("id"))
            elif command["do"] == wire.LEAVE:
                if command.get("save") and self.step:
                    self.save()
                sys.exit(wire.EXIT_LEFT)

    def run(self) -> int:
        lock = FileLock(self.home.trainer_lock)
        while not lock.acquire(0.1):
            self.send(wire.WAITING, reason="A trainer of this home is still leaving.")
            self.obey()
        self.send(wire.CHECKED)
        for done in range(int(str(self.script.get("prepare", 0)))):
            self.send(wire.PHASE, name="preparing", done=done, total=self.script["prepare"], unit="rows")
            time.sleep(0.01)
            self.obey()
        if self.script.get("at") == "start":
            self.do()
        self.send(wire.PHASE, name=str(self.script.get("phase", "training")))
        plan = self.script.get("plan")
        more = plan if isinstance(plan, dict) else {}
        self.send(wire.PLAN, device=str(self.script.get("device", "cpu")), threads=1, record={"threads": 1, **more})
        while self.step < self.total:
            self.act()
            self.obey()
            if "print_bytes" in self.script:
                print(f"{'x' * int(str(self.script['print_bytes']))}\n{self.step}", flush=True)
            self.step += 1
            self.send(wire.BEAT, phase="training", save=None)
            self.send(wire.PROGRESS, epoch=1, epochs=3, step=self.step, total_steps=self.total, loss=self.loss(), eta_seconds=1.0)
            if self.step % int(str(self.script.get("every", 5))) == 0:
                self.save()
            time.sleep(float(str(self.script.get("pause", 0.01))))
        self.paths.model.mkdir(parents=True, exist_ok=True)
        self.paths.result.write_text("{}", encoding="utf-8")
        self.send(wire.FINISHED)
        time.sleep(float(str(self.script.get("wedge", 0))))
        return wire.EXIT_FINISHED

    def loss(self) -> float:
        return float("nan") if self.script.get("do") == "nan" else 1.0 / self.step

    def act(self) -> None:
        if self.step == self.script.get("at", 0):
            self.do()

    def do(self) -> None:
        what, _, value = str(self.script.get("do", "")).partition(":")
        if what in _SPECIAL:
            _SPECIAL[what](self, value)
        elif what == "exit":
            os._exit(int(value))
        elif what == "signal":
            os.kill(os.getpid(), int(value))
        elif what == "raise":
            self.send(wire.EXCEPTION, type="ValueError", text=value, permanent=False)
            raise ValueError(value)
        elif what == "permanent":
            self.send(wire.EXCEPTION, type="ConfigError", text=value, permanent=True)
            os._exit(wire.EXIT_PERMANENT)
        elif what == "crash-silently":
            raise RuntimeError(value)
        elif what == "grandchild":
            # It holds the event pipe open, as a forked loader worker would.
            words, null = [sys.executable, "-c", "import time; time.sleep(600)"], subprocess.DEVNULL
            child = subprocess.Popen(words, stdin=null, stdout=self.events, stderr=null)
            (self.home.root / "grandchild.pid").write_text(str(child.pid), encoding="ascii")
            self.script["do"] = value
            self.do()
        elif what == "flood":
            for number in range(20_000):
                self.send(wire.PROGRESS, epoch=1, epochs=3, step=number)
        elif what == "spoil":
            (self.home.root / value).write_text("a file in place of a folder", encoding="utf-8")
            os._exit(1)
        elif what == "warn":
            self.send(wire.WARNING, text=value)


def lock_up(trainer: FakeTrainer, value: str) -> None:
    """Hold the interpreter's lock for ages: no other thread runs meanwhile."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def no_number(trainer: FakeTrainer, value: str) -> None:
    step = trainer.step + 1
    trainer.send(wire.NAN, step=step, epoch=1, what="the loss", samples=[3, 17], num_samples=2, policy="rollback")
    trainer.send(wire.EXCEPTION, type="NotFinite", text=f"The loss is not a finite number at step {step}.", permanent=False)
    os._exit(1)


def no_room(trainer: FakeTrainer, value: str) -> None:
    trainer.send(wire.NO_ROOM, resource="ram", reason="RAM is short", own_bytes=10**9, ceiling_bytes=14 * 10**9)
    trainer.save()
    os._exit(wire.EXIT_NO_ROOM)


def storm(trainer: FakeTrainer, value: str) -> None:
    """So many seconds, `value`, in which every page has to come from the disk first, as when the machine is out of memory: the kernel is
    asked to forget a file's pages again and again. `storm.txt` tells how many came from there."""
    path, size = trainer.home.root / "storm.bin", 64 << 20
    path.write_bytes(os.urandom(size))
    began, until = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, time.monotonic() + float(value)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        os.fsync(file.fileno())
        mapped.madvise(mmap.MADV_RANDOM)  # no page is read ahead
        while time.monotonic() < until:
            mapped.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for place in range(0, size, 1 << 16):
                mapped[place]
    came = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - began
    (trainer.home.root / "storm.txt").write_text(str(came), encoding="ascii")


_SPECIAL = {
    "storm": storm,
    "no-room": no_room,
    "hang": lambda trainer, value: time.sleep(600),
    "slow": lambda trainer, value: time.sleep(float(value)),
    "lock": lock_up,
    "not-finite": no_number,
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("scripts", nargs="+")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--before-step", type=int)
    options = parser.parse_args()
    home = Home(options.home)
    starts = home.run(options.run).folder / "starts.txt"
    with open(starts, "a", encoding="utf-8") as file:
        file.write(f"{time.monotonic()} {os.getpid()} {options.before_step}\n")
    number = len(starts.read_text(encoding="utf-8").splitlines())
    script = json.loads(options.scripts[min(number, len(options.scripts)) - 1])
    if script.get("do") == "exit-first":
        print("Traceback (most recent call last):\nImportError: no module named nonsense", file=sys.stderr)
        return 1
    if script.get("polite"):
        priority.lower_self(priority.IDLE)
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR1)
    time.sleep(float(script.get("slow_start", 0)))
    trainer = FakeTrainer(home, options.run, script, options.before_step)
    trainer.send(wire.HELLO, pid=os.getpid())
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=trainer.listen, daemon=True).start()
    return trainer.run()


if __name__ == "__main__":
    sys.exit(main())
