"""From what a person typed and wrote to one RunConfig: task defaults < preset < file < --set and flags.

All problems are reported together, in words, before torch is imported. Must not run a user's task, nor read the data.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from trainerd.config import catalogue, contradictions, deepspeed, yaml12
from trainerd.config.model import RunConfig
from trainerd.config.problems import in_words, no_section
from trainerd.contract import runs
from trainerd.contract.errors import ConfigError, UsageError

_MAX_FILE_BYTES = 128 << 10
_TASK_DEFAULTS = "the task's defaults"


@dataclass(frozen=True)
class Resolved:
    """A configuration, and what of it the person (or the preset chosen) set, as dotted keys."""

    config: RunConfig
    explicit: frozenset[str]
    task_file: Path | None = None
    """The absolute path of a person's own task; None for a built-in one."""


def load(
    task: str | None = None,
    preset: str | None = None,
    config_file: Path | str | None = None,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration alone; see resolve()."""
    return resolve(task, preset, config_file, sets, overrides).config


def resolve(
    task: str | None = None,
    preset: str | None = None,
    config_file: Path | str | None = None,
    sets: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> Resolved:
    """The configuration, with what was set explicitly. `overrides` are flags by dotted key; None means: not given.

    Relative paths are as seen from the current folder. Raises ConfigError with every problem found.
    """
    layers = _Layers()
    flags = {"task": task, "preset": preset, **(overrides or {})}
    typed = [(_parse_set(text, layers.problems), "--set") for text in sets]
    typed += [(_nest(key, value), "the command line") for key, value in flags.items() if value is not None]
    file = _read_file(Path(config_file), layers.problems) if config_file is not None else {}
    chosen_preset = _chosen("preset", typed, file)
    preset_values = _read_preset(chosen_preset, layers.problems)
    chosen_task = _chosen("task", typed, file, preset_values) or RunConfig.model_fields["task"].default
    entry, task_file, spelled = _find_task(str(chosen_task), layers.problems)

    if entry is not None:
        layers.add(entry.defaults, _TASK_DEFAULTS)
    layers.add(preset_values, f"preset {chosen_preset}")
    layers.add(file, str(config_file))
    for values, origin in typed:
        layers.add(values, origin)
    config = _validate(layers, entry)
    layers.look_below()
    if config is None or layers.problems:
        raise ConfigError(layers.problems)
    config.task = spelled
    if config.data.path is not None:
        config.data.path = os.path.abspath(os.path.expanduser(config.data.path))
    explicit = frozenset(key for key, origin in layers.origins.items() if origin != _TASK_DEFAULTS)
    return Resolved(config, explicit, task_file)


@dataclass
class _Layers:
    """Values laid over each other, where each leaf came from, and what was wrong with them."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    buried: list[tuple[str, Any]] = field(default_factory=list)
    """Values that a section of keys was laid over."""

    def add(self, values: Mapping[Any, Any], origin: str) -> None:
        self._merge(self.values, values, origin, "")

    def _merge(self, into: dict[str, Any], values: Mapping[Any, Any], origin: str, prefix: str) -> None:
        for raw, value in values.items():
            name = str(raw)
            dotted = f"{prefix}{name}"
            if isinstance(value, Mapping):
                below = into.get(name)
                if below is not None and not isinstance(below, dict):
                    self.buried.append((dotted, below))
                into[name] = below if isinstance(below, dict) else {}
                self._merge(into[name], value, origin, f"{dotted}.")
            elif value is None and _is_section(dotted):
                continue  # `train:` with nothing below it is an empty section
            elif isinstance(value, float) and not math.isfinite(value):
                self.problems.append(f"{dotted} = {value} (from {origin}): must be a finite number.")
            else:
                into[name] = value
                self.origins[dotted] = origin

    def look_below(self) -> None:
        """Note what was given for a section and is covered by its keys; where the keys are what is wrong, that is said already."""
        for dotted, value in self.buried:
            line = no_section(dotted, value, self.origins)
            if not any(problem.startswith((f"{dotted} ", f"{dotted}:")) for problem in self.problems):
                self.problems.append(line)


def _is_section(dotted: str) -> bool:
    known = RunConfig.model_fields.get(dotted)
    return known is not None and known.default_factory is not None


def _validate(layers: _Layers, entry: catalogue.TaskEntry | None) -> RunConfig | None:
    """The validated configuration, the task's settings by its own model; None when it is not one. Notes all problems."""
    settings: BaseModel | None = None
    raw = layers.values.get("settings", {})
    if entry is not None and isinstance(raw, dict):
        try:
            settings = entry.settings_model.model_validate(raw)
        except ValidationError as error:
            layers.problems += in_words(error, entry.settings_model, "settings.", layers.origins)
    try:
        config = RunConfig.model_validate(layers.values)
    except ValidationError as error:
        layers.problems += in_words(error, RunConfig, "", layers.origins)
        return None
    if settings is not None:
        config.settings = settings.model_dump(mode="json")
    if config.name is not None and not runs.valid_name(config.name):
        layers.problems.append(f"name = {config.name!r}: must be letters, digits, dots, - and _, at most 80, not a device name.")
    micro, batch = config.train.micro_batch, config.train.batch_size
    if isinstance(micro, int) and micro > batch:
        layers.problems.append(f"train.micro_batch = {micro}: is larger than train.batch_size, which is {batch}.")
    layers.problems += [*contradictions.found(config), *_of_deepspeed(config)]
    return config


def _of_deepspeed(config: RunConfig) -> list[str]:
    """What ZeRO-2 cannot be given; a person's own ds_config.json is found from the current folder."""
    wanted = config.memory.deepspeed_config
    if wanted is None or config.memory.offload != deepspeed.OFFLOAD:
        return deepspeed.problems(config)
    path = Path(os.path.abspath(os.path.expanduser(wanted)))
    config.memory.deepspeed_config = str(path)
    try:
        return deepspeed.problems(config, deepspeed.read(path))
    except FileNotFoundError:
        return [f"memory.deepspeed_config = {wanted}: there is no such file."]
    except ConfigError as error:
        return error.problems


def _find_task(task: str, problems: list[str]) -> tuple[catalogue.TaskEntry | None, Path | None, str]:
    try:
        if not catalogue.is_file_task(task):
            return catalogue.find_task(task), None, task
        path, name = catalogue.find_file_task(task)
        return None, path, f"{path}:{name}"
    except UsageError as error:
        problems.append(str(error))
        return None, None, task


def _chosen(key: str, typed: Sequence[tuple[dict[str, Any], str]], *layers: Mapping[str, Any]) -> Any:
    """What the most important layer says about `key`."""
    found = [values[key] for values, _ in typed if values.get(key) is not None]
    found.reverse()  # the last one typed counts
    return next((v for v in [*found, *(layer.get(key) for layer in layers)] if v is not None), None)


def _read_preset(name: Any, problems: list[str]) -> dict[str, Any]:
    if name is None:
        return {}
    try:
        return _read_file(catalogue.preset_file(str(name)), problems)
    except UsageError as error:
        problems.append(str(error))
        return {}


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    """The document in a configuration file; a file that cannot be read is a problem, and empty."""
    try:
        # Opened without waiting: a pipe would hold us until somebody writes into it, a device for ever.
        with open(os.path.expanduser(path), "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                problems.append(f"The configuration file {path} is not a file; name a YAML or JSON file.")
                return {}
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            problems.append(f"The configuration file {path} is larger than {_MAX_FILE_BYTES:,} bytes; is it the right one?")
            return {}
        document = yaml12.parse(content, f"The configuration file {path}")
    except OSError as error:
        problems.append(f"The configuration file {path} cannot be read: {error.strerror or error}.")
        return {}
    except ConfigError as error:
        problems += error.problems
        return {}
    if document is None and path.suffix.lower() == ".json":
        problems.append(f"The configuration file {path} holds nothing, as a copy that was broken off: JSON has at least {{}}.")
    if document is None:
        return {}
    if not isinstance(document, dict):
        problems.append(f"The configuration file {path} holds no sections; write it like `train:` and below it `  epochs: 5`.")
        return {}
    return document


def _parse_set(text: str, problems: list[str]) -> dict[str, Any]:
    """The nested form of section.key=value; the value is typed by YAML's rules."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        problems.append(f"--set {text}: write it like --set train.lr=1e-4.")
        return {}
    try:
        return _nest(key, yaml12.parse(value, f"--set {text}"))
    except ConfigError as error:
        problems += error.problems
        return {}


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested
