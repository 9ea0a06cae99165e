"""Fits a new run's micro-batch to this machine before the first step, and foretells what the run will need. Must not train.

A task with a memory table is estimated from it; any other model is traced once, and the trace kept under the home's cache.
What cannot be estimated is trained as asked: an out-of-memory loses no step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainerd.config.model import RunConfig
from trainerd.contract import wire
from trainerd.contract.errors import Refused
from trainerd.contract.paths import Home, RunPaths
from trainerd.contract.sizes import compared
from trainerd.engine import arenas, attention, ds_config, packed, peak, traced_for
from trainerd.engine import plan as plans
from trainerd.engine.on_disk import on_disk
from trainerd.engine.precision import Precision
from trainerd.engine.task import MapDataset, Task
from trainerd.machine import gpu
from trainerd.machine import memory as machine_memory
from trainerd.machine.asking import within
from trainerd.memory import allocator_settings, forecast, heap, planner, profile, receipts, traced
from trainerd.memory.estimate import Estimate, estimate
from trainerd.memory.limits import ram_left, resolve_limit
from trainerd.memory.timeline import Setup, Table, tells
from trainerd.memory.zero2 import Buckets

Send = Callable[..., None]
_DRIVER_SECONDS = 5.0
_WORTH_KEEPING_BYTES = 16 << 20
_WAYS_SHOWN = 160  # characters: the status shows 300 of a refusal, and a way that is cut off cannot be typed


@dataclass
class Forecast:
    """What is known before the first step; `predicted` is asked again at the end, for the plan as it then is."""

    table: Table | None
    place: forecast.Place
    trace: str | None = None
    """The name of the trace's file under the home's cache, when the model was traced."""
    splittable: bool = True
    samples: int | None = None
    """How many there are to train on."""
    began: Setup | None = None
    """What this life of the run began with."""
    recoveries: int = 0
    """Out-of-memories before it."""
    buckets: Buckets | None = None
    """DeepSpeed's, where it has the optimizer."""
    heap: str = heap.UNKNOWN
    """How large blocks are held in this life."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All of the task's."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Those it has where nobody says any."""
    peak_before: int = 0
    """RAM that was held for a moment before the training, where the system's count cannot leave it out."""

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
            allocator=self.place.allocator if self.place.device == "cuda" else "",
            buckets=self.buckets,
            heap=self.heap,
        )

    def predicted(self, plan: plans.Plan, config: RunConfig) -> Estimate | None:
        """The estimate for this plan, without any correction by receipts."""
        setup = self.setup(plan, config)
        if self.table is None or not tells(self.table, setup):
            return None
        return estimate(self.table, setup, self.place.profile, process_bytes=self.place.process_bytes)


