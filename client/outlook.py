"""Will it fit? Gathers what is known about this machine and this task, and asks the planner. Must not import torch, nor start anything.

`plan` shows the answer, `start` refuses with it. A person's own task is known from the trace an earlier run of it has left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainerd.config import catalogue
from trainerd.config.identity import differences, fingerprint, identity, model_of
from trainerd.config.load import Resolved
from trainerd.config.model import RunConfig
from trainerd.contract import runs
from trainerd.contract.errors import Unreadable, UsageError
from trainerd.contract.paths import Home
from trainerd.contract.sizes import parse_memory
from trainerd.machine import adapters, cpu, gpu
from trainerd.machine.memory import ram
from trainerd.memory import allocator_settings, forecast, heap, planner, profile, receipts, traced
from trainerd.memory.limits import ram_left, resolve_limit
from trainerd.memory.planner import Answer
from trainerd.memory.timeline import Setup, Table, tells
from trainerd.memory.traced import TracedTable

from . import diagnosis, gpu_driver, packages
from .words import sizes

_BF16_ON_CPU = {"amx_bf16", "avx512_bf16"}
_BF16_ON_CUDA = (8, 0)  # older ones emulate it, many times as slow
_COUNT_SECONDS = 0.3
_MAY_BE_FEWER = "How many samples the data have is not known yet. The trainer reads them, and takes no more than there are: it decides."
_NOT_TRACED = "A model that cannot be traced is tried with the whole batch."
_ON_A_CPU = (
    "What its trace, or its weights alone, say is too much is refused before the first step, with what would fit. Later, past the limit, "
    "the micro-batch is halved, or the training waits for room."
)
_ON_A_GPU = "Running out of memory loses no step: the same samples are tried again in smaller pieces."
_SHOWN = 4  # differences; the first ones tell


@dataclass(frozen=True)
class Budget:
    """What is left for the training, and where that comes from in words."""

    left_bytes: int
    comes_from: str = ""
    typed: str = ""
    """As a person has given it; "": it was looked up."""

    def beside(self, *needed_bytes: float) -> tuple[list[str], str]:
        """What is set against it, and itself, in sizes that can be told apart."""
        *needed, left = sizes(*needed_bytes, self.left_bytes)
        return needed, f"a budget of {self.typed}" if self.typed else f"{left} left{self.comes_from}"


@dataclass(frozen=True)
class Outlook:
    """The planner's answer, where it is for, and what the budget is."""

    answer: Answer
    place: forecast.Place
    where: str
    budget: Budget
    notes: tuple[str, ...] = ()
    """What a person should know of this machine first: a GPU that will not be used."""
    is_certain: bool = True
    """Whether the data surely have the samples of the batch that was asked about: a step of the trainer takes no more than there are."""
    stated: catalogue.Stated | None = None
    """What the preset says it needs; None when none was chosen, or its model or batch was changed."""

    @property
    def can_be_measured(self) -> bool:
        """Whether the device is here and was not: one that is only asked about cannot be."""
        return not self.place.profile.measured and (self.place.device == "cpu" or self.place.name != "cpu")


@dataclass(frozen=True)
class Unknown:
    """Why nothing can be foretold, and what the training will do about it."""

    reason: str
    will: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def look(home: Home, asked: Resolved, budget: str | None = None, device: str | None = None) -> Outlook | Unknown:
    """What training `asked` would need here, or within `budget` ("3.5GB") on a "gpu" or "cpu". Raises UsageError."""
    place, where, words = _place(home, asked.config, budget, device)
    found = _table_of(home, asked, place)
    notes = () if budget is not None or device is not None else unused_gpu()
    if budget is None and place.device == "cpu":
        slow = cpu.slow(asked.config.train.precision)  # what "auto" chooses is not; of another machine nobody knows
        notes = (*notes, slow) if slow else notes
    if place.profile.problem:
        notes = (*notes, f"{place.profile.problem}: what was measured there does not count. Measure again: `plan --measure`")
    if isinstance(found, Unknown):
        return replace(found, will=_what_it_will_do(asked.config, place, where, words), notes=notes)
    config, is_certain = _of_samples(asked, found)
    if config is not asked.config and asked.task_file is None:
        found = replace(found, table=_built_in(config))  # few rows have few words
    answer = forecast.answer(config, place, found.table, found.splittable)
    if answer.verdict == planner.TOO_LARGE and not is_certain:
        notes = (*notes, _MAY_BE_FEWER)
    return Outlook(answer, place, where, words, notes, is_certain, _stated(asked))


