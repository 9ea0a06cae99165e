"""Large blocks are used again by the next step: on Linux with glibc."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.trainers import TASK, RunningTrainer, new_run, steps_of
from trainerd.contract import wire

BLOCKS, BLOCK_BYTES = 4, 40 << 20  # above the 32 MiB from which glibc by itself always maps and unmaps
COUNTED = TASK.replace(
    "        x, y = batch\n",
    f"""        import resource
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range({BLOCKS}):
            torch.empty({BLOCK_BYTES}, dtype=torch.uint8).fill_(1)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        x, y = batch
""",
).replace(", 1.0)}, {}", ', 1.0)}, {"faults": float(faults)}')


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_trainer_does_not_fault_its_large_blocks_in_anew_in_every_step(tmp_path: Path) -> None:
    """A step that allocates 160 MB in large blocks takes next to no page faults after the first ones."""
    paths = new_run(tmp_path, source=COUNTED, train={"max_steps": 24})
    assert RunningTrainer(paths).exit_code() == wire.EXIT_FINISHED
    faults = [step["metrics"]["faults"] for step in steps_of(paths) if "metrics" in step]
    assert len(faults) == 24
    # The heap may still grow by a block now and then; mapped anew, every step would take four blocks' worth.
    assert sum(faults[4:]) / len(faults[4:]) < BLOCK_BYTES / 4096 / 2, faults