def foresee(
    task: Task,
    model: nn.Module,
    dataset: MapDataset,
    config: RunConfig,
    plan: plans.Plan,
    paths: RunPaths,
    mixed: Precision,
    send: Send,
    beat: Callable[[], None] = lambda: None,
    *,
    traces: bool,
    begun: bool = False,
) -> Forecast:
    """The table of the task's model and what this machine has left for it; a plan that left the micro-batch open is closed.

    Without a table, or when a user's model cannot be traced, only what its weights need is foretold, and the batch is tried whole.
    `begun`: steps of this plan have worked. `beat` is called while it lasts. Raises Refused for another one that is too large for a CPU:
    there nothing fails at a limit, all crawls.
    """
    config = traced_for.with_settings(ds_config.at_hand(config, paths), task)
    place = _place(config, plan, paths.home)
    table: Table | None = None
    name: str | None = None
    why: str | None = None
    peak_before, code = 0, traced_for.Code("", {})
    try:
        table = task.memory_table()
        if table is None and traces:
            code = traced_for.code_of(task)
            name = f"{traced_for.key(task, model, dataset, config, mixed, code)}.json"
            table, peak_before = _traced(task, model, dataset, config, paths.home, mixed, name, code, beat)
    except Exception as error:  # a user's model may do anything; its own training tells what is wrong
        why = _why(error)
        send(wire.NOTE, kind="no_memory_estimate", text=why)
        if not begun:
            send(wire.WARNING, text=f"What its layers compute is not in the forecast, for it could not be traced: {why}")
    trace = name if table is not None else None
    place = replace(place, process_bytes=0) if begun else place  # what it goes on from lies in RAM as well now, for a moment
    place, table = _with_process(place, table, task, model, paths.home.cache / "traces" / trace if trace else None)
    found = Forecast(table, place, trace, task.splittable, samples=len(dataset))
    found.settings, found.defaults = config.settings, traced_for.defaults(task)
    found.buckets, found.heap = forecast.buckets(config, place.device), place.heap
    if traces and (name or why):
        about = {"splittable": task.splittable, "samples": len(dataset), "defaults": found.defaults}
        receipts.note_trace(paths, {"trace": trace, "untraced": why, "sources": dict(code.files), **about})
    if table is not None and not begun:
        _fit(found, table, config, plan, send, len(dataset))
    plan.pop("open", None)
    _hold_blocks(found, config, plan, send)
    found.began, found.peak_before = found.setup(plan, config), peak_before
    if table is not None:
        foretold = forecast.foretold(config, found.setup(plan, config), place, table)
    else:
        foretold = _weighed(found, task, model, config, plan, mixed, send, begun=begun) if traces else None
    if foretold is not None:
        send(wire.MEMORY, predicted_bytes=int(foretold.needed.point))
    return found


def _weighed(
    found: Forecast, task: Task, model: nn.Module, config: RunConfig, plan: plans.Plan, mixed: Precision, send: Send, *, begun: bool
) -> Estimate | None:
    """The least that a model without a table or a trace needs. When even that is too much: refused on a CPU, warned of on a GPU."""
    from trainerd.engine.trace import of_weights

    if plan["offload"] == plans.BASE_ON_HOST:
        return None  # what of it is on the device, the trace would tell
    table = replace(of_weights(task, model, mixed, plan.get("attention", attention.AUTO)), on_disk=(sum(on_disk(task, model)), 0))
    place = replace(found.place, receipts=())  # those tell of whole trainings
    setup = replace(found.setup(plan, config), checkpointing="none", micro_batch=plan["effective_batch"])
    answer = forecast.weighed(config, setup, place, table, splittable=False)
    needed = answer.estimate.needed.point
    if needed > answer.budget_bytes and not begun:
        on_cpu = answer.setup.device == "cpu"
        name, limit = ("RAM", "memory.ram_limit") if on_cpu else ("GPU memory", "memory.vram_limit")
        parts = "for its weights, their gradients, the optimizer" + (" and a checkpoint's copy" if on_cpu else "")
        much, left = compared(needed, max(0, answer.budget_bytes))
        said = f"It does not fit: {parts} alone it needs {much} of {name}, and {left} are left for it ({limit})."
        if on_cpu:
            raise Refused(said, _what_helps(answer, for_weights=True))
        send(wire.WARNING, text=f"{said} It is tried; running out of memory loses no step. {_what_helps(answer, for_weights=True)}")
    return answer.estimate


def _fit(found: Forecast, table: Table, config: RunConfig, plan: plans.Plan, send: Send, num_samples: int) -> None:
    """Choose what was left open of micro-batch, checkpointing and where the optimizer is; say when even that is tight. The batch stays,
    but it has no more samples than there are."""
    is_open = plan.get("open", False)
    most = config.train.batch_size
    if found.splittable:  # a trace of one that is not is of that batch alone
        most = max(1, min(num_samples, config.data.size or num_samples, most))
    if is_open:
        train = config.train.model_copy(update={"batch_size": most})
        answer = forecast.answer(config.model_copy(update={"train": train}), found.place, table, found.splittable)
    else:
        setup = found.setup(plan, config)
        setup = replace(setup, effective_batch=most, micro_batch=min(most, setup.micro_batch))
        if not tells(table, setup):
            return
        answer = forecast.weighed(config, setup, found.place, table, found.splittable)
    _refuse_too_large(answer)
    setup = answer.setup
    micro_batch = setup.micro_batch if setup.micro_batch < most else plan["micro_batch"]
    chosen = {"activation_checkpointing": setup.checkpointing, "offload": setup.offload}
    if is_open and (micro_batch != plan["micro_batch"] or any(plan[name] != value for name, value in chosen.items())):
        plans.set_micro_batch(plan, micro_batch)
        plan.update(chosen)
        plan.pop("open")
        send(wire.PLAN, **plans.shown(plan))
    if answer.verdict != planner.FITS:
        send(wire.WARNING, text=_tight(answer))


