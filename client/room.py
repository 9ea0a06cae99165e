"""Whether the disk has room for a new run, before anything is started. Must not need torch, nor guess where nothing is known."""

from __future__ import annotations

from trainerd.config import catalogue
from trainerd.config.model import RunConfig
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home
from trainerd.machine.filesystem import free_bytes
from trainerd.memory import disk


def refuse_without_room(home: Home, config: RunConfig) -> None:
    """Raise Refused when not even two checkpoints and the result of a built-in task would fit. A person's own task is measured by
    the trainer, once its model is built."""
    if catalogue.is_file_task(config.task):
        return
    entry, free = catalogue.find_task(config.task), free_bytes(home.root)
    if entry.size is None or free is None:
        return
    parameters = entry.size_module.expected_parameters(entry.settings_model.model_validate(config.settings), config.data)
    checkpoint = disk.checkpoint_bytes(parameters, config.train.optimizer)
    found = disk.room(free, checkpoint, disk.weights_bytes(parameters), config.checkpoint.keep, config.checkpoint.keep_best)
    if found.missing_bytes:
        message, hint = disk.too_little(str(home.root), found, checkpoint)
        raise Refused(message, hint)
