"""RunConfig: everything a run may be asked, each key with its meaning. Must not read files, and must not know any task.

The docstring under a field is its text in `--help`, in the JSON Schema and in the docs. Unknown keys are errors.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from trainerd.contract.sizes import parse_bytes as parse_bytes
from trainerd.contract.sizes import parse_memory


def _size(text: str) -> str:
    parse_bytes(text)
    return text


def _written(value: Any) -> Any:
    """A bare number of bytes, as YAML reads it, is a size too; nothing is none."""
    if value is None:
        raise ValueError("nothing is given; write it like 3.5GB, 80% or auto")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _path(text: str | None) -> str | None:
    if text is None:
        return None
    if not text:
        raise ValueError("is empty; leave it out, or name a file or folder")
    try:
        valid = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise ValueError("has characters that no file's name can have")
    return text


def _limit(text: str) -> str:
    if text == "auto":
        return text
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*%\s*", text):
        if not 0 < float(text.strip().rstrip("%")) <= 100:
            raise ValueError(f"{text!r} is not between 0 % and 100 %")
        return text
    parse_memory(text)
    return text


Size = Annotated[str, AfterValidator(_size)]
Limit = Annotated[str, BeforeValidator(_written), AfterValidator(_limit)]
Auto = Literal["auto"]
FilePath = Annotated[str | None, AfterValidator(_path)]
Seconds = Annotated[float, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, field docstrings are the documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


class DataConfig(Section):
    """What to learn from."""

    path: FilePath = None
    """File or folder to learn from; without it the task brings its own data."""
    size: int | None = Field(None, ge=1)
    """Use the first N samples of a seeded shuffle (`--dataset-size`)."""
    columns: dict[str, str | int] = Field(default_factory=dict)
    """Which column (name, or number from 0 in a file without a header) holds what the task needs, e.g. {text: query}."""
    eval_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the data held out for evaluation."""


