"""ds_config.json of a run: what DeepSpeed is given, in the run's folder. Must not import DeepSpeed, nor decide what may be in it.

A person's own file is read again with every start, so that it may be edited; when it has gone away, the run goes on with what it
was given last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainerd.config import deepspeed
from trainerd.config.model import RunConfig
from trainerd.contract import files
from trainerd.contract.errors import ConfigError
from trainerd.contract.paths import RunPaths
from trainerd.engine import plan as plans

FILE = "ds_config.json"
_OF_THE_PLAN = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def written(config: RunConfig, plan: plans.Plan, paths: RunPaths) -> dict[str, Any]:
    """The whole of it, and a file of it in the run's folder. Raises ConfigError when a person's own contradicts the configuration."""
    path = paths.folder / FILE
    own = _own(config, path)
    problems = deepspeed.problems(config, own)
    if problems:
        raise ConfigError(problems)
    document = deepspeed.whole(config, plan["micro_batch"], own, on_gpu=plan["device"] != "cpu")
    files.make_folder(path.parent)
    files.write_json(path, document)
    return document


def at_hand(config: RunConfig, paths: RunPaths) -> RunConfig:
    """The configuration, with what the run was given last in place of a person's own that has gone away."""
    wanted, last = config.memory.deepspeed_config, paths.folder / FILE
    if wanted is None or Path(wanted).is_file() or not last.is_file():
        return config
    return config.model_copy(update={"memory": config.memory.model_copy(update={"deepspeed_config": str(last)})})


def _own(config: RunConfig, last: Path) -> dict[str, Any] | None:
    wanted = config.memory.deepspeed_config
    if wanted is None:
        return None
    try:
        return deepspeed.read(Path(wanted))
    except FileNotFoundError:
        try:
            kept = deepspeed.read(last)
        except FileNotFoundError:
            raise ConfigError([f"memory.deepspeed_config = {wanted}: there is no such file."]) from None
    return {name: value for name, value in kept.items() if name not in _OF_THE_PLAN}
