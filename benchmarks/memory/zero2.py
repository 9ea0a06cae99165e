"""`python -m benchmarks.memory.zero2`: what a training with DeepSpeed's ZeRO-2 needs, counted over the whole of it, and what was foretold.

The real engine and the real package train the families on a CPU, over gloo, while every tensor is counted, checkpoints' copies included.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.memory import counted
from benchmarks.memory.families import HELD_OUT, KNOWN, family
from tests.memory_oracle import TensorCount
from trainerd.config.model import RunConfig
from trainerd.engine.loop import Link
from trainerd.engine.trainer import Trainer
from trainerd.memory.estimate import Estimate, estimate
from trainerd.memory.profile import Profile
from trainerd.memory.timeline import Setup
from trainerd.memory.zero2 import Buckets

BATCH = 8
CASES = (
    (8, "adamw", Buckets()),
    (4, "adamw", Buckets()),
    (2, "adam", Buckets(300_000)),
    (4, "sgd", Buckets(100_000, 2)),
    (8, "adamw", Buckets(20_000)),
)
"""Micro-batch, optimizer, and how large its buffers are."""


def needed(name: str, micro_batch: int, optimizer: str, buckets: Buckets, home: Path) -> int:
    """The most that was held at once."""
    own = home / "mine.json"
    zero = {"stage": 2, "reduce_bucket_size": buckets.numbers, "overlap_comm": buckets.copies == 2}
    own.write_text(json.dumps({"zero_optimization": zero}), "utf-8")
    asked = counted.configuration(BATCH, micro_batch=micro_batch, optimizer=optimizer, attention=family(name).attention)
    memory = {"memory": {"offload": "zero2", "deepspeed_config": str(own)}}
    asked.memory = RunConfig.model_validate(memory).memory
    with TensorCount() as count:
        Trainer(counted.FamilyTask(family(name), 3 * BATCH), asked, home=home, link=Link()).train()
    return count.peak


def foretold(name: str, micro_batch: int, optimizer: str, buckets: Buckets) -> Estimate:
    """The same by the tables, with no process beside the tensors."""
    attention = family(name).attention
    setup = Setup("cpu", "fp32", micro_batch, BATCH, optimizer, offload="zero2", attention=attention, buckets=buckets)
    with counted.counted_tapes():
        return estimate(counted.FamilyTable(f"{name} zero2", family(name)), setup, Profile(measured=True, process_bytes=0))


def main() -> None:
    """Every family in every case."""
    errors, beyond = [], 0
    for name in (*KNOWN, *HELD_OUT):
        for case in CASES:
            with tempfile.TemporaryDirectory() as home:
                truth = needed(name, *case, Path(home))
            found = foretold(name, *case)
            errors.append(abs(found.tensors / truth - 1))
            beyond += truth > found.ram.upper
            micro_batch, optimizer, buckets = case
            how = f"{micro_batch} of {BATCH}, {optimizer:5}, {buckets.copies} x {buckets.numbers:>9,}"
            print(f"{name:10} {how}  counted {truth / 1e6:8.2f} MB  {found.tensors / truth - 1:+.3%}  bound {found.ram.upper / truth:.3f}")
    middle = sorted(errors)[len(errors) // 2]
    print(f"{len(errors)} trainings: median error {middle:.3%}, largest {max(errors):.3%}, beyond the bound {beyond}")


if __name__ == "__main__":
    main()
