"""Fits a new run's micro-batch to this machine before the first step, and foretells what the run will need. Must not train.

A task with a memory table is estimated from it; any other model is traced once, and the trace kept under the home's cache.
What cannot be estimated is trained as asked: an out-of-memory loses no step.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from trainerd.config.model import RunConfig
from trainerd.contract import wire
from trainerd.contract.paths import Home
from trainerd.engine import attention
from trainerd.engine import plan as plans
from trainerd.engine.precision import Precision
from trainerd.engine.task import MapDataset, Task
from trainerd.machine import gpu
from trainerd.machine import memory as machine_memory
from trainerd.memory import forecast, planner, profile, receipts, traced
from trainerd.memory.estimate import Estimate, estimate
from trainerd.memory.limits import resolve_limit
from trainerd.memory.timeline import Setup, Table, tells

Send = Callable[..., None]


@dataclass
class Forecast:
    """What is known before the first step; `predicted` is asked again at the end, for the plan as it then is."""

    table: Table | None
    place: forecast.Place
    trace: str | None = None
    """The name of the trace's file under the home's cache, when the model was traced."""
    splittable: bool = True

    def setup(self, plan: plans.Plan, config: RunConfig) -> Setup:
        """Everything of this plan that memory depends on."""
        return Setup(
            device=self.place.device,
            precision=plan["precision"],
            micro_batch=plan["micro_batch"],
            effective_batch=plan["effective_batch"],
            optimizer=config.train.optimizer,
            logits=plan.get("logits", "chunked"),
            offload=plan["offload"],
            checkpointing=plan["activation_checkpointing"].replace("off", "none"),
            attention=plan.get("attention", attention.AUTO),
            compiled=plan.get("compile", False),
        )

    def predicted(self, plan: plans.Plan, config: RunConfig) -> Estimate | None:
        """The estimate for this plan, without any correction by receipts."""
        setup = self.setup(plan, config)
        return estimate(self.table, setup, self.place.profile) if self.table is not None and tells(self.table, setup) else None


def foresee(
    task: Task,
    model: nn.Module,
    dataset: MapDataset,
    config: RunConfig,
    plan: plans.Plan,
    home: Home,
    mixed: Precision,
    send: Send,
    *,
    traces: bool,
) -> Forecast:
    """The table of the task's model and what this machine has left for it; a plan that left the micro-batch open is closed.

    Without a table, or when a user's model cannot be traced, nothing is foretold, and the batch is tried whole.
    """
    place = _place(config, plan, home)
    table: Table | None = None
    name: str | None = None
    try:
        table = task.memory_table()
        if table is None and traces:
            name = f"{_key(task, model, config, mixed)}.json"
            table = _traced(task, model, dataset, config, home, mixed, name)
    except Exception as error:  # a user's model may do anything; its own training tells what is wrong
        text = f"{type(error).__name__}: {error}"[:300]
        send(wire.NOTE, kind="no_memory_estimate", text=text)
    found = Forecast(table, place, name if table is not None else None, task.splittable)
    _fit(found, config, plan, send)
    return found


def _fit(found: Forecast, config: RunConfig, plan: plans.Plan, send: Send) -> None:
    """Choose what was left open of micro-batch, checkpointing and where the optimizer is; say when even that is tight. The batch stays."""
    if not plan.pop("open", False) or found.table is None:
        return
    answer = forecast.answer(config, found.place, found.table, found.splittable)
    setup = answer.setup
    chosen = {"activation_checkpointing": setup.checkpointing, "offload": setup.offload}
    if setup.micro_batch != plan["micro_batch"] or any(plan[name] != value for name, value in chosen.items()):
        plans.set_micro_batch(plan, setup.micro_batch)
        plan.update(chosen)
        send(wire.PLAN, **plans.shown(plan))
    if answer.verdict != planner.FITS:
        send(wire.WARNING, text=_tight(answer))


def _tight(answer: planner.Answer) -> str:
    needed, what = answer.estimate.needed, "RAM" if answer.setup.device == "cpu" else "GPU memory"
    return (
        f"By the estimate this needs {needed.point / 1e9:.1f} GB of {what}, at most {needed.upper / 1e9:.1f} GB, and "
        f"{max(0, answer.budget_bytes) / 1e9:.1f} GB are left below the limit. It is tried; running out of memory loses no step."
    )


def _place(config: RunConfig, plan: plans.Plan, home: Home) -> forecast.Place:
    """What the limit leaves of this machine, our own process not counted against us."""
    device = plans.device_of(plan)
    name, driver = device_facts(device)
    measured = profile.read(profile.file_of(home.cache, name, driver, str(torch.__version__)))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device) + measured.context_bytes
        budget = resolve_limit(config.memory.vram_limit, total) - max(0, total - free - ours)
    else:
        budget = _ram_left(config)
    return forecast.Place(device.type, budget, plan["precision"], measured, receipts.read(home), name, _ram_left(config))


def _ram_left(config: RunConfig) -> int:
    ram = machine_memory.ram()
    ours = int(psutil.Process(os.getpid()).memory_info().rss)
    return resolve_limit(config.memory.ram_limit, ram.total_bytes) - max(0, ram.used_bytes - ours)


def device_facts(device: torch.device) -> tuple[str, str | None]:
    """What a profile and a receipt call the device, and its driver's version."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), gpu.driver_version()
    return "cpu", None


def _traced(task: Task, model: nn.Module, dataset: MapDataset, config: RunConfig, home: Home, mixed: Precision, name: str) -> Table | None:
    """The trace of this model, from the cache or made now."""
    from trainerd.engine.trace import trace

    path = home.cache / "traces" / name
    kept = traced.read(path)
    if kept is not None:
        return kept
    kernel = attention.MATH if config.train.attention == attention.MATH else attention.AUTO
    made = trace(task, model, dataset, mixed, config.train.batch_size, kernel)
    if made is not None:
        try:
            traced.write(path, made)
        except OSError:
            pass  # a full disk: traced again next time
    return made


def _key(task: Task, model: nn.Module, config: RunConfig, mixed: Precision) -> str:
    """What the trace depends on: the model's shapes, the task and its settings, batch, precision, torch."""
    about: dict[str, Any] = {
        "task": f"{type(task).__module__}:{type(task).__qualname__}",
        "model": str(model),
        "shapes": [[name, list(p.shape), p.requires_grad] for name, p in model.named_parameters()],
        "config": config.model_dump(mode="json", include={"settings", "data"}),
        "batch": config.train.batch_size,
        "precision": mixed.name,
        "logits": task.ctx.logits,
        "math": config.train.attention == attention.MATH,
        "torch": str(torch.__version__),
        "format": traced.FORMAT,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:32]
