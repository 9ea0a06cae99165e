"""What this machine cannot do is refused before anything is started, with what to set instead: exit 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from client import able, packages
from tests.person import Person
from trainerd.config.model import RunConfig
from trainerd.contract.paths import Home
from trainerd.machine import gpu

CASES = [
    ("adamw", False, None, None),
    ("adamw8bit", True, True, None),
    ("adamw8bit", True, False, None),
    ("adamw8bit", False, True, None),
    ("adamw8bit", False, False, "on GPUs only; update bitsandbytes"),
    ("adamw8bit", True, None, "pip install bitsandbytes"),
    ("paged_adamw8bit", True, True, None),
    ("paged_adamw8bit", False, True, "set train.optimizer=adamw8bit"),
    ("paged_adamw8bit", False, False, "set train.optimizer=adamw."),
]


@pytest.mark.parametrize(("optimizer", "on_gpu", "steps_on_cpus", "said"), CASES)
def test_an_optimizer_is_refused_where_it_cannot_run(
    optimizer: str, on_gpu: bool, steps_on_cpus: bool | None, said: str | None
) -> None:
    """Without bitsandbytes, with one that knows only GPUs, and paging without a GPU; nothing else is."""
    config = RunConfig.model_validate({"train": {"optimizer": optimizer}})
    found = able.problems(config, on_gpu, steps_on_cpus) if optimizer != "adamw" else []
    assert (not found) if said is None else (len(found) == 1 and said in found[0] and f"train.optimizer = {optimizer}" in found[0])


def test_what_bitsandbytes_computes_on_cpus_is_read_from_its_files(tmp_path: Path) -> None:
    """The kernel's name in its CPU part; an older version has none, and one without that part neither."""
    part = tmp_path / "backends" / "cpu" / "ops.py"
    assert packages.bitsandbytes_steps_on_cpus(tmp_path) is False
    part.parent.mkdir(parents=True)
    part.write_text("register_kernel('bitsandbytes::quantize_4bit', 'cpu')", encoding="utf-8")
    assert packages.bitsandbytes_steps_on_cpus(tmp_path) is False
    part.write_text('register_kernel("bitsandbytes::optimizer_update_8bit_blockwise", "cpu")', encoding="utf-8")
    assert packages.bitsandbytes_steps_on_cpus(tmp_path) is True


@pytest.mark.skipif(bool(gpu.devices()), reason="there is a GPU here, and paging works")
@pytest.mark.parametrize("command", ["start", "plan"])
def test_a_start_is_refused_with_exit_2_and_nothing_is_written(command: str, home: Home, tmp_path: Path) -> None:
    """No supervisor, no run; and a plan for another machine is still answered."""
    person = Person(home.root, tmp_path / "state")
    done = person.types(command, "--set", "train.optimizer=paged_adamw8bit")
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr, done.stderr
    assert not list(home.root.iterdir())
    if command == "plan":
        done = person.types("plan", "--budget", "3.5GB", "--set", "train.optimizer=paged_adamw8bit")
        assert done.returncode == 0, done.stderr
