"""`python -m tests.kept_home FOLDER`: makes, with this version, the home that later versions must still read and resume. No tests here.

Made once for each release and kept in tests/data/home-VERSION; never made anew for a version that was released. The run `half` was
stopped half way, `whole` is complete. FOLDER should be a place as a person's, for it stands in the files.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tests.person import Person
from trainerd.contract import status
from trainerd.engine.selftest import small_run

EPOCHS = 12
STOP_AT = 36
"""Half of the steps of `half`; at least so many."""
WORDS = (
    "--epochs", str(EPOCHS), "--set", "train.batch_size=8", "--set", "train.micro_batch=4", "--set", "train.lr=0.01",
    "--set", "train.eval_every_steps=10", "--set", "train.precision=fp32", "--set", "train.threads=1", "--set", "polite.priority=normal",
    "--set", "checkpoint.every_steps=4", "--set", "checkpoint.exact=true", "--set", "seed=3",
)  # fmt: skip
_LEFT_OUT = ("state", "control", "supervisor.lock", "trainer.lock", "__pycache__", "training_logs")


def make(root: Path) -> None:
    """Train there, and take away what belongs to living processes only."""
    person = Person(root)
    task = root.with_name("small_task.py")
    # A step takes a while, so that there is one to be stopped at.
    source = small_run.TASK_FILE.read_text("utf-8").replace("import torch\n", "import time\n\nimport torch\n", 1)
    first = "        numbers, inputs, targets = batch\n"
    source = source.replace(first, f"        time.sleep(0.02)\n{first}")
    task.write_text(source, encoding="utf-8")
    person.starts("--task", f"{task}:Small", *WORDS, "--name", "whole")
    assert person.waits_for_state(*status.END_STATES).state == status.COMPLETED, person.log()
    person.waits_until_gone()
    person.starts("--task", f"{task}:Small", *WORDS, "--name", "half")
    person.waits_for_step(STOP_AT)
    assert person.types("stop").returncode == 0
    person.waits_until_gone()
    for path in [*root.rglob("*")]:
        if path.name in _LEFT_OUT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    task.unlink()


if __name__ == "__main__":
    make(Path(sys.argv[1]))
