"""Builds a training from its parts and brings it back to where a state says it was. Must not train, and must not choose the plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainerd.config.model import RunConfig
from trainerd.contract import phases, wire
from trainerd.contract.errors import UsageError
from trainerd.contract.paths import RunPaths
from trainerd.engine import (
    attention,
    checkpointing,
    compiling,
    dropout,
    ds_config,
    filling,
    fitting,
    lanes,
    optimizers,
    packed,
    precision,
    rng,
    space,
    spill,
    streaming,
    zero2,
)
from trainerd.engine import plan as plans
from trainerd.engine.batches import Batches
from trainerd.engine.checkpoints import CheckpointStore
from trainerd.engine.determinism import Exactness
from trainerd.engine.edited import Code
from trainerd.engine.evaluation import Evaluation
from trainerd.engine.finite import FiniteWatch
from trainerd.engine.guard import MemoryWatch
from trainerd.engine.loader import Loader, lengths_of
from trainerd.engine.loop import Asked, Link, Training
from trainerd.engine.metrics import MetricsLog
from trainerd.engine.pulse import Pulse
from trainerd.engine.saver import Saver, SaveSchedule
from trainerd.engine.state import States
from trainerd.engine.step import Stepper
from trainerd.engine.task import MapDataset, Task, TaskContext
from trainerd.engine.tensorboard import TensorBoard
from trainerd.engine.updates import Updates
from trainerd.machine import cpu
from trainerd.machine.memory import own_bytes

State = dict[str, Any]
# The random states at step 0 come from the seed alone, whatever building the model and the data has drawn.
_TRAINING_STREAM = 1


def build(
    task: Task,
    config: RunConfig,
    plan: plans.Plan,
    paths: RunPaths,
    cache_dir: Path,
    link: Link,
    store: CheckpointStore,
    state: State | None,
    stack: ExitStack,
    *,
    traces: bool = False,
    begun: bool = False,
) -> Training:
    """The training, at `state` or at its beginning; what must be closed afterwards is put on the stack.
    `traces`: a model without a memory table is traced once, for the estimate. `begun`: steps of this run have worked."""
    mixed = precision.Precision(plan["precision"], plans.device_of(plan))
    pulse = Pulse(link.send)
    rng.seed(config.seed)
    task.bind(_context(config, plan, mixed, cache_dir))
    dataset, held_out = _datasets(task)
    batches = Batches(len(dataset), config.train.batch_size, config.seed, lengths=lengths_of(task, dataset), limit=config.data.size)
    model = _model(task, config, mixed.device, link, begun=begun)
    foreseen = fitting.foresee(task, model, dataset, config, plan, paths, mixed, link.send, pulse.beat, traces=traces, begun=begun)
    watch = _spill_watch(mixed.device, link, paged=config.train.optimizer == "paged_adamw8bit")  # while nothing of the model is there
    model = _placed(task, model, mixed, plan, link, stack)
    pulse.enter(phases.STARTING)
    optimizer, updates = _updates(model, task, config, plan, paths, mixed, link, stack)
    plan["optimizer"] = optimizers.kernel(optimizer)
    model = _prepared(task, model, mixed, plan)
    loader = Loader(task, dataset, batches, num_workers=plan["num_workers"], seed=config.seed, pin_memory=mixed.device.type == "cuda")
    stack.callback(loader.close)
    training = Training(
        task=task,
        model=model,
        config=config,
        plan=plan,
        link=link,
        pulse=pulse,
        asked=Asked(link, pulse),
        stepper=Stepper(task, model, updates, mixed, loader),
        evaluation=_evaluation(task, model, mixed, held_out, config, plan),
        states=States(model, optimizer, mixed),
        saver=Saver(store, SaveSchedule(config.checkpoint), link.send, paths.home.root, _save_limit(config, link)),
        store=store,
        metrics=_metrics(config, paths, link, state, stack),
        finite=FiniteWatch(config.faults, model, mixed, batches.ids, link.send),
        exact=Exactness(link.send),
        memory=MemoryWatch(config.memory, mixed.device, link.send, may_leave=link.starts_again),
        spill=watch,
        steps_per_epoch=batches.steps_per_epoch,
        total_steps=_total_steps(config, batches),
        about=_about(config, mixed.device),
        foreseen=foreseen,
        code=Code(type(task), paths.folder, whole_process=link.starts_again),
    )
    pulse.is_saving = lambda: training.saver.busy
    stack.callback(_close, training)
    _begin(training, loader, held_out, state)
    return training


def _context(config: RunConfig, plan: plans.Plan, mixed: precision.Precision, cache_dir: Path) -> TaskContext:
    logits = plan.get("logits", "chunked")
    return TaskContext(device=mixed.device, dtype=mixed.dtype, seed=config.seed, cache_dir=cache_dir, data=config.data, logits=logits)


def _model(task: Task, config: RunConfig, device: torch.device, link: Link, *, begun: bool) -> torch.nn.Module:
    """What the task builds, in a phase of its own: the data is done. What bitsandbytes is to pack is packed, so that it is estimated so."""
    link.send(wire.PHASE, name=phases.STARTING, done=None, total=None, unit=None)
    with filling.watched(config.memory, link, begun=begun):
        model = task.model()
        packed.pack(model, device)
    return model


def _placed(
    task: Task, model: torch.nn.Module, mixed: precision.Precision, plan: plans.Plan, link: Link, stack: ExitStack
) -> torch.nn.Module:
    """The model on its device, but for a base that stays on the host; learning, its blocks computed again if the plan says so (older
    plans said "off")."""
    if plan["offload"] == plans.BASE_ON_HOST:
        base = streaming.Stream(model, task.blocks(model), mixed.device)
        stack.callback(base.close)
        if mixed.device.type == "cuda" and not base.is_pinned:
            text = "Not all of the base is in memory that the GPU copies from by itself (pinned): a step waits for its weights."
            link.send(wire.WARNING, text=text)
    else:
        model = model.to(mixed.device)
        packed.settle(model, mixed.device)
    checkpointing.wrap(model, task.blocks(model), plan["activation_checkpointing"].replace("off", checkpointing.NONE))
    stack.enter_context(attention.kernel(plan.get("attention", attention.AUTO), mixed.device, mixed.dtype))
    return model.train()


def _prepared(task: Task, model: torch.nn.Module, mixed: precision.Precision, plan: plans.Plan) -> torch.nn.Module:
    """Its forward under autocast, compiled if the plan says so, and its dropout knowing the samples."""
    model = mixed.prepare(model)
    compiling.compile_in_place(model, plan.get("compile", False), mixed.device)
    dropout.attach(model, task.ctx)
    dropout.lay_out(model, mixed.device)
    return model


def _total_steps(config: RunConfig, batches: Batches) -> int:
    steps = config.train.epochs * batches.steps_per_epoch
    return min(steps, config.train.max_steps or steps)


def _begin(training: Training, loader: Loader, held_out: MapDataset | None, state: State | None) -> None:
    """Random states and place: those of the state, or of the beginning."""
    if training.config.train.early_stopping is not None and held_out is None:
        training.link.send(wire.WARNING, text="train.early_stopping does nothing: the task holds out no sample to evaluate on.")
    rng.seed(training.config.seed + _TRAINING_STREAM)
    if training.plan["deterministic"] is False:
        training.exact.lost(0, "deterministic is off")
    if state is not None:
        _put_back(training, state)
    loader.seek(training.step, training.plan["micro_batch"])
    training.foreseen.recoveries = training.memory.oom_recoveries


def _datasets(task: Task) -> tuple[MapDataset, MapDataset | None]:
    """What to train on, and what is held out: None also for an empty one."""
    own_bytes()  # files that are mapped from here on are known as data
    dataset, held_out = task.dataset("train"), task.dataset("eval")
    if dataset is None or len(dataset) == 0:
        raise UsageError("The task has no sample to train on.", "Look at the data, and at what prepare() has kept of it.")
    return dataset, held_out if held_out is not None and len(held_out) else None


def _spill_watch(device: torch.device, link: Link, *, paged: bool) -> spill.SpillWatch | None:
    """`paged`: the optimizer's states may lie in RAM on purpose, and the counter does not tell them from a spill."""
    if device.type != "cuda":
        return None

    def shared() -> int | None:
        return None if paged else spill.shared(lanes.pinned_bytes())

    return spill.SpillWatch(shared, spill.Look(device.index or 0), link.send, spill.python_program())


