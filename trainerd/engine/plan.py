"""The plan of a run: what was left to choose, chosen once for this machine. Must not be asked twice: a resume keeps it.

device, precision, micro-batch, threads and optimizer kernel change the last bits; so they are stored with the run and in
every checkpoint, and change only by a named event.
"""

from __future__ import annotations

from typing import Any

import torch

from trainerd.config import contradictions, deepspeed
from trainerd.config.model import RunConfig
from trainerd.contract.errors import ConfigError, DeviceLost
from trainerd.engine import checkpointing, precision
from trainerd.engine.task import Task
from trainerd.machine import cpu

NO_OFFLOAD, OPTIMIZER_ON_HOST, BASE_ON_HOST, ZERO2 = "none", "optimizer", "base", deepspeed.OFFLOAD
_SHOWN = (
    "device",
    "precision",
    "micro_batch",
    "grad_accum",
    "effective_batch",
    "optimizer",
    "threads",
    "activation_checkpointing",
    "offload",
)

Plan = dict[str, Any]


def resolve(config: RunConfig, task: Task) -> Plan:
    """The plan for a new run. Plain values only. Raises ConfigError when the configuration contradicts the task."""
    train = config.train
    problems = [*contradictions.found(config), *deepspeed.problems(config)]
    if problems:
        raise ConfigError(problems)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    plan: Plan = {
        "device": str(device),
        "precision": precision.resolve(train.precision, device),
        "threads": own_threads() if train.threads == "auto" else train.threads,
        "num_workers": 0 if train.num_workers == "auto" else train.num_workers,
        "deterministic": train.deterministic,
        "optimizer": train.optimizer,
        "logits": "full" if config.memory.logits == "full" else "chunked",
        "activation_checkpointing": _checkpointing(config, task),
        "offload": NO_OFFLOAD if config.memory.offload == "auto" else config.memory.offload,
        "attention": train.attention,
        "compile": train.compile,
        "effective_batch": train.batch_size,
    }
    micro_batch = train.batch_size if train.micro_batch == "auto" else min(train.micro_batch, train.batch_size)
    if micro_batch < train.batch_size and not task.splittable:
        message = f"train.micro_batch is {micro_batch} and train.batch_size {train.batch_size}, but this task's batch cannot be split."
        raise ConfigError([message], "Leave train.micro_batch out, or make the batch smaller.")
    set_micro_batch(plan, micro_batch)
    offload_open = device.type == "cuda" and config.memory.offload == "auto"
    blocks_open = train.activation_checkpointing == "auto" and _has_blocks(task) and not train.compile
    if (train.micro_batch == "auto" and task.splittable) or offload_open or blocks_open:
        plan["open"] = True  # fitting.py takes it out, when the model is known
    return plan


def own_threads() -> int:
    """How many a trainer takes where nobody says: one core is left to the person."""
    return max(1, cpu.physical_cores() - 1)


def follow(plan: Plan, config: RunConfig) -> None:
    """What of a recorded plan a person may change while a run goes on: what lies on the host. Left to "auto", it stays."""
    if config.memory.offload != "auto":
        plan["offload"] = config.memory.offload
        if plan["offload"] == BASE_ON_HOST and plan["activation_checkpointing"] in ("none", "off"):
            if plan.get("compile"):
                raise ConfigError(["memory.offload = base: this run's model is compiled, and then blocks are not computed again."])
            plan["activation_checkpointing"] = checkpointing.FULL  # the same numbers to the last bit
    elif plan.get("offload") in (None, "off"):  # as earlier versions wrote it
        plan["offload"] = NO_OFFLOAD


def optimizer_place(plan: Plan) -> str:
    """The device that computes the optimizer's step: another one rounds differently."""
    if plan.get("offload") == ZERO2:
        return "cpu (DeepSpeed)"
    return "cpu" if plan.get("offload") == OPTIMIZER_ON_HOST else str(plan["device"])


def _has_blocks(task: Task) -> bool:
    """Whether the task says anything about blocks; for which model it names some is known when that is built."""
    return type(task).blocks is not Task.blocks


def _needed_by_base(wanted: str, task: Task) -> str:
    """A base that is streamed saves something only where blocks are computed again."""
    if not _has_blocks(task):
        said = "memory.offload = base: this task names no blocks whose weights could be streamed."
        raise ConfigError([said], "Give the task blocks(model): a list of its layers; or set memory.offload=auto.")
    return checkpointing.FULL if wanted == "auto" else wanted


def _checkpointing(config: RunConfig, task: Task) -> str:
    wanted: str = config.train.activation_checkpointing
    if config.memory.offload == BASE_ON_HOST:
        wanted = _needed_by_base(wanted, task)
    if wanted in (checkpointing.SELECTIVE, checkpointing.FULL) and not _has_blocks(task):
        raise checkpointing.unnamed(wanted)
    return checkpointing.NONE if wanted == "auto" else wanted


def set_micro_batch(plan: Plan, micro_batch: int) -> None:
    plan["micro_batch"] = micro_batch
    plan["grad_accum"] = -(-plan["effective_batch"] // micro_batch)


def halve_after_kill(plan: Plan, too_large: int | None, task: Task) -> str | None:
    """Half the micro-batch that the system has ended a trainer with, for want of RAM; why, in words. None: this plan's is smaller, or
    cannot be halved."""
    if too_large is None or plan["micro_batch"] < too_large or plan["micro_batch"] <= 1 or not task.splittable:
        return None
    set_micro_batch(plan, max(1, -(-too_large // 2)))
    plan.pop("open", None)  # what fits by the estimate did not
    return f"the system ended the trainer because RAM was full; the micro-batch is now {plan['micro_batch']}"


def device_of(plan: Plan) -> torch.device:
    """The device, checked to be there. Raises DeviceLost: a driver may come back, so a later try may work."""
    device = torch.device(plan["device"])
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        message = f"This run was planned for {plan['device']}, and no such device answers now."
        raise DeviceLost(message, "If the GPU is gone for good, begin a new run with --no-resume.")
    return device


def shown(plan: Plan) -> dict[str, Any]:
    """The event: what the status shows, and the whole as `record` for a resume."""
    return {**{name: plan.get(name) for name in _SHOWN}, "record": dict(plan)}
