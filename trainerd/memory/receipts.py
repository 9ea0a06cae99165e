"""What earlier runs really needed beside what was foretold, and what that says about the next estimate. Must not measure.

The engine writes runs/<run>/receipt.json; here they are read. Only receipts of the same model kind, device, torch and kind of
setup count: corrections do not travel between models, and what bf16 needs beyond its tensors fp32 does not show. With the task's settings
they count in full; those of other settings (a narrow model, asked about a wide one) only where there are none of these: they move the
likely value a little and narrow no bound. A run that needed many times what was foretold corrects nothing, for it was not understood;
but the bound is never below it.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainerd.contract import files, runs
from trainerd.contract.errors import Unreadable
from trainerd.contract.paths import Home, RunPaths
from trainerd.memory.timeline import Setup

FILE = "receipt.json"
TRACE = "trace.json"
MEASURES = ("allocated_bytes", "reserved_bytes", "driver_bytes", "ram_bytes", "seconds_per_step")
_DOUBT = 1.0  # as if so many runs had agreed with the estimate
_MOST = 2.0  # a correction beyond its square says that something else was measured, or that the estimate does not know what is there
_ABSURD = 1000.0
_SPREAD = 0.05  # what one run more may lie beyond those seen
_READ_MOST = 50


@dataclass(frozen=True)
class Correction:
    """Real over foretold, for one measure: what to multiply the point by, and the most that was seen."""

    factor: float = 1.0
    most: float = 1.0
    num_runs: int = 0
    seen: float = 1.0
    """The most without what is put on top for the next one."""
    beyond: float = 0.0
    """What a run needed that no correction explains: how many times what was foretold; 0: there was none."""
    num_beyond: int = 0
    beyond_bytes: float = 0.0
    """How much more than foretold such a run needed: the bound is so far above the point, at least."""
    apart: tuple[tuple[float, float], ...] = ()
    """Of runs with other settings, in place of the factor: how many times what was foretold each needed, and how many bytes more. Which of
    the two it will be at another size nobody knows."""
    because: str = ""
    """In what the newest of those differed."""

    def moved(self, point: float) -> float:
        """The likely value, corrected: by other settings' runs by the bytes or by the share, whichever is less."""
        if not self.apart:
            return point * self.factor
        steps = [min(point * (ratio - 1), excess, key=abs) for ratio, excess in self.apart]
        return point + statistics.median(steps) * len(steps) / (len(steps) + _DOUBT)

    def highest(self, point: float) -> float:
        """What a run like the one that needed most would need: of other settings by the bytes or by the share, whichever is more."""
        if not self.apart:
            return point * max(self.most, self.factor)
        return point + max(max(point * (ratio - 1), excess) * (1 + _SPREAD) for ratio, excess in self.apart)


@dataclass(frozen=True)
class Model:
    """What is asked about: the task's settings as they were said, its code, and how what it needs grows with a micro-batch's samples."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    degree: int = 1


@dataclass(frozen=True)
class Trust:
    """The corrections by measure, from runs of one kind of setup (`of_setup`, in words); `num_others` of the same model had another."""

    corrections: Mapping[str, Correction]
    of_setup: str = ""
    num_others: int = 0

    def of(self, measure: str) -> Correction:
        return self.corrections.get(measure, Correction())

    def words(self, measure: str) -> str:
        """How far the estimate of this measure can be trusted: how many receipts count, and for what."""
        found, kind = self.of(measure), f" ({self.of_setup})" if self.of_setup else ""
        others = f"; {_runs(self.num_others)} with another setup: not counted" if self.num_others else ""
        beyond = ""
        if found.num_beyond:
            ran = "one run here needed" if found.num_beyond == 1 else f"{found.num_beyond} runs here needed up to"
            beyond = f"{ran} {found.beyond:.1f} times what was foretold: something is in it that the estimate does not know"
        if not found.num_runs:
            said = f"{beyond}{kind}" if beyond else f"no run has been measured here yet of this kind{kind}"
            return f"{said}{others}"
        if found.apart:
            least, most = (pick(ratio for ratio, _ in found.apart) for pick in (min, max))
            needed = f"needed {least:.2f} of what was foretold" if found.num_runs == 1 else f"needed {least:.2f} to {most:.2f} of it"
            said = f"no run like this has been measured here yet{kind}; {_runs(found.num_runs)} with {found.because} {needed}: "
            said += "the likely value follows by the less of bytes and share, and the bound is no narrower for it"
            return f"{beyond}; {said}{others}" if beyond else f"{said}{others}"
        needed = f"which needed up to {found.seen:.2f} of what was foretold"
        said = f"corrected by {found.factor:.2f} after {_runs(found.num_runs)} of this kind{kind}, {needed}"
        return f"{beyond}; {said}{others}" if beyond else f"{said}{others}"


def _runs(number: int) -> str:
    return f"{number} earlier run{'s' if number != 1 else ''}"


NOTHING = Trust({})


def read(home: Home) -> list[dict[str, Any]]:
    """The readable receipts of a home, the newest runs' first."""
    found: list[dict[str, Any]] = []
    for name in reversed(runs.names(home)[-_READ_MOST:]):
        try:
            found.append(files.read_json(home.run(name).folder / FILE, "A receipt"))
        except (OSError, Unreadable):
            continue  # a run that never trained has none
    return found


