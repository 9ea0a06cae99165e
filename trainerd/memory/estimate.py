"""From a timeline to what a run will need of a machine: points and upper bounds, and what they leave out. Must not choose.

Allocated is what tensors hold, reserved what torch's allocator holds of the device, driver what the device sees of this
process: context included. They differ, so each is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainerd.memory import allocator_settings, disk, heap, pace, receipts
from trainerd.memory.playing import Played, played
from trainerd.memory.profile import Profile
from trainerd.memory.receipts import Trust
from trainerd.memory.tape import GRADIENTS
from trainerd.memory.timeline import Setup, Table, Timeline

_MIB = 1 << 20
_PROCESS, _CONTEXT = "python and torch", "cuda context and workspace"
_DATA, _HOLES = "data and imports", "holes in the heap"
_COMPILED_PRODUCTS, _IDLE, _CORRECTION = "compiled products", "blocks torch's allocator keeps", "correction by earlier runs"
# Without a receipt: a GPU's kernels that were not measured. What kernels' scratch and holes add on a CPU: heap.py.
_GPU_SLACK, _RESERVED_SLACK = 0.08, 0.12
_PROCESS_SLACK_BYTES = 96 * _MIB
# oneDNN keeps compiled bf16 products on a CPU: each shape forwards and twice backwards, for each of some lengths, up to a number
# of shapes that the trainer sets; a shape took 0.4 to 1.9 MiB (docs/log.md).
_SHAPES, _SHAPES_PER_PRODUCT, _SHAPE_BYTES, _SHAPE_MOST = 256, 24, 1 * _MIB, 2
_ENOUGH_RUNS, _KEPT_SLACK = 3, 0.5
_MANIFEST_BYTES = 1 * _MIB

_NOT_MODELLED = {
    "cpu": (
        "scratch space inside kernels: in the upper bound alone, of convolutions (their tensors again) and masks by a rule, else a share",
        "pages of the data file that the system keeps in its cache",
        "loader processes (train.num_workers)",
        "prepared data and logs, on the disk",
    ),
    "cuda": (
        "cuDNN's choice of algorithm and its workspace",
        "loader processes (train.num_workers), and that the batches they leave are pinned",
        "torch.compile, which allocates differently",
        "what other programs will take of the GPU later",
        "prepared data and logs, on the disk",
    ),
}
UNVERIFIED = "the replay of CUDA's allocator and the GPU's tables follow torch's source and have not been compared with a GPU yet"

_BY_CPU = "that a GPU's kernels and autocast keep what those of a CPU keep: the model was traced on the CPU"
_COMPILED = "that torch.compile needs no more than the model without it: what it allocates is not covered by this estimate"

_KEPT = "that large blocks are kept from step to step, which is faster and leaves holes; without room for those they would be given back"


@dataclass(frozen=True)
class Range:
    """The most likely value, and one that will hardly be exceeded."""

    point: float
    upper: float

    def times(self, point: float, upper: float) -> Range:
        return Range(self.point * point, max(self.upper * point, self.point * upper))


@dataclass(frozen=True)
class Estimate:
    """What a run will need. `device_bytes` is compared with the budget: RAM on a CPU, the driver's view on a GPU."""

    setup: Setup
    kind: str
    ram: Range
    pinned: Range
    disk: Range
    tensors: int
    allocated: Range | None
    reserved: Range | None
    driver: Range | None
    seconds_per_step: Range | None
    pace: float
    """Seconds, to compare setups with one another by; rough (pace.py)."""
    breakdown: Mapping[str, int]
    phases: Mapping[str, int]
    num_parameters: int
    num_trainable: int
    trust: str
    assumed: tuple[str, ...] = ()
    not_modelled: tuple[str, ...] = ()
    on_disk_bytes: int = 0
    """Frozen weights that stay in the file they are mapped from."""
    raw: Mapping[str, float] = field(default_factory=dict)
    """The points before any correction, by the receipts' names: what the next receipt is compared with."""

    @property
    def needed(self) -> Range:
        """What counts against the budget."""
        return self.driver if self.driver is not None else self.ram

    @property
    def own_bytes(self) -> int:
        """What the process takes of the device without any model."""
        return self.breakdown.get(_CONTEXT if self.setup.device == "cuda" else _PROCESS, 0)

    def document(self) -> dict[str, Any]:
        """For --json and receipts."""
        return asdict(self)