@dataclass(frozen=True)
class _Known:
    """The memory table of a task's model, whether its batch can be split, and how many samples the data had when it was trained."""

    table: Table
    splittable: bool = True
    samples: int | None = None


def _of_samples(asked: Resolved, found: _Known) -> tuple[RunConfig, bool]:
    """The configuration with no more samples than the data have, as far as that is known; and whether it is known that they have those
    of the batch. A file's lines are counted, no longer than nobody notices; some of them may be unusable, or held out."""
    config, data = asked.config, asked.config.data
    whole = min(config.train.batch_size, data.size or config.train.batch_size)
    if not found.splittable:
        return config, True  # such a batch is not made smaller
    if asked.task_file is None:
        counted = catalogue.find_task(config.task).data_module.rows_at_most
        samples, is_exact = counted(data, 2 * whole, _COUNT_SECONDS)
    else:
        samples, is_exact = found.samples, True
    if samples is None:
        return config, False
    if samples < whole:
        config = config.model_copy(update={"data": data.model_copy(update={"size": samples})})
    return config, is_exact or samples >= 2 * whole


def _stated(asked: Resolved) -> catalogue.Stated | None:
    changed = any(key.startswith(("settings.", "train.batch_size", "train.optimizer")) for key in asked.explicit)
    return None if changed or asked.task_file is not None else catalogue.STATED.get(asked.config.preset or "")


def unused_gpu() -> tuple[str, ...]:
    """That there is a GPU which a training would not use, and the remedy; nothing where all is well, or there is none."""
    gpus, nvidia, torch = gpu_driver.devices(), adapters.nvidia_present(), packages.torch_facts()
    found = diagnosis.driver(gpus, gpu_driver.version(), nvidia)
    if torch is not None:
        found.insert(0, diagnosis.torch(torch, gpus, nvidia, gpu_driver.cuda()))
    instead = "This is about the CPU." if gpu_driver.is_stuck() else "Training runs on the CPU."
    return tuple(f"{one.text} {instead} {one.remedy}" for one in found if one.level == "problem")


def _what_it_will_do(config: RunConfig, place: forecast.Place, where: str, budget: Budget) -> tuple[str, ...]:
    """How the engine meets a model that nothing is known of (trainerd/engine/fitting.py)."""
    train = config.train
    precision = place.precision if train.precision == "auto" else train.precision
    said = [f"It trains on {where}, in {precision}, with {train.optimizer}; {budget.beside()[1]}."]
    if train.micro_batch == "auto":
        cut = f"the batch of {train.batch_size:,} is cut into as few pieces as then fit"
        said.append(f"At its start one micro-batch is traced on the CPU (seconds), and {cut}. {_NOT_TRACED}")
    else:
        said.append(f"Its micro-batch is {train.micro_batch:,} samples, as you set it, of a batch of {train.batch_size:,}.")
    said.append(_ON_A_CPU if place.device == "cpu" else _ON_A_GPU)
    return (*said, "From then on `plan` knows it.")


def _built_in(config: RunConfig) -> Table:
    entry = catalogue.find_task(config.task)
    found: Table = entry.blocks_module.table(entry.settings_model.model_validate(config.settings), config.data)
    return found


