"""How a trainer is started: command, environment, priority, log. Must not decide when."""

from __future__ import annotations

from collections.abc import Mapping

from trainerd.contract import ground, interpreter
from trainerd.contract.paths import Home
from trainerd.contract.runs import RunRecord
from trainerd.machine import gpu, memory, priority
from trainerd.memory import heap
from trainerd.supervisor import logs
from trainerd.supervisor.aftermath import result_stamp
from trainerd.supervisor.trainer import Inbox, TrainerProcess


class Starter:
    """Starts the trainers of one supervisor, one after another. `command` stands in for the engine in tests."""

    def __init__(self, home: Home, instance: str, command: list[str] | None) -> None:
        self.can_wrap = True
        self._home, self._instance = home, instance
        self._command = command or interpreter.command("trainerd.engine")
        self._starts = 0

    def start(self, record: RunRecord, before_step: int | None, inbox: Inbox) -> TrainerProcess:
        """A new trainer process for a run. Raises OSError, and Refused when the home is not fit for one."""
        ground.check(self._home, record.id)
        self._starts += 1
        command = [*self._command, "--home", str(self._home.root), "--run", record.id]
        if before_step is not None:
            command += ["--before-step", str(before_step)]
        plain = command
        if self.can_wrap:
            level = str((record.config.get("polite") or {}).get("priority", priority.IDLE))
            command = priority.wrap(command, level, f"{self._instance[:8]}-{self._starts}")
        ours = command == plain
        stamp, kills = result_stamp(self._home, record.id), memory.kills(in_our_group=ours)
        log = logs.open_new(self._home)
        with log[1]:
            started = TrainerProcess(command, environment(record), self._home, log, inbox)
        started.result_before, started.kills_before, started.is_our_group = stamp, kills, ours
        return started


def environment(record: RunRecord) -> dict[str, str]:
    """The trainer's environment: what must be set before torch is imported, and what must not differ between two starts."""
    settings = {
        **interpreter.environment(),
        "PYTHONUTF8": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a segmentation fault leaves its stack in the log
        "PYTHONHASHSEED": str(int(record.config.get("seed") or 0)),  # sets of words keep their order over a restart
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning at barriers takes the person's core and is slower than one thread
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the driver's numbers are torch's numbers
    }
    settings = heap.beginning(settings, on_cpu=_trains_on_cpu(record, settings))
    if (record.config.get("train") or {}).get("deterministic", "auto") is not False:
        settings.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return settings


def _trains_on_cpu(record: RunRecord, settings: Mapping[str, str]) -> bool:
    """As far as it can be known before the trainer has looked."""
    device = (record.plan or {}).get("device")
    return device == "cpu" if device else not gpu.may_be_used(settings)
