"""DeepSpeed's configuration (ds_config.json): what a person's own may say, what is taken from ours, and the whole of it.

"auto" is a value wherever ours decides. A number that contradicts ours is refused, both named: two files that say different things
about one batch are a mistake of which one cannot know the right half. Must not import DeepSpeed; what it lacks is said by whoever asks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainerd.config.model import RunConfig
from trainerd.config.nearest import nearest
from trainerd.contract.errors import ConfigError

OFFLOAD = "zero2"
OLDEST, BELOW = (0, 19, 8), (0, 20)
"""The versions whose state a step that is broken off can be taken out of (engine/zero2.py)."""
INSTALL = "pip install 'trainerd[deepspeed]'"
AUTO = "auto"
_MAX_BYTES = 1 << 20
_STAGE = 2
_OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
_BUCKET_NUMBERS = 5_000_000
"""In place of DeepSpeed's 500,000,000: its buffer is allocated whole, 2 GB in float32."""
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_FREE = ("steps_per_print", "log_level", "memory_breakdown", "comms_logger")
_FREE_ZERO = {
    "allgather_partitions": None,
    "allgather_bucket_size": _BUCKET_NUMBERS,
    "overlap_comm": False,
    "reduce_scatter": None,
    "reduce_bucket_size": _BUCKET_NUMBERS,
    "contiguous_gradients": None,
}
"""What of zero_optimization is a matter of speed, and what "auto" means; None: DeepSpeed's own default."""


def read(path: Path) -> dict[str, Any]:
    """A person's own ds_config.json. Raises ConfigError in words; FileNotFoundError is for whoever asks to word."""
    where = f"memory.deepspeed_config = {path}"
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError([f"{where}: cannot be read: {error.strerror or error}."]) from None
    if len(content) > _MAX_BYTES:
        raise ConfigError([f"{where}: is larger than {_MAX_BYTES:,} bytes; is it the right one?"])
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ConfigError([f"{where}: is not JSON: {error}."]) from None
    if not isinstance(document, dict):
        raise ConfigError([f"{where}: holds no object; it begins with {{."])
    return document


def missing(version: str | None) -> str | None:
    """Why it cannot run here, with what to do; `version` is the installed one, None: none is."""
    said = f"memory.offload = {OFFLOAD}: "
    instead = "or set memory.offload=optimizer, which needs no package and less RAM"
    if sys.platform != "linux":
        return f"{said}DeepSpeed runs on Linux only; set memory.offload=optimizer, which runs everywhere and needs less RAM."
    if version is None:
        return f"{said}needs DeepSpeed, which is not installed; {INSTALL}, {instead}."
    if not _numbers(version) >= OLDEST or not _numbers(version) < BELOW:
        wanted = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, BELOW))}"
        return f"{said}knows DeepSpeed {wanted}, and {version} is installed; {INSTALL}, {instead}."
    return None


def problems(config: RunConfig, document: Mapping[str, Any] | None = None) -> list[str]:
    """What does not go together, in words: in our configuration, and between it and a person's own ds_config.json."""
    if config.memory.offload != OFFLOAD:
        if config.memory.deepspeed_config is None:
            return []
        said = f"memory.deepspeed_config = {config.memory.deepspeed_config}: is read with memory.offload={OFFLOAD} only, and memory.offload"
        return [f"{said} is {config.memory.offload}."]
    found = []
    if config.train.optimizer not in _OPTIMIZERS:
        why = (
            "it knows rows and columns, and DeepSpeed lays all weights into one line"
            if config.train.optimizer == "adafactor"
            else ("its small state stays on the device")
        )
        choose = f"choose {', '.join(_OPTIMIZERS)}, or another memory.offload"
        found.append(f"memory.offload = {OFFLOAD}: train.optimizer = {config.train.optimizer} cannot be offloaded: {why}; {choose}.")
    if config.train.compile:
        found.append(f"memory.offload = {OFFLOAD}: train.compile is on, and DeepSpeed moves the weights; turn it off.")
    return found + (_contradictions(config, document) if document is not None else [])


def whole(config: RunConfig, micro_batch: int, document: Mapping[str, Any] | None, *, on_gpu: bool) -> dict[str, Any]:
    """What DeepSpeed is given, no value left open: a person's own where it is free, ours everywhere else."""
    own = dict(document or {})
    zero = own.get("zero_optimization", {})
    pins = zero.get("offload_optimizer", {}).get("pin_memory", AUTO)
    batch = config.train.batch_size
    made: dict[str, Any] = {"train_batch_size": batch}
    if batch % micro_batch == 0:  # it knows no uneven pieces; ours are told to it one by one
        made |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": batch // micro_batch}
    made["gradient_clipping"] = config.train.max_grad_norm or 0.0  # its own default is to clip at 1
    made["zero_optimization"] = {
        "stage": _STAGE,
        "offload_optimizer": {"device": "cpu", "pin_memory": on_gpu if pins == AUTO else pins},
        **{name: value for name, value in _FREE_ZERO.items() if value is not None},
        **{name: zero[name] for name in _FREE_ZERO if zero.get(name, AUTO) != AUTO},
    }
    made |= {"fp16": {"enabled": False}, "bf16": {"enabled": False}}  # weights and gradients stay in float32; autocast is ours
    made |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}  # torch's own: as fast, and nothing to compile
    made["log_level"] = "error"
    return made | {name: own[name] for name in _FREE if own.get(name, AUTO) != AUTO}