def _hold_blocks(found: Forecast, config: RunConfig, plan: plans.Plan, send: Send) -> None:
    """Keep large blocks from step to step where there is room for the holes between them, or where nothing is known of the model; what is
    short later is given back then (cleaning.py). Only in a process that is the trainer's own; on a CPU only in one that began without a
    cache of small blocks, for in another the holes have no bound that was measured."""
    if arenas.now() == heap.UNKNOWN:
        return
    how, place = heap.KEPT, found.place
    if place.device == "cpu" and not place.may_keep:
        found.heap = how = heap.GIVEN_BACK
    elif place.device == "cpu":
        setup = replace(found.setup(plan, config), heap=heap.KEPT)
        kept = None if found.table is None else forecast.foretold(config, setup, place, found.table)
        found.heap = how = heap.KEPT if kept is None or kept.needed.upper <= place.budget_bytes else heap.GIVEN_BACK
    arenas.hold(how)
    send(wire.NOTE, kind="heap", blocks=how)


def _with_process(
    place: forecast.Place, table: Table | None, task: Task, model: nn.Module, path: Path | None
) -> tuple[forecast.Place, Table | None]:
    """With what this process holds beside the model: the data that the task has loaded, and what it has imported. It is kept with the
    trace, so that `plan` knows it too."""
    if not place.process_bytes:
        return place, table
    of_model = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()) if one.device.type == "cpu")
    of_model += sum(packed.scale_bytes(model).values())  # of a base in 4 or 8 bits: no parameters of torch's, and in the table
    held = machine_memory.own_bytes() - max(0, of_model - sum(on_disk(task, model))) + profile.LATER_BYTES
    held = max(held, place.profile.process_bytes)
    if path is not None and isinstance(table, traced.TracedTable) and arenas.now() != heap.UNKNOWN:
        changed = abs(table.process_bytes - held) > _WORTH_KEEPING_BYTES
        table = replace(table, process_bytes=held)
        if changed:
            _keep(path, table)
    return replace(place, process_bytes=held), table


def _refuse_too_large(answer: planner.Answer) -> None:
    """On a CPU, and only when what is likely is too much already: a bound may be too high, and a GPU's allocator says no by itself.
    The status shows 300 characters of it, so the changes that help come early and short."""
    needed = answer.estimate.needed
    if answer.setup.device != "cpu" or needed.point <= answer.budget_bytes:
        return
    much, left = compared(needed.point, max(0, answer.budget_bytes))
    raise Refused(f"It does not fit: it needs {much} of RAM, and {left} are left for it (memory.ram_limit).", _what_helps(answer))


def _what_helps(answer: planner.Answer, *, for_weights: bool = False) -> str:
    """`for_weights`: what the layers compute is not in it, so it is not said that all would fit."""
    if answer.proposals:
        doubt = "" if answer.proposals[0].verdict == planner.FITS else "be likely to "
        ways = [_way(proposal, max(0, answer.budget_bytes)) for proposal in answer.proposals]
        while len(ways) > 1 and len(" or ".join(ways)) > _WAYS_SHOWN:
            ways.pop()
        return f"{'These alone' if for_weights else 'It'} would {doubt}fit with {' or '.join(ways)}."
    return answer.no_model_fits or f"{planner.smaller(answer)} Or more memory: close programs, or raise the limit."