def note_trace(paths: RunPaths, facts: Mapping[str, Any]) -> None:
    """What of a model was traced at the start of its run, before anything else is known of it: it may be refused, or killed."""
    try:
        files.write_json(paths.folder / TRACE, {"schema": files.SCHEMA, **facts})
    except OSError:
        pass  # a full disk: the receipt says it at the end


def trace_of(paths: RunPaths) -> Mapping[str, Any]:
    """The same, from the note or the receipt; nothing where there is neither."""
    for name in (TRACE, FILE):
        try:
            return files.read_json(paths.folder / name, "What was traced")
        except (OSError, Unreadable):
            continue
    return {}


def edited(noted: Mapping[str, Any]) -> str:
    """The first file the traced task's code came from, beside its own, that is not as it was, or is there now and was not; "" when all
    are as they were."""
    sources = noted.get("sources")
    for path, digest in sources.items() if isinstance(sources, Mapping) else ():
        try:
            now = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except FileNotFoundError:
            now = ""
        except (OSError, ValueError):
            return str(path)
        if now != digest:
            return str(path)
    return ""


def setup_kind(setup: Setup) -> dict[str, Any]:
    """What of a setup decides which of torch's kernels and which states there are, and how they are allocated. A micro-batch only
    makes them larger. torch's own allocator is not named: a receipt of an earlier trainerd means that one."""
    kind = {
        "precision": setup.precision,
        "optimizer": setup.optimizer,
        "offload": setup.offload,
        "checkpointing": setup.checkpointing,
        "logits": setup.logits,
        "attention": setup.attention,
        "compiled": setup.compiled,
    }
    named = {"allocator": setup.allocator, "heap": setup.heap}
    return kind | {name: value for name, value in named.items() if value}


_USUAL = {
    "offload": "none",
    "checkpointing": "none",
    "logits": "chunked",
    "attention": "auto",
    "compiled": False,
    "allocator": "",
    "heap": "kept",
}


def _in_words(kind: Mapping[str, Any]) -> str:
    """Precision and optimizer always, the rest where it is not the usual."""
    unusual = [f"{name} {value}" for name, value in kind.items() if name in _USUAL and value != _USUAL[name]]
    return ", ".join([str(kind["precision"]), str(kind["optimizer"]), *unusual]).replace("compiled True", "compiled")


def trust(
    receipts: Iterable[Mapping[str, Any]], kind: str, device: str, torch: str | None, setup: Setup, model: Model | None = None
) -> Trust:
    """What the receipts of this model, machine and kind of setup say. One that does not tell its setup is of no use."""
    model = model or Model()
    alike = [r for r in receipts if r.get("kind") == kind and r.get("device") == device and (torch is None or r.get("torch") == torch)]
    wanted = setup_kind(setup)
    counted = [receipt for receipt in alike if receipt.get("setup") == wanted and not receipt.get("mixed")]
    known = [receipt for receipt in alike if not receipt.get("mixed")]
    corrections = {measure: found for measure in MEASURES if (found := _of_measure(counted, known, measure, setup, model)) is not None}
    far = [receipt for receipt in known if receipt not in counted and any(_beyond(receipt, measure) for measure in MEASURES)]
    return Trust(corrections, _in_words(wanted), len(alike) - len(counted) - len(far))