def _table_of(home: Home, asked: Resolved, place: forecast.Place) -> _Known | Unknown:
    """The memory table of the task's model that can answer for what is asked there."""
    if asked.task_file is None:
        return _Known(_built_in(asked.config))
    wanted, data = identity(asked.config, {}, asked.task_file), _data_of(asked)
    name = str(wanted["task"])
    others: list[TracedTable] = []
    unlike: list[str] = []
    untraced = ""
    for run in reversed(runs.names(home)):
        try:
            record, noted = runs.read(home, run), receipts.trace_of(home.run(run))
        except (OSError, Unreadable):
            continue
        same, defaults = record.identity.get("task") == wanted["task"], noted.get("defaults")
        then, now = (model_of(one, defaults if isinstance(defaults, Mapping) else {}) for one in (record.identity, wanted))
        if then != now:
            unlike = unlike or (differences(then, now) if same and noted else [])
            continue
        edited = receipts.edited(noted)
        if edited:
            unlike = unlike or [f"{Path(edited).name}, which it imports, was edited, moved or added"]
            continue
        table = _trace_of(home, noted)
        if table is None:
            untraced = untraced or str(noted.get("untraced") or "")
            continue
        splittable, samples = noted.get("splittable") is not False, noted.get("samples")
        if tells(table, forecast.question(asked.config, place, splittable).setup):
            is_same = isinstance(samples, int) and data is not None and record.identity.get("data") == data
            return _Known(table, splittable, samples if is_same else None)
        others.append(table)
    unread = runs.cannot_be_read(home)
    if unread:
        return Unknown(f"The runs of this home cannot be read ({unread}): what {name} needs is not known, even if it was trained here.")
    return Unknown(_why_unknown(name, asked, place, others, untraced, unlike))


def _why_unknown(name: str, asked: Resolved, place: forecast.Place, others: list[TracedTable], untraced: str, unlike: list[str]) -> str:
    if others:
        setup = forecast.question(asked.config, place).setup
        return f"{name} was last trained here {_traced_as(others[0])}: what its model needs {_asked_as(setup, others[0])} is not known."
    if untraced:
        return f"{name} could not be traced when it was last started here: {untraced.rstrip('.')}. What its model needs is not known."
    if unlike:
        return f"{name} was trained here otherwise ({'; '.join(unlike[:_SHOWN])}): what its model needs now is not known."
    return f"{name} has not been trained in this home yet: what its model needs is not known."


def _traced_as(table: TracedTable) -> str:
    steps = table.modes["none"].steps
    alone = f", its batch of {steps[0].samples:,} whole" if len(steps) == 1 else ""
    return f"in {table.precision}, {_of_model(table.logits, table.attention)}{alone}"


def _asked_as(setup: Setup, table: TracedTable) -> str:
    """In what it differs from what was traced."""
    steps = table.modes["none"].steps
    asked = {
        f"in {setup.precision}": setup.precision != table.precision,
        f"with memory.logits={setup.logits}": setup.logits != table.logits,
        f"with train.attention={setup.attention}": setup.attention != table.attention,
        f"in micro-batches of {setup.micro_batch:,}": len(steps) == 1 and setup.micro_batch != steps[0].samples,
    }
    return " and ".join([words for words, differs in asked.items() if differs] or asked)


def _of_model(logits: str, attention: str) -> str:
    """The two settings that the model itself may follow."""
    return f"with memory.logits={logits} and train.attention={attention}"


def _trace_of(home: Home, noted: Mapping[str, Any]) -> TracedTable | None:
    """What was traced in a run, by its own note."""
    name = noted.get("trace")
    if not isinstance(name, str) or "/" in name or "\\" in name:
        return None
    return traced.read(home.cache / "traces" / name)


def _data_of(asked: Resolved) -> Any:
    """What an identity says of the data that are asked about; nothing where they cannot be looked at."""
    try:
        return identity(asked.config, fingerprint(asked.config.data), asked.task_file).get("data")
    except UsageError:
        return None