def _updates(
    model: torch.nn.Module,
    task: Task,
    config: RunConfig,
    plan: plans.Plan,
    paths: RunPaths,
    mixed: precision.Precision,
    link: Link,
    stack: ExitStack,
) -> tuple[torch.optim.Optimizer, Updates]:
    """The optimizer, where the plan wants it, and what brings gradients to it; on the host, with what carries them there."""
    train, leaves_out = config.train, config.faults.leaves_out
    if plan["offload"] == plans.ZERO2:
        bare = optimizers.build_bare(model, task, train)
        document = ds_config.written(config, plan, paths)
        deepspeed = zero2.make(model, task, bare, mixed, document, leaves_out)
        stack.callback(deepspeed.close)
        return bare, deepspeed
    if plan["offload"] != plans.OPTIMIZER_ON_HOST:
        optimizer = optimizers.build(model, task, train)
        return optimizer, Updates(model, task, optimizer, mixed, train.max_grad_norm, leaves_out)
    optimizer, offload = optimizers.build_on_host(model, task, train, mixed.device)
    stack.callback(offload.close)
    mixed.scale_on_host()
    if mixed.device.type == "cuda" and not offload.is_pinned:
        text = "The system pins no memory for the optimizer on the CPU: copying waits, and a step takes longer."
        link.send(wire.WARNING, text=text)
    return optimizer, Updates(model, task, optimizer, mixed, train.max_grad_norm, leaves_out, offload)