def _way(proposal: planner.Proposal, left_bytes: int) -> str:
    """What to set, and in a few words what it needs then (client/refused.py reads the settings out of it)."""
    needed = proposal.estimate.needed
    point, most, _ = compared(needed.point, needed.upper, left_bytes)
    likely = f"{point}, " if proposal.verdict != planner.FITS else ""
    return f"{' '.join(f'--set {setting}' for setting in proposal.settings)} ({likely}{most} at most)"


def _tight(answer: planner.Answer) -> str:
    needed, on_cpu = answer.estimate.needed, answer.setup.device == "cpu"
    trying = "It is tried; past the limit the micro-batch is halved, or the training waits for room."
    if not on_cpu:
        trying = "It is tried; running out of memory loses no step."
        if answer.verdict == planner.TOO_LARGE:
            trying = f"{trying} {_what_helps(answer)}"
    likely, most, left = compared(needed.point, needed.upper, max(0, answer.budget_bytes))
    what = "RAM" if on_cpu else "GPU memory"
    return f"By the estimate this needs {likely} of {what}, at most {most}, and {left} are left for it. {trying}"


def _place(config: RunConfig, plan: plans.Plan, home: Home) -> forecast.Place:
    """What the limit leaves of this machine, our own process not counted against us."""
    device = plans.device_of(plan)
    name, driver = device_facts(device)
    version = str(torch.__version__)
    assumed = profile.assumed(version, cuda=torch.version.cuda is not None)
    measured = profile.read(profile.file_of(home.cache, name, driver, version), assumed)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_reserved(device) + measured.context_bytes
        budget = resolve_limit(config.memory.vram_limit, total) - max(0, total - free - ours)
    else:
        budget = _ram_left(config)
    allocator = allocator_settings.asked(os.environ, sys.platform)
    found, chooses, own = receipts.read(home), arenas.now() != heap.UNKNOWN, machine_memory.own_bytes()
    ram_left, keeps = _ram_left(config), heap.can_keep(os.environ)
    return forecast.Place(device.type, budget, plan["precision"], measured, found, name, ram_left, allocator, chooses, keeps, own)


def _ram_left(config: RunConfig) -> int:
    """What the limit leaves beside the others, our own process not counted; past it only growth counts (pressure.py)."""
    ram = machine_memory.ram()
    others = max(0, ram.used_bytes - machine_memory.own_bytes())
    return ram_left(resolve_limit(config.memory.ram_limit, ram.total_bytes), others, ram.total_bytes)


def device_facts(device: torch.device) -> tuple[str, str | None]:
    """What a profile and a receipt call the device, and its driver's version."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), within(_DRIVER_SECONDS, gpu.driver_version)
    return "cpu", None


def _why(error: Exception) -> str:
    from trainerd.engine.trace import NotTraced

    return (str(error) if isinstance(error, NotTraced) else f"{type(error).__name__}: {error}")[:300]


def _traced(
    task: Task,
    model: nn.Module,
    dataset: MapDataset,
    config: RunConfig,
    home: Home,
    mixed: Precision,
    name: str,
    code: traced_for.Code,
    beat: Callable[[], None],
) -> tuple[Table, int]:
    """The trace of this model, from the cache or made now; and the RAM's peak until then, as peak.begin_anew() tells it."""
    from trainerd.engine.trace import Means, trace

    path = home.cache / "traces" / name
    kept, of_files = traced.read(path), on_disk(task, model)
    if kept is not None:
        if kept.on_disk != of_files:
            kept = replace(kept, on_disk=of_files)
            _keep(path, kept)
        return kept, 0
    kernel = attention.MATH if config.train.attention == attention.MATH else attention.AUTO
    means = Means(_ram_left(config) - machine_memory.own_bytes(), beat)
    made = trace(task, model, dataset, mixed, config.train.batch_size, kernel, means)
    before = peak.begin_anew()  # the copy of the model is no need of the training
    made = replace(made, on_disk=of_files, source=code.digest)
    _keep(path, made)
    return made, before


def _keep(path: Path, table: traced.TracedTable) -> None:
    try:
        traced.write(path, table)
    except OSError:
        pass  # a full disk: traced again next time