def _place(home: Home, config: RunConfig, budget: str | None, device: str | None) -> tuple[forecast.Place, str, Budget]:
    """Where it would run, in words as well, and what is left there."""
    gpus = gpu_driver.devices() if device != "cpu" else []
    facts = packages.torch_facts()
    has_cuda = bool(gpus) and facts is not None and facts.cuda is not None and not facts.newer_than(gpu_driver.cuda())
    kind = {"gpu": "cuda", "cpu": "cpu"}.get(device or "") or ("cuda" if budget is not None or has_cuda else "cpu")
    name = gpus[0].name if kind == "cuda" and gpus else "cpu"
    torch = facts.version if facts is not None else ""
    assumed = profile.assumed(torch, cuda=kind == "cuda" or (facts is not None and facts.cuda is not None))
    known = profile.read(profile.file_of(home.cache, name, gpu_driver.version() if kind == "cuda" else None, torch), assumed)
    allocator, chooses = allocator_settings.asked(os.environ, sys.platform), heap.can_be_chosen()
    on_cpu = budget is not None or device is not None or not gpu.may_be_used(os.environ)  # asked about, or known at the start
    keeps = heap.can_keep(heap.beginning(os.environ, on_cpu=on_cpu))
    if budget is not None:
        if name == "cpu" and kind == "cuda":
            known = assumed
        seen = receipts.read(home) if kind == "cpu" else ()  # of a CPU, what a model needed here it needs there
        place = forecast.Place(kind, _bytes(budget), _precision(kind, gpus), known, seen, name, None, allocator, chooses, keeps)
        return place, "a GPU" if kind == "cuda" else "a CPU", Budget(place.budget_bytes, typed=budget)
    left, ram_left = _left(config, kind, gpus), _left(config, "cpu", gpus).left_bytes
    seen, precision = receipts.read(home), _precision(kind, gpus)
    place = forecast.Place(kind, left.left_bytes, precision, known, seen, name, ram_left, allocator, chooses, keeps)
    return place, _named(kind, gpus), left


def _left(config: RunConfig, kind: str, gpus: list[gpu.GpuFacts]) -> Budget:
    """What the limit leaves now."""
    if kind == "cuda":
        if not gpus or gpus[0].total_bytes is None:
            raise UsageError("There is no GPU here whose memory is known.", "Say how much it may use: --budget 3.5GB")
        total, used = gpus[0].total_bytes, gpus[0].used_bytes or 0
        limit = resolve_limit(config.memory.vram_limit, total)
        in_use, allowed = sizes(used, limit)
        return Budget(max(0, limit - used), f" (memory.vram_limit {allowed}, {in_use} in use)")
    facts = ram()
    total, used = facts.total_bytes, facts.used_bytes
    limit = resolve_limit(config.memory.ram_limit, total)
    left = ram_left(limit, used, total)
    if limit <= used:
        in_use, there = sizes(used, total)
        passed = f"memory.ram_limit {sizes(limit, used)[0]} is passed by others already, so it bounds only growth"
        return Budget(left, f" of the machine ({passed}; {in_use} of {there} in use)")
    in_use, allowed = sizes(used, limit)
    return Budget(left, f" (memory.ram_limit {allowed}, {in_use} in use)")


def _precision(kind: str, gpus: list[gpu.GpuFacts]) -> str:
    """What "auto" will most likely mean; the trainer asks the device itself (trainerd/engine/precision.py)."""
    if kind != "cuda":
        return "bf16" if cpu.features() & _BF16_ON_CPU else "fp32"
    capability = gpu_driver.compute_capability(gpus[0].index) if gpus else None
    return "fp16" if capability is not None and capability < _BF16_ON_CUDA else "bf16"


def knows_precision(place: forecast.Place) -> bool:
    """Whether what "auto" means there is known, not guessed: only when the system, or of a GPU the driver, tells what it computes."""
    if place.device == "cpu":
        return cpu.computes("bf16") is not None
    return gpu_driver.compute_capability(0) is not None


def _named(kind: str, gpus: list[gpu.GpuFacts]) -> str:
    return gpus[0].name if kind == "cuda" else "this machine's CPU"


def _bytes(text: str) -> int:
    try:
        return parse_memory(text)
    except ValueError as error:
        raise UsageError(f"--budget: {error}.", "Write it like --budget 3.5GB.") from None
