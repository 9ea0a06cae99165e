"""Every way to need less memory that the engine has, in one place: its class, what it changes, and by how much in words.

A technique that the engine gains is added here and nowhere else: the planner, `plan` and the refusals read this list. Its effect
on memory is not written down but estimated, by the setup it leads to. Must not choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from trainerd.memory import zero2
from trainerd.memory.timeline import Setup, Table, tells

EXACT, ROUNDING, DIFFERENT = "exact", "rounding", "different"
"""exact: the same mathematics; rounding: other last digits; different: another algorithm. A plan takes them in this order."""


@dataclass(frozen=True)
class Technique:
    """`applied(setup, table)`: the setup with it, None where it changes nothing. `setting` is what a person writes for it.

    `automatic`: a plan may use it by itself when the setting is "auto"; the others are only proposed.
    """

    name: str
    kind: str
    key: str
    applied: Callable[[Setup, Table], Setup | None]
    setting: Callable[[Setup], str]
    automatic: bool
    price: str


def _half_batch(setup: Setup, table: Table) -> Setup | None:
    return setup.with_micro_batch(-(-setup.micro_batch // 2)) if setup.micro_batch > 1 else None


def _low(setup: Setup, table: Table) -> Setup | None:
    changed = replace(setup, precision="bf16")
    return changed if setup.precision == "fp32" and tells(table, changed) else None


def _full(setup: Setup, table: Table) -> Setup | None:
    """On a CPU alone: there what oneDNN compiles for low products may be more than they save."""
    changed = replace(setup, precision="fp32")
    return changed if setup.precision != "fp32" and setup.device == "cpu" and tells(table, changed) else None


def _chunked(setup: Setup, table: Table) -> Setup | None:
    return replace(setup, logits="chunked") if setup.logits == "full" and "chunked" in table.offers else None


def _again(mode: str) -> Callable[[Setup, Table], Setup | None]:
    def applied(setup: Setup, table: Table) -> Setup | None:
        if setup.compiled or setup.checkpointing != "none" or mode not in table.offers:
            return None  # torch compiles no block that is computed again (trainerd/config/contradictions.py)
        return replace(setup, checkpointing=mode)

    return applied


def _optimizer(name: str) -> Callable[[Setup, Table], Setup | None]:
    def applied(setup: Setup, table: Table) -> Setup | None:
        if name == "paged_adamw8bit" and setup.device == "cpu":
            return None
        if setup.offload == zero2.NAME and name != "sgd":
            return None  # DeepSpeed lays all weights into one line (config/deepspeed.py)
        if setup.offload == "optimizer" and "8bit" in name:
            return None  # the small state stays on the device (trainerd/engine/optimizers.py)
        return replace(setup, optimizer=name) if setup.optimizer in ("adamw", "adam") else None

    return applied


def _whole_state(setup: Setup, table: Table) -> Setup | None:
    """In place of a state in 8 bits, which stays on the GPU: a whole one can leave it."""
    return replace(setup, optimizer="adamw") if setup.device != "cpu" and setup.offload == "none" and "8bit" in setup.optimizer else None


def _optimizer_on_host(setup: Setup, table: Table) -> Setup | None:
    """In place of DeepSpeed's as well, which is never proposed: it needs more of both memories."""
    if setup.device == "cpu" or setup.offload not in ("none", zero2.NAME) or "8bit" in setup.optimizer:
        return None
    return replace(setup, offload="optimizer", buckets=None)


def _base_on_host(setup: Setup, table: Table) -> Setup | None:
    """Only where blocks are computed again: else each block's weights would be kept until the way back."""
    if setup.device == "cpu" or setup.offload != "none" or setup.checkpointing == "none" or setup.compiled or "base" not in table.offers:
        return None
    return replace(setup, offload="base")


TECHNIQUES = (
    Technique(
        "smaller micro-batch",
        EXACT,
        "train.micro_batch",
        _half_batch,
        lambda setup: f"train.micro_batch={setup.micro_batch}",
        True,
        "the same batch in more pieces: slower where pieces are small",
    ),
    Technique(
        "chunked cross-entropy",
        EXACT,
        "memory.logits",
        _chunked,
        lambda setup: f"memory.logits={setup.logits}",
        True,
        "the loss over all words in pieces: no slower",
    ),
    Technique(
        "selective checkpointing",
        EXACT,
        "train.activation_checkpointing",
        _again("selective"),
        lambda setup: "train.activation_checkpointing=selective",
        True,
        "blocks keep what is dear to compute; the rest is computed again",
    ),
    Technique(
        "full checkpointing",
        EXACT,
        "train.activation_checkpointing",
        _again("full"),
        lambda setup: "train.activation_checkpointing=full",
        True,
        "blocks keep their inputs only: about a third slower",
    ),
    Technique(
        "AdamW's whole state",
        DIFFERENT,
        "train.optimizer",
        _whole_state,
        lambda setup: f"train.optimizer={setup.optimizer}",
        False,
        "AdamW's state in fp32, four times that in 8 bits: but it need not stay on the GPU",
    ),
    Technique(
        "optimizer on the CPU",
        EXACT,
        "memory.offload",
        _optimizer_on_host,
        lambda setup: f"memory.offload={setup.offload}",
        True,
        "its state, its own copy of the weights and the gradients lie in RAM, 16 bytes per weight; each step waits for the bus and the CPU",
    ),
    Technique(
        "frozen base on the CPU",
        EXACT,
        "memory.offload",
        _base_on_host,
        lambda setup: f"memory.offload={setup.offload}",
        True,
        "the blocks' frozen weights lie in RAM, and a block's come to the GPU while it computes, twice for each micro-batch",
    ),
    Technique(
        "bf16 autocast",
        ROUNDING,
        "train.precision",
        _low,
        lambda setup: f"train.precision={setup.precision}",
        False,
        "products in bf16, weights and gradients stay in fp32",
    ),
    Technique(
        "no autocast",
        ROUNDING,
        "train.precision",
        _full,
        lambda setup: f"train.precision={setup.precision}",
        False,
        "products in fp32: a CPU then keeps no compiled low ones; slower where it computes bf16",
    ),
    Technique(
        "8-bit AdamW",
        DIFFERENT,
        "train.optimizer",
        _optimizer("adamw8bit"),
        lambda setup: f"train.optimizer={setup.optimizer}",
        False,
        "AdamW whose state is rounded to 8 bits in every step: a quarter of its memory, close to the same loss (bitsandbytes)",
    ),
    Technique(
        "paged 8-bit AdamW",
        DIFFERENT,
        "train.optimizer",
        _optimizer("paged_adamw8bit"),
        lambda setup: f"train.optimizer={setup.optimizer}",
        False,
        "8-bit AdamW whose state the driver moves out of a full GPU; on Windows it saves nothing over the one that is not paged",
    ),
    Technique(
        "Adafactor",
        DIFFERENT,
        "train.optimizer",
        _optimizer("adafactor"),
        lambda setup: f"train.optimizer={setup.optimizer}",
        False,
        "another optimizer: a row and a column per matrix instead of two copies; its learning rate must be found anew",
    ),
    Technique(
        "SGD",
        DIFFERENT,
        "train.optimizer",
        _optimizer("sgd"),
        lambda setup: "train.optimizer=sgd",
        False,
        "another optimizer: one copy instead of two; its learning rate must be found anew",
    ),
)