def _evaluation(
    task: Task, model: torch.nn.Module, mixed: precision.Precision, held_out: MapDataset | None, config: RunConfig, plan: plans.Plan
) -> Evaluation:
    return Evaluation(
        task,
        model,
        mixed,
        held_out,
        lengths_of(task, held_out) if held_out is not None else None,
        batch_size=plan["micro_batch"],
        every_steps=config.train.eval_every_steps,
        patience=config.train.early_stopping,
    )


def _metrics(config: RunConfig, paths: RunPaths, link: Link, state: State | None, stack: ExitStack) -> MetricsLog:
    """metrics.jsonl, cut back to where the state was, and TensorBoard beside it if wanted."""
    on_line = None
    if config.log.tensorboard:
        tensorboard = TensorBoard(paths.folder / "tensorboard", state["step"] if state else 0, link.send)
        stack.callback(tensorboard.close)
        on_line = tensorboard.line
    metrics = _open_metrics(paths, link, state, on_line)
    stack.callback(metrics.close)
    if metrics.damaged:
        link.send(wire.NOTE, kind="metrics_damaged", file=paths.metrics.name, bytes=metrics.bytes)
        text = f"{paths.metrics} was changed or damaged since it was saved (sha256): some of its numbers may be wrong."
        link.send(wire.WARNING, text=text + " It is kept as it is; the training does not read it.")
    if metrics.missing_bytes:
        text = f"{paths.metrics} is {metrics.missing_bytes:,} bytes shorter than the checkpoint says: some steps are missing from it."
        link.send(wire.WARNING, text=text)
    return metrics


def _open_metrics(paths: RunPaths, link: Link, state: State | None, on_line: Callable[[dict[str, Any]], None] | None) -> MetricsLog:
    kept_bytes, sha256 = (state["metrics_bytes"], state.get("metrics_sha256")) if state else (0, None)
    waiting = space.Wait(paths.home.root, "The training", link.send)
    while True:
        try:
            return MetricsLog(paths.metrics, kept_bytes, on_line, sha256)
        except OSError as error:
            if not space.is_full(error, paths.home.root):
                raise
        waiting.until_room(None)  # nothing is trained yet: a LEAVE ends the process by itself


def _save_limit(config: RunConfig, link: Link) -> float | None:
    """How long a save is waited for; None where a supervisor watches it, and learns how long one takes."""
    if link.starts_again:
        return None
    chosen = phases.chosen_seconds(config.faults.model_dump(), phases.CHECKPOINTING)
    limit_seconds = phases.silence(phases.CHECKPOINTING).first_seconds if chosen is None else chosen
    return None if limit_seconds == float("inf") else limit_seconds


def _close(training: Training) -> None:
    """End the saving thread; told to leave without saving, we do not wait for a save that is under way either."""
    if not training.asked.leaves_unsaved:
        training.saver.close()


def _put_back(training: Training, state: State) -> None:
    """Where the state was. Raises UsageError when the data is another one."""
    if state["steps_per_epoch"] != training.steps_per_epoch:
        message = f"The data has changed: an epoch has {training.steps_per_epoch} steps now, {state['steps_per_epoch']} when the run began."
        raise UsageError(message, "Bring the data back, or begin a new run with --no-resume.")
    if training.total_steps < state["step"]:
        message = f"The run has reached step {state['step']}, and train.epochs and train.max_steps ask for {training.total_steps} in all."
        raise UsageError(message, "Ask for more, or begin a new run with --no-resume.")
    training.states.restore(state)
    training.step, training.samples = state["step"], state["samples"]
    training.evaluation.restore(state["evaluation"])
    training.saved = (training.step, training.evaluation.last_step)
    training.exact.restore(state["exact"])
    training.memory.oom_recoveries = state["oom_recoveries"]
    if training.spill is not None:
        training.spill.recall(state.get("speed"), training.about["device"], training.plan)
    moved = plans.optimizer_place(state["plan"]), plans.optimizer_place(training.plan)
    if moved[0] != moved[1]:
        training.exact.lost(training.step + 1, f"resumed with the optimizer on {moved[1]}, no longer on {moved[0]}")
    before = {**state["about"], "config_sha256": training.about["config_sha256"]}
    # What an older trainerd did not write down is not known to be another.
    changed = [f"{name} {before[name]} -> {value}" for name, value in training.about.items() if before.get(name, value) != value]
    if changed:
        training.exact.lost(training.step + 1, f"resumed with {', '.join(changed)}")
    elif training.plan.get("compile"):
        training.exact.lost(training.step + 1, "resumed with torch.compile, which goes by the shapes it has met so far")
    rng.put_back(rng.from_document(state["rng"]))


def _about(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What the last bits depend on beside the plan; and the configuration's hash."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "processor_name": cpu.model(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
