"""training_status.json, schema 1: its shape, how it is written, and what a reader may conclude from it.

Must not know how the numbers come about, and must not print. Bytes are integers, times UTC epoch seconds, unknown is None.
The supervisor writes, everybody else reads; what is alive is decided by the lock, never by the file.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, TypeVar

from trainerd.contract import clock, files, lock
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home

STARTING, RUNNING, PAUSED, RECOVERING, WAITING, STOPPING = "starting", "running", "paused", "recovering", "waiting", "stopping"
STOPPED, COMPLETED, FAILED = "stopped", "completed", "failed"
LIVE_STATES = (STARTING, RUNNING, PAUSED, RECOVERING, WAITING, STOPPING)
END_STATES = (STOPPED, COMPLETED, FAILED)
# Only a reader concludes these; they are never written.
CRASHED, NOT_ANSWERING, NEVER_STARTED, UNREADABLE = "crashed", "not answering", "never started", "unreadable"

STALE_SECONDS = 5.0
_BEGINNING_SECONDS = 30.0


@dataclass
class SupervisorInfo:
    pid: int
    instance: str
    started_at: float


@dataclass
class TrainerInfo:
    pid: int | None = None
    started_at: float | None = None
    restarts: int = 0
    last_exit: str | None = None


@dataclass
class Phase:
    """What the trainer is in: starting, preparing, training, evaluating, checkpointing, exporting."""

    name: str
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    started_at: float | None = None


@dataclass
class Data:
    rows: int | None = None
    used: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass
class Progress:
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    total_steps: int | None = None
    samples: int | None = None
    loss: float | None = None
    eval: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    lr: float | None = None
    grad_norm: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


@dataclass
class Plan:
    device: str | None = None
    precision: str | None = None
    micro_batch: int | None = None
    grad_accum: int | None = None
    effective_batch: int | None = None
    optimizer: str | None = None
    activation_checkpointing: str | None = None
    offload: str | None = None
    threads: int | None = None


@dataclass
class Exact:
    """Whether the run is still that of an uninterrupted one, bit for bit; if not, since which step and why."""

    now: bool | None = None
    since_step: int | None = None
    because: str | None = None


@dataclass
class Unsaved:
    since: float | None = None
    missing_bytes: int | None = None


@dataclass
class RamUse:
    used_bytes: int | None = None
    limit_bytes: int | None = None
    total_bytes: int | None = None
    trainer_bytes: int | None = None
    """The trainer and all it started, shared pages counted once, pages of files left out; used_bytes is the whole machine's."""


@dataclass
class VramUse:
    used_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    limit_bytes: int | None = None
    total_bytes: int | None = None


@dataclass
class Memory:
    ram: RamUse = field(default_factory=RamUse)
    vram: VramUse = field(default_factory=VramUse)
    predicted_bytes: int | None = None
    cleanups: int = 0
    cleanup_seconds: float = 0.0
    """What they have cost this trainer."""
    oom_recoveries: int = 0


@dataclass
class Gpu:
    name: str | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    utilization_percent: float | None = None


@dataclass
class Power:
    plugged: bool | None = None
    percent: float | None = None


@dataclass
class Checkpoint:
    """The newest acknowledged checkpoint; `path` is relative to the home."""

    path: str
    epoch: int
    step: int
    at: float
    bytes: int
    seconds: float | None = None


@dataclass
class RequestOutcome:
    id: str
    verb: str
    outcome: str
    at: float


@dataclass
class Status:
    """The whole document. `reason` is one sentence for a person."""

    run: str | None = None
    task: str | None = None
    preset: str | None = None
    state: str = STARTING
    reason: str = ""
    home: str = ""
    config: str | None = None
    log: str | None = None
    updated_at: float = 0.0
    updated_monotonic: float = 0.0
    boot_id: str = ""
    supervisor: SupervisorInfo | None = None
    trainer: TrainerInfo = field(default_factory=TrainerInfo)
    phase: Phase | None = None
    data: Data = field(default_factory=Data)
    progress: Progress = field(default_factory=Progress)
    plan: Plan = field(default_factory=Plan)
    exact: Exact = field(default_factory=Exact)
    unsaved: Unsaved = field(default_factory=Unsaved)
    memory: Memory = field(default_factory=Memory)
    gpu: Gpu = field(default_factory=Gpu)
    power: Power = field(default_factory=Power)
    checkpoint: Checkpoint | None = None
    warnings: list[str] = field(default_factory=list)
    requests: list[RequestOutcome] = field(default_factory=list)
    schema: int = files.SCHEMA

    def to_dict(self) -> dict[str, Any]:
        return {"schema": self.schema, **{k: v for k, v in asdict(self).items() if k != "schema"}}


_PARTS: dict[str, type] = {
    "supervisor": SupervisorInfo,
    "trainer": TrainerInfo,
    "phase": Phase,
    "data": Data,
    "progress": Progress,
    "plan": Plan,
    "exact": Exact,
    "unsaved": Unsaved,
    "memory": Memory,
    "ram": RamUse,
    "vram": VramUse,
    "gpu": Gpu,
    "power": Power,
    "checkpoint": Checkpoint,
}

_T = TypeVar("_T")