def buffers(config: RunConfig, *, on_gpu: bool) -> dict[str, Any]:
    """What its zero_optimization will say: how large its buffers are, and where. A person's own that is not there says nothing."""
    try:
        own = read(Path(config.memory.deepspeed_config)) if config.memory.deepspeed_config is not None else None
    except FileNotFoundError:
        own = None
    zero: dict[str, Any] = whole(config, 1, own, on_gpu=on_gpu)["zero_optimization"]
    return zero


def _contradictions(config: RunConfig, document: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    train = config.train
    micro = train.micro_batch
    pieces = train.batch_size // micro if isinstance(micro, int) and train.batch_size % micro == 0 else AUTO
    ours: dict[str, tuple[str, Any]] = {
        "train_batch_size": ("train.batch_size", train.batch_size),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", micro),
        "gradient_accumulation_steps": ("train.batch_size / train.micro_batch", pieces),
        "gradient_clipping": ("train.max_grad_norm", train.max_grad_norm or 0.0),
        "zero_allow_untested_optimizer": ("fixed", True),
        "zero_force_ds_cpu_optimizer": ("fixed (torch's own optimizer is as fast, and nothing is compiled)", False),
    }
    known = [*ours, *_FREE, "zero_optimization", "fp16", "bf16", "torch_autocast", "optimizer", "scheduler"]
    for key, value in document.items():
        if key in ours:
            found += _compared(key, value, *ours[key])
        elif key in ("fp16", "bf16", "torch_autocast"):
            fixed = f"fixed (train.precision is {train.precision}: weights stay in float32, and autocast and scaler are ours)"
            found += _compared(f"{key}.enabled", _part(value, "enabled", False), fixed, False)
        elif key == "optimizer":
            found += _of_optimizer(config, value)
        elif key == "scheduler":
            found += [] if value == AUTO else [f"{_THEIRS} scheduler: the learning rate is train.scheduler = {train.scheduler}; leave out."]
        elif key == "zero_optimization":
            found += _of_zero(value)
        elif key not in _FREE:
            found.append(_unknown(key, key, known))
    return found


_THEIRS = "memory.deepspeed_config:"


def _of_zero(section: Any) -> list[str]:
    if not isinstance(section, Mapping):
        return [f"{_THEIRS} zero_optimization = {section!r}: must be an object."]
    found: list[str] = []
    for key, value in section.items():
        name = f"zero_optimization.{key}"
        if key == "stage":
            found += _compared(name, value, f"memory.offload ({OFFLOAD})", _STAGE)
        elif key == "offload_optimizer":
            if not isinstance(value, Mapping):
                found.append(f"{_THEIRS} {name} = {value!r}: must be an object.")
                continue
            found += _compared(f"{name}.device", value.get("device", AUTO), f"memory.offload ({OFFLOAD})", "cpu")
            found += [_unknown(f"{name}.{one}", one, ["device", "pin_memory"]) for one in value if one not in ("device", "pin_memory")]
        elif key not in _FREE_ZERO:
            found.append(_unknown(name, key, ["stage", "offload_optimizer", *_FREE_ZERO]))
    return found


def _of_optimizer(config: RunConfig, section: Any) -> list[str]:
    """Its type and its numbers, as far as they are there: those of torch's defaults, and ours."""
    if section == AUTO:
        return []
    wanted = _OPTIMIZERS.get(config.train.optimizer, config.train.optimizer)
    found = _compared("optimizer.type", _part(section, "type", AUTO), "train.optimizer", wanted)
    ours: dict[str, tuple[str, Any]] = {
        "lr": ("train.lr", config.train.lr),
        "weight_decay": ("train.weight_decay", config.train.weight_decay),
    }
    if config.train.optimizer in ("adamw", "adam"):
        ours |= {"betas": ("fixed", [0.9, 0.999]), "eps": ("fixed", 1e-8)}
    for key, value in (_part(section, "params", {}) or {}).items():
        name = f"optimizer.params.{key}"
        found += _compared(name, value, *ours[key]) if key in ours else [_unknown(name, key, ours)]
    return found


def _part(section: Any, key: str, default: Any) -> Any:
    return section.get(key, default) if isinstance(section, Mapping) else section


def _compared(key: str, value: Any, name: str, ours: Any) -> list[str]:
    if value == AUTO or (value == ours and isinstance(value, bool) == isinstance(ours, bool)):
        return []
    if name.startswith("fixed"):
        return [f'{_THEIRS} {key} = {json.dumps(value)}, and it is {json.dumps(ours)} here, {name}; write "auto" there.']
    return [f'{_THEIRS} {key} = {json.dumps(value)}, and {name} = {ours}; write "auto" there, or make them the same.']


def _unknown(full: str, key: str, known: Any) -> str:
    close = nearest(key, known)
    return f"{_THEIRS} {full}: is not supported here; leave it out" + (f" (did you mean {close}?)." if close is not None else ".")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of 0.19.8+cu128."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)
