"""From a configuration and facts about a machine to the planner's question and its answer. Must not read the machine.

`plan`, `start` and the trainer all ask here, so that they say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainerd.contract.errors import ConfigError
from trainerd.memory import heap, receipts, zero2
from trainerd.memory.estimate import Estimate, estimate
from trainerd.memory.planner import Answer, Estimating, Question, choose
from trainerd.memory.profile import Profile
from trainerd.memory.techniques import TECHNIQUES
from trainerd.memory.timeline import Setup, Table, tells
from trainerd.memory.zero2 import Buckets

if TYPE_CHECKING:  # pydantic costs more than an estimate may take to import; whoever has a RunConfig has it already
    from trainerd.config.model import RunConfig


@dataclass(frozen=True)
class Place:
    """Where it shall run: what of the device is left for us, and what is known about it."""

    device: str
    """cpu or cuda."""
    budget_bytes: int
    precision: str
    """What "auto" means there."""
    profile: Profile = field(default_factory=Profile)
    receipts: Iterable[Mapping[str, Any]] = ()
    name: str = ""
    """What receipts call the device."""
    ram_bytes: int | None = None
    """What of the RAM is left for us when the device is a GPU; None: not known."""
    allocator: str = ""
    """What the trainer's environment asks torch's allocator for (allocator_settings.py)."""
    chooses_heap: bool = False
    """Whether the trainer there can tell its C library to keep large blocks or to give them back (heap.py)."""
    may_keep: bool = True
    """Whether what it keeps has a bound that was measured, by the environment it begins with (heap.can_keep)."""
    process_bytes: int = 0
    """RAM that the trainer holds beside its model, data included, where that is known; 0: as the profile says."""

    @property
    def heap(self) -> str:
        """With which a plan begins: the one that needs least."""
        return heap.GIVEN_BACK if self.chooses_heap and self.device == "cpu" else heap.UNKNOWN


def question(config: RunConfig, place: Place, splittable: bool = True) -> Question:
    """What this configuration leaves open. A micro-batch larger than the batch is the batch, and that has no more samples than the
    data; a model that is known whole is known with its own batch alone."""
    train = config.train
    whole = min(train.batch_size, config.data.size or train.batch_size) if splittable else train.batch_size
    again = "none" if train.activation_checkpointing == "auto" else train.activation_checkpointing
    if config.memory.offload == "base" and again == "none":
        again = "full"  # as the engine takes it (trainerd/engine/plan.py)
    setup = Setup(
        device=place.device,
        precision=place.precision if train.precision == "auto" else train.precision,
        micro_batch=whole if train.micro_batch == "auto" else min(train.micro_batch, whole),
        effective_batch=whole,
        optimizer=train.optimizer,
        logits="full" if config.memory.logits == "full" else "chunked",
        offload="none" if config.memory.offload == "auto" else config.memory.offload,
        compiled=train.compile,
        checkpointing=again,
        attention=train.attention,
        allocator=place.allocator if place.device == "cuda" else "",
        buckets=buckets(config, place.device),
        heap=place.heap,
    )
    values: dict[str, object] = {"memory.logits": config.memory.logits, "memory.offload": config.memory.offload}
    values["train.activation_checkpointing"] = "none" if train.compile else train.activation_checkpointing
    values |= {"train.micro_batch": train.micro_batch, "train.precision": train.precision, "train.optimizer": train.optimizer}
    fixed = frozenset(key for key, value in values.items() if value != "auto")
    return Question(setup, place.budget_bytes, fixed, splittable, place.ram_bytes, place.may_keep)


def buckets(config: RunConfig, device: str) -> Buckets | None:
    """DeepSpeed's, as the configuration and a person's own ds_config.json have them; None where it has no part in the training."""
    if config.memory.offload != zero2.NAME:
        return None
    from trainerd.config import deepspeed

    zero = deepspeed.buffers(config, on_gpu=device != "cpu")
    copies = 2 if zero["overlap_comm"] else 1
    return Buckets(int(zero["reduce_bucket_size"]), copies, bool(zero["offload_optimizer"]["pin_memory"]))


def foretold(config: RunConfig, setup: Setup, place: Place, table: Table) -> Estimate | None:
    """What this plan will need there, as receipts correct it; None when the table cannot tell."""
    return _asking(config, place, table)(setup) if tells(table, setup) else None


def weighed(config: RunConfig, setup: Setup, place: Place, table: Table, splittable: bool = True) -> Answer:
    """Whether a plan that leaves nothing open fits this place; when not, what would."""
    fixed = frozenset(technique.key for technique in TECHNIQUES)
    asked = Question(setup, place.budget_bytes, fixed, splittable, place.ram_bytes, place.may_keep)
    return choose(asked, table, _asking(config, place, table))


def answer(config: RunConfig, place: Place, table: Table, splittable: bool = True) -> Answer:
    """The plan for this place, and what it needs. Raises ConfigError for what the model cannot do."""
    wanted = config.train.activation_checkpointing
    if wanted not in ("auto", "none", *table.offers):
        message = f"train.activation_checkpointing is {wanted}, but this task (with these settings) names no blocks to compute again."
        raise ConfigError([message], "Leave it at auto, or give the task blocks(model): a list of its layers.")
    if config.memory.offload == "base" and "base" not in table.offers:
        raise nothing_to_stream()
    asking = _asking(config, place, table)
    return choose(question(config, place, splittable), table, asking, _at_least(config, place, table, asking))


def nothing_to_stream() -> ConfigError:
    """memory.offload = base without a base: what the plan says, and the engine."""
    hint = "It is for a base that is not trained, under adapters that are: plain weights, or bitsandbytes' linear layers in 4 or 8 bits; "
    hint += "what is packed otherwise stays on the device. Set memory.offload=auto."
    return ConfigError(["memory.offload = base: the blocks of this task's model have no frozen weight that can be streamed."], hint)


def _at_least(config: RunConfig, place: Place, table: Table, asking: Estimating) -> Estimating:
    """What is needed at least, for a tenth of the work: the tensors, without what the GPU's allocator makes of them. Where earlier runs
    correct an estimate nothing is known to be less than that."""
    profile, given = place.profile, tuple(place.receipts)

    def ask(setup: Setup) -> Estimate:
        if given or setup.device == "cpu":
            return asking(setup)
        return estimate(table, setup, profile, process_bytes=place.process_bytes, replays=False)

    return ask


def _asking(config: RunConfig, place: Place, table: Table) -> Estimating:
    torch, given = place.profile.torch or None, tuple(place.receipts)
    model = receipts.Model(config.settings, getattr(table, "source", ""), getattr(table, "degree", 1))
    keep, best = config.checkpoint.keep, config.checkpoint.keep_best or config.train.early_stopping is not None

    def ask(setup: Setup) -> Estimate:
        trust = receipts.trust(given, table.kind, place.name, torch, setup, model)
        return estimate(table, setup, place.profile, trust, keep=keep, keep_best=best, process_bytes=place.process_bytes)

    return ask