def from_dict(document: dict[str, Any]) -> Status:
    """The status in a JSON object; unknown keys are ignored. Raises Unreadable when a part has the wrong form."""
    status = _build(Status, document, "the status")
    raw = document.get("requests")
    status.requests = [_build(RequestOutcome, r, "a request") for r in raw if isinstance(r, dict)] if isinstance(raw, list) else []
    if not isinstance(status.state, str) or status.state not in LIVE_STATES + END_STATES:
        raise Unreadable(f"training_status.json names a state this trainerd does not know: {str(status.state)[:40]!r}.", _KEPT_ASIDE)
    for name in ("dropped", "eval", "best"):
        part = status.data if name == "dropped" else status.progress
        if not isinstance(getattr(part, name), dict):
            raise Unreadable(f"training_status.json is damaged: {name!r} is not an object.", _KEPT_ASIDE)
    if isinstance(status.run, str) and any(letter in status.run for letter in "/\\\0"):
        raise Unreadable(f"training_status.json is damaged: no run is called {status.run[:40]!r}.", _KEPT_ASIDE)
    if not isinstance(status.warnings, list):
        raise Unreadable("training_status.json is damaged: 'warnings' is not a list.", _KEPT_ASIDE)
    return status


_KEPT_ASIDE = "The next start keeps it aside and writes a new one."


def _build(kind: type[_T], document: dict[str, Any], where: str) -> _T:
    values: dict[str, Any] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name not in document:
            if entry.default is MISSING and entry.default_factory is MISSING:
                raise Unreadable(f"training_status.json is damaged: {where} has no {entry.name!r}.", _KEPT_ASIDE)
            continue
        value = document[entry.name]
        part = _PARTS.get(entry.name)
        if part is not None and isinstance(value, dict):
            value = _build(part, value, entry.name)
        elif part is not None and not (value is None and entry.default is None):
            raise Unreadable(f"training_status.json is damaged: {entry.name!r} is not an object.", _KEPT_ASIDE)
        elif part is None and not _fits(str(entry.type), value):
            raise Unreadable(f"training_status.json is damaged: {where}.{entry.name} is {str(value)[:40]!r}.", _KEPT_ASIDE)
        values[entry.name] = value
    return kind(**values)


def _fits(declared: str, value: Any) -> bool:
    """Whether a JSON value fits a field declared as text, number or truth value (containers are looked at elsewhere)."""
    if value is None:
        return "None" in declared
    if declared.startswith("str"):
        return isinstance(value, str)
    if declared.startswith("bool"):
        return isinstance(value, bool)
    if declared.startswith(("int", "float")):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return True


def write(home: Home, status: Status) -> None:
    """Stamp the status with the clocks and replace the file. Raises OSError; on Windows gives a busy reader 0.3 s."""
    status.updated_at, status.updated_monotonic, status.boot_id = clock.wall(), clock.monotonic(), clock.boot_id()
    files.write_json(home.status, status.to_dict(), busy_seconds=0.3)


@dataclass
class Reading:
    """What a reader found: the state as it really is, one sentence why, and the document if there is one."""

    state: str
    reason: str
    status: Status | None
    alive: bool
    holder: int | None = None
    """The PID of a supervisor that does not answer, for whoever has to end it by hand."""

    def to_dict(self) -> dict[str, Any]:
        """The document as `status --json` prints it: the file's content with the state a reader may conclude."""
        document = self.status.to_dict() if self.status else {"schema": files.SCHEMA}
        return {**document, "state": self.state, "reason": self.reason, "alive": self.alive}


def written(home: Home) -> Status | None:
    """What the file says, whoever wrote it and however long ago; None when there is none that can be read."""
    try:
        return _file(home)
    except (OSError, Unreadable):
        return None


def _file(home: Home) -> Status:
    return from_dict(files.read_json(home.status, "The status", remedy=_KEPT_ASIDE))


def read(home: Home) -> Reading:
    """The truth about a home, from the status file and the supervisor's lock. Never raises for damage: it says so."""
    try:
        alive = lock.is_held(home.supervisor_lock)
    except Unreadable as error:
        return Reading(UNREADABLE, str(error), None, False)
    try:
        status = _file(home)
    except FileNotFoundError:
        if alive:
            return _just_begun()
        return Reading(NEVER_STARTED, "Nothing has been started in this home yet.", None, False)
    except Unreadable as error:
        return Reading(UNREADABLE, str(error), None, alive)
    except OSError as error:
        return Reading(UNREADABLE, f"{home.status} cannot be read: {error.strerror or error}.", None, alive)
    if not alive:
        return _reading_without_supervisor(status)
    if _is_of_one_before(home, status):
        return _just_begun()
    if status.boot_id == clock.boot_id():
        silent_seconds = clock.monotonic() - status.updated_monotonic
        if silent_seconds > STALE_SECONDS:
            reason = f"The supervisor has not answered for {silent_seconds:.0f} seconds."
            return Reading(NOT_ANSWERING, reason, status, True, lock.holder(home.supervisor_lock))
    return Reading(status.state, status.reason, status, True)


def _just_begun() -> Reading:
    return Reading(STARTING, "The supervisor is starting.", None, True)


def _is_of_one_before(home: Home, status: Status) -> bool:
    """Whether the file was written by a supervisor before the one that has just taken the lock: its numbers are those of a dead one.
    Where that cannot be told for sure, they are believed; one that writes nothing for long is not starting any more."""
    signed = lock.signed(home.supervisor_lock)
    if signed is None or status.supervisor is None or signed[0] == status.supervisor.pid:
        return False
    return status.updated_at < signed[1] and clock.wall() - signed[1] < _BEGINNING_SECONDS


def _reading_without_supervisor(status: Status) -> Reading:
    if status.state in END_STATES:
        return Reading(status.state, status.reason, status, False)
    if status.state == PAUSED:  # nothing ran that could have been lost
        return Reading(PAUSED, f"{status.reason} Its supervisor is gone; `resume` starts one, too.".lstrip(), status, False)
    doing = status.reason or f"it was {status.state}"
    return Reading(CRASHED, f"The supervisor is gone without a word; last known: {doing}", status, False)
