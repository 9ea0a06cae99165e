"""Which keys contradict each other, whatever the machine and the task: `plan`, `config`, `start` and the trainer say the same.

Must not look at the machine; what a task or a device cannot do is said by whoever knows them.
"""

from __future__ import annotations

from trainerd.config.model import RunConfig

_AGAIN = ("selective", "full")
_BASE_WITHOUT = "without computing blocks again each block's weights would be kept until the way back"


def found(config: RunConfig) -> list[str]:
    """Each in words, with what to change."""
    train, offload = config.train, config.memory.offload
    said: list[str] = []
    if train.compile and train.activation_checkpointing in _AGAIN:
        both = f"train.compile is on and train.activation_checkpointing = {train.activation_checkpointing}"
        said.append(f"{both}: torch compiles no block that is computed again; turn one of them off.")
    if offload == "optimizer" and "8bit" in train.optimizer:
        what = f"the small state of train.optimizer = {train.optimizer} stays on the device"
        said.append(f"memory.offload = optimizer: {what}; choose one of the two.")
    if offload == "base" and (train.compile or train.activation_checkpointing == "none"):
        other = "train.compile is on" if train.compile else "train.activation_checkpointing is none"
        change = "turn train.compile off and leave train.activation_checkpointing at auto"
        said.append(f"memory.offload = base: {other}, and {_BASE_WITHOUT}; {change}.")
    return said