def estimate(
    table: Table,
    setup: Setup,
    profile: Profile | None = None,
    trust: Trust = receipts.NOTHING,
    *,
    keep: int = 3,
    keep_best: bool = True,
    process_bytes: int = 0,
    replays: bool = True,
) -> Estimate:
    """What a training with this setup needs on a machine with this profile; so many checkpoints are kept. `process_bytes`: what its
    process holds beside the model, where that is known. Without the replay of a GPU's allocator it is what is needed at least, where no
    earlier run corrects it."""
    profile = profile or Profile()
    process_bytes = max(profile.process_bytes, process_bytes, getattr(table, "process_bytes", 0))
    found = played(table, setup, profile.workspace_bytes, replays=replays)
    timeline = found.timeline
    device = _on_gpu(found, profile, trust) if setup.device == "cuda" else _Device(None, None, None, {})
    ram, ram_raw = _ram(timeline, setup, process_bytes, trust)
    seconds, seconds_raw = _seconds(timeline, setup, profile, trust)
    checkpoint = timeline.weight_bytes + timeline.state_bytes + _MANIFEST_BYTES
    measure = "driver_bytes" if setup.device == "cuda" else "ram_bytes"
    left_out = list(_NOT_MODELLED[setup.device])
    if setup.device == "cuda":
        left_out = [UNVERIFIED, *allocator_settings.settings(setup.allocator).left_out, *left_out]
    return Estimate(
        setup=setup,
        kind=table.kind,
        ram=ram,
        pinned=Range(timeline.pinned_bytes, timeline.pinned_bytes),
        disk=Range(
            checkpoint * keep + timeline.weight_bytes,
            disk.need_bytes(disk.number(keep, keep_best), checkpoint, timeline.weight_bytes),
        ),
        tensors=timeline.peak,
        allocated=device.allocated,
        reserved=device.reserved,
        driver=device.driver,
        seconds_per_step=seconds,
        pace=pace.seconds(timeline, setup, profile),
        breakdown=_breakdown(timeline, setup, profile, process_bytes, (device.driver or ram).point, (device.raw or ram_raw)[measure]),
        phases=timeline.peaks,
        num_parameters=timeline.num_parameters,
        num_trainable=timeline.num_trainable,
        trust=trust.words(measure),
        assumed=(*table.assumed, *_assumed(profile, setup, getattr(table, "is_traced", False)), *_from_a_file(timeline)),
        not_modelled=tuple(left_out),
        on_disk_bytes=timeline.on_disk_bytes,
        raw={**device.raw, **ram_raw, **seconds_raw},
    )


def _breakdown(
    timeline: Timeline, setup: Setup, profile: Profile, process_bytes: int, point: float, uncorrected: float
) -> dict[str, int]:
    """What the likely value is made of, to the byte: what earlier runs have corrected is a part of its own, and may be below nothing."""
    parts = dict(timeline.breakdown)
    if setup.device == "cuda":
        parts[_CONTEXT] = profile.context_bytes + profile.workspace_bytes
        parts[_IDLE] = round(uncorrected) - sum(parts.values())
    else:
        bare, compiled = profile.process_bytes, _shapes(timeline, setup)
        parts |= {_PROCESS: bare, _DATA: process_bytes - bare, _HOLES: _holes(timeline, setup)}
        parts |= {_COMPILED_PRODUCTS: compiled} if compiled else {}
    correction = round(point) - sum(parts.values())
    return parts | {_CORRECTION: correction} if correction else parts


@dataclass(frozen=True)
class _Device:
    allocated: Range | None
    reserved: Range | None
    driver: Range | None
    raw: Mapping[str, float]


def _on_gpu(found: Played, profile: Profile, trust: Trust) -> _Device:
    """The three numbers of a GPU: counters of the replayed allocator, and the context on top."""
    timeline, peaks = found.timeline, found.peaks
    beyond = max(0, timeline.resting_bytes + timeline.worst_evaluation_bytes + profile.workspace_bytes - peaks.allocated)
    raw = {
        "allocated_bytes": float(peaks.allocated),
        "reserved_bytes": float(peaks.reserved),
        "driver_bytes": float(peaks.reserved + profile.context_bytes),
    }
    allocated = _ranged(trust, "allocated_bytes", peaks.allocated, (peaks.allocated + beyond) * (1 + _GPU_SLACK))
    reserved = _ranged(trust, "reserved_bytes", peaks.reserved, (peaks.reserved + beyond) * (1 + _RESERVED_SLACK))
    driver = _ranged(trust, "driver_bytes", peaks.reserved + profile.context_bytes, reserved.upper + profile.context_most_bytes)
    return _Device(allocated, reserved, driver, raw)