def _of_measure(
    counted: list[Mapping[str, Any]], known: list[Mapping[str, Any]], measure: str, setup: Setup, model: Model
) -> Correction | None:
    """What is not understood may be in every setup of this model."""
    usual = [receipt for receipt in counted if _is_usual(receipt, measure)]
    above = [receipt for receipt in known if _beyond(receipt, measure)]
    if not usual and not above:
        return None
    unlike = [_unlike(receipt, setup, model) for receipt in usual]
    same = [_ratio(receipt, measure) or 1.0 for receipt, why in zip(usual, unlike, strict=True) if not why]
    found = _correction(same) if same else Correction()
    if usual and not same:
        times = measure == "seconds_per_step"  # a machine that is slower is so by a share
        ratios = [_ratio(receipt, measure) or 1.0 for receipt in usual]
        excess = [math.copysign(math.inf, ratio - 1) if times else _excess(one, measure) for ratio, one in zip(ratios, usual, strict=True)]
        found = Correction(num_runs=len(usual), apart=tuple(zip(ratios, excess, strict=True)), because=unlike[0])
    most = max((_excess(receipt, measure) * _times(receipt, setup, model) for receipt in above), default=0.0) * (1 + _SPREAD)
    highest = max((_ratio(receipt, measure) or 0.0 for receipt in above), default=0.0)
    return replace(found, beyond=highest, num_beyond=len(above), beyond_bytes=most)


def _is_usual(receipt: Mapping[str, Any], measure: str) -> bool:
    """Whether what it was off by can be a correction."""
    ratio = _ratio(receipt, measure)
    if ratio is None or _beyond(receipt, measure):
        return False
    return 1 / _MOST**2 < ratio < _ABSURD or measure == "seconds_per_step"


def _unlike(receipt: Mapping[str, Any], setup: Setup, model: Model) -> str:
    """In what its run differed from what is asked about, beside the setup; "" where it says as much as a run can."""
    settings, defaults = receipt.get("settings"), receipt.get("defaults")
    if not isinstance(settings, Mapping):
        return "settings that it does not tell"
    usual = _flat(defaults) if isinstance(defaults, Mapping) else {}
    then, now = ({**usual, **_flat(some)} for some in (settings, model.settings))
    other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if other:
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        return f"another setting (settings.{other[0]} {then.get(other[0])}, not {now.get(other[0])}{more})"
    if (receipt.get("source") or "") != model.source:
        return "other code of the task"
    if model.degree > 1 and _before(receipt) is not None and setup.micro_batch > (_before(receipt) or 0):
        return f"smaller micro-batches ({_before(receipt)}, not {setup.micro_batch}), and what this model needs does not grow evenly,"
    return ""


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Its leaves by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in section.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return leaves


def _ratio(receipt: Mapping[str, Any], measure: str) -> float | None:
    """Real over foretold without any correction; None when either is missing."""
    real, told = (_number(receipt.get(side), measure) for side in ("real", "predicted"))
    return None if real is None or told is None else real / told


def _beyond(receipt: Mapping[str, Any], measure: str) -> bool:
    return measure != "seconds_per_step" and _MOST**2 <= (_ratio(receipt, measure) or 0.0) < _ABSURD


def _excess(receipt: Mapping[str, Any], measure: str) -> float:
    real, told = (_number(receipt.get(side), measure) or 0.0 for side in ("real", "predicted"))
    return real - told


def _times(receipt: Mapping[str, Any], setup: Setup, model: Model) -> float:
    """Whatever it is, it may be of every sample: more in a larger micro-batch than that run's, as the model's needs grow. In a smaller one
    it may be as much."""
    before = _before(receipt)
    return 1.0 if before is None else max(1.0, setup.micro_batch / before) ** model.degree


def _before(receipt: Mapping[str, Any]) -> int | None:
    """The micro-batch of its run."""
    plan = receipt.get("plan")
    found = plan.get("micro_batch") if isinstance(plan, Mapping) else None
    return found if isinstance(found, int) and found > 0 else None


def _number(side: Any, measure: str) -> float | None:
    value = side.get(measure) if isinstance(side, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None


def _correction(ratios: list[float]) -> Correction:
    """The median, drawn towards 1 while there are few; and the most, with something on top for the next one."""
    middle = statistics.median(math.log(ratio) for ratio in ratios)
    weight = len(ratios) / (len(ratios) + _DOUBT)
    most = max(ratios)
    return Correction(math.exp(middle * weight), most * (1 + _SPREAD / math.sqrt(len(ratios))), len(ratios), most)