class TrainConfig(Section):
    """How to learn."""

    epochs: int = Field(3, ge=1)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, even within an epoch."""
    batch_size: int = Field(32, ge=1, le=1_000_000)
    """The effective batch: samples per step, whatever the micro-batch; at most a million."""
    micro_batch: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Samples per forward pass; the rest of the batch is accumulated. auto: as many as fit by the estimate, less after an
    out-of-memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: the fastest this machine computes natively."""
    optimizer: Literal["adamw", "adam", "sgd", "adafactor", "adamw8bit", "paged_adamw8bit"] = "adamw"
    """adamw, adam and sgd run fused where torch has a fused kernel. adamw8bit keeps its state in a quarter of the memory
    (bitsandbytes); paged_adamw8bit lets the driver move it out of a GPU that is full."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled for adamw (8-bit too) and adafactor, L2 otherwise; never on biases and norms."""
    scheduler: Literal["constant", "cosine", "linear", "polynomial"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises to lr."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the gradient's global norm to this; null: do not clip."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    """Blocks of the model are computed again on the way back, to the same bits. full: they keep their inputs only; selective: also what
    is dear to compute; auto: none, unless the plan needs it. The task must name its blocks."""
    attention: Literal["auto", "flash", "efficient", "math"] = "auto"
    """The kernel of torch's scaled_dot_product_attention; auto: the fastest that can. Another one is never taken silently."""
    compile: StrictBool = False
    """Compile the model with torch.compile. The memory estimate does not cover it, and a resumed run may differ in its last bits."""
    deterministic: StrictBool | Auto = "auto"
    """auto: on, and operations without a deterministic kernel are named; true: they are errors; false: off."""
    threads: Annotated[int, Field(ge=1)] | Auto = "auto"
    """CPU threads. auto: physical cores - 1, at least 1. Stored with the run: another number gives other last bits."""
    num_workers: Annotated[int, Field(ge=0, le=4)] | Auto = "auto"
    """Loader processes. auto: 0, for data that is read from memory maps."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Evaluate this often; null: after every epoch."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better one; null: never."""


class MemoryConfig(Section):
    """How much of the machine may be used."""

    ram_limit: Limit = "auto"
    """Bound on the whole machine's used RAM: "14GB", "80%", or auto (87.5 %)."""
    vram_limit: Limit = "auto"
    """Bound on the whole GPU's used memory: "3.5GB", "80%", or auto (87.5 %)."""
    logits: Literal["auto", "full", "chunked"] = "auto"
    """How the built-in task makes its loss over the vocabulary. chunked: in pieces, at most 64 MiB at 50,000 words; full: all scores
    at once, as torch's own; auto: chunked. A task of your own decides by ctx.logits."""
    offload: Literal["auto", "none", "optimizer", "base", "zero2"] = "auto"
    """What lies in RAM in place of the GPU's memory. optimizer: its state, its own copy of the weights, and the gradients: 16
    bytes of RAM per weight; base: the frozen weights of the task's blocks, copied to the GPU while each computes; zero2: the optimizer,
    by DeepSpeed's ZeRO-2 (Linux, the extra `deepspeed`), 20 to 40 bytes per weight; auto: nothing, unless it would not fit otherwise."""
    deepspeed_config: FilePath = None
    """A ds_config.json of your own for zero2; "auto" in it is what this configuration says, and a contradiction is refused. What
    DeepSpeed was given is in the run's folder as ds_config.json."""


class CheckpointConfig(Section):
    """How progress is kept."""

    every_steps: int = Field(50, ge=1)
    """The densest spacing; a save is skipped while saving would cost more than 1 % of the run's time."""
    every_minutes: float = Field(5.0, gt=0)
    """At least this often, whatever it costs."""
    keep: int = Field(3, ge=2)
    """How many of the newest are kept."""
    keep_best: StrictBool = True
    """Also keep the one with the best evaluation."""
    exact: StrictBool = False
    """Save at every mark of every_steps, whatever it costs."""
    max_write_per_day: Size = "100GB"
    """Spare the disk: checkpoints are spaced out to stay below this."""


class HangLimits(Section):
    """Seconds without a sign of life, for single phases; null: what faults.hang says."""

    starting: Seconds | None = None
    """Loading torch, the task, the model and a checkpoint."""
    preparing: Seconds | None = None
    """Between two calls of ctx.progress() in a task's prepare()."""
    training: Seconds | None = None
    """One micro-batch."""
    evaluating: Seconds | None = None
    """One batch of an evaluation, or a task's own evaluate() between two calls of ctx.pulse()."""
    checkpointing: Seconds | None = None
    """One checkpoint, from its copy to its acknowledgement."""
    exporting: Seconds | None = None
    """Writing the finished model."""


class FaultsConfig(Section):
    """What is done when something goes wrong."""

    hang: Seconds | Literal["auto", "off"] = "auto"
    """A trainer that gives no sign of life for this many seconds is ended and started again. auto: five times the slowest
    gap seen, at least a minute while it trains, more in other phases; off: never."""
    hang_limits: HangLimits = Field(default_factory=HangLimits)
    nan: Literal["rollback", "stop", "ignore"] = "rollback"
    """When a loss, gradient or weight is no finite number any more. rollback: go back to the last checkpoint, and fail when it
    happens again at the same step; stop: fail at once; ignore: warn, and go on."""
    nan_steps: int = Field(0, ge=0)
    """So many steps in a row may be without a finite loss or gradient: they are left out, nothing is learned from their samples.
    On a GPU this costs a wait in every step."""

    @property
    def leaves_out(self) -> bool:
        """Whether a step without finite numbers changes nothing."""
        return self.nan_steps > 0 and self.nan != "ignore"


class PoliteConfig(Section):
    """How to share the machine with the person at it."""

    priority: Literal["idle", "normal"] = "idle"
    """idle: everything else goes first."""
    keep_awake: Literal["auto", "on", "off"] = "auto"
    """Keep the machine from sleeping by itself while it trains. auto: on mains only; on: on battery too, except on Windows."""


class LogConfig(Section):
    """What is written beside the log."""

    tensorboard: StrictBool = False
    """Write TensorBoard event files under runs/<run>/tensorboard (needs the extra `tensorboard`)."""


class RunConfig(Section):
    """A whole configuration. `settings` belong to the task and are checked by its own model."""

    task: str = "cadence"
    """A built-in task, or FILE.py:Class."""
    preset: str | None = None
    """A named set of values these override."""
    name: str | None = None
    """The run's name; without it <task>-YYYYMMDD-HHMMSS."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Fixes the order of samples, the initial weights and every random draw."""
    data: DataConfig = Field(default_factory=DataConfig)
    settings: dict[str, Any] = Field(default_factory=dict)
    """The task's own settings."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    faults: FaultsConfig = Field(default_factory=FaultsConfig)
    polite: PoliteConfig = Field(default_factory=PoliteConfig)
    log: LogConfig = Field(default_factory=LogConfig)