def _ram(timeline: Timeline, setup: Setup, process_bytes: int, trust: Trust) -> tuple[Range, dict[str, float]]:
    """The trainer's own RAM: its process, and the tensors when the device is the CPU, else what stays on the host."""
    held = timeline.peak if setup.device == "cpu" else timeline.host_bytes + timeline.weight_bytes
    worst = max(held, timeline.resting_bytes + timeline.worst_evaluation_bytes) if setup.device == "cpu" else held
    shapes = _shapes(timeline, setup)
    point = process_bytes + held + _holes(timeline, setup) + shapes
    # What rests is known to the byte, and so are gradients; scratch and holes come with what else comes and goes.
    known = timeline.resting_bytes + (timeline.breakdown.get(GRADIENTS, 0) if worst == held else 0)
    coming = max(0, worst - known)
    how = setup.heap if setup.device == "cpu" else heap.GIVEN_BACK  # a GPU's trainer has a few large blocks in RAM, not a step's many
    holes = heap.MOST[how].of(coming, setup.checkpointing, timeline.largest_bytes)
    upper = process_bytes + _PROCESS_SLACK_BYTES + worst + timeline.scratch_bytes + holes + shapes * _SHAPE_MOST
    return _ranged(trust, "ram_bytes", point, upper), {"ram_bytes": float(point)}


def _shapes(timeline: Timeline, setup: Setup) -> int:
    """What oneDNN keeps compiled, likely."""
    if setup.device != "cpu" or setup.precision == "fp32":
        return 0
    return min(_SHAPES, timeline.num_products * _SHAPES_PER_PRODUCT) * _SHAPE_BYTES


def _holes(timeline: Timeline, setup: Setup) -> int:
    """What a heap that keeps large blocks holds besides, likely."""
    if setup.device != "cpu":
        return 0
    coming = max(0, timeline.peak - timeline.resting_bytes - timeline.breakdown.get(GRADIENTS, 0))
    return int(heap.LIKELY[setup.heap].of(coming, setup.checkpointing))


def _seconds(timeline: Timeline, setup: Setup, profile: Profile, trust: Trust) -> tuple[Range | None, dict[str, float]]:
    """A step's time by measured speeds; none while they are not known."""
    found = pace.shown(timeline, setup, profile)
    if found is None:
        return None, {}
    return _ranged(trust, "seconds_per_step", *found), {"seconds_per_step": found[0]}


def _ranged(trust: Trust, measure: str, point: float, upper: float) -> Range:
    """Corrected by what runs of this kind have needed. From three on their worst stands for half of the general slack; the other
    half stays, for the next run has another batch and other data."""
    found = trust.of(measure)
    least = point + found.beyond_bytes if found.num_beyond else 0.0
    if not found.num_runs:
        return Range(point, max(upper, least))
    corrected, seen = found.moved(point), found.highest(point)
    if found.apart:  # of other settings: nothing is narrower for them
        return Range(corrected, max(upper, seen, corrected + upper - point, least))
    kept = _KEPT_SLACK if found.num_runs >= _ENOUGH_RUNS else 1.0
    return Range(corrected, max(seen, corrected + kept * (upper - point), least))


def _from_a_file(timeline: Timeline) -> list[str]:
    if not timeline.on_disk_bytes:
        return []
    much = f"{timeline.on_disk_bytes / 1e9:.1f} GB of frozen weights"
    return [f"{much} stay in the file the task has mapped, and are read as they are needed: they take no RAM, and the disk's time"]


def _assumed(profile: Profile, setup: Setup, is_traced: bool) -> list[str]:
    return [
        *([_COMPILED] if setup.compiled else []),
        *([f"torch's allocator as {allocator_settings.VARIABLES[0]} asks for it: {setup.allocator}"] if setup.allocator else []),
        *([_BY_CPU] if is_traced and setup.device == "cuda" else []),
        *([_KEPT] if setup.heap == heap.KEPT else []),
        *_unmeasured(profile, setup),
    ]


def _unmeasured(profile: Profile, setup: Setup) -> list[str]:
    if profile.measured:
        if setup.device != "cuda" or profile.device_bytes_per_second:
            return []
        return [f"{pace.DEVICE_BYTES_PER_SECOND / 1e9:.0f} GB/s for the GPU's own memory (its profile is older than that: plan --measure)"]
    if setup.device == "cuda":
        most, point = profile.context_most_bytes // _MIB, profile.context_bytes // _MIB
        return [f"a CUDA context of {point} MiB, at most {most} (not measured on this machine)"]
    return [f"{profile.process_bytes // _MIB} MiB for Python and torch themselves (not measured on this machine)"]
