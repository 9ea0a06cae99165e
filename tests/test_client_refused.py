"""After a training that was refused as too large, the status offers what works: the same again with the change it names."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from client import view
from tests.trainers import TASK
from trainerd.config.load import resolve
from trainerd.config.model import RunConfig
from trainerd.contract import status
from trainerd.contract.status import Reading, Status
from trainerd.supervisor.opening import to_yaml

SAID = "Refused: It does not fit: it needs 1.0 GB of RAM, and 0.7 GB are left for it (memory.ram_limit). "
RUN = "tiny-20261122-012921"


def refused(home: Path, said: str, run: str = RUN) -> list[str]:
    shown = Status(run=run, home=str(home), config=f"runs/{run}/config.yml", state=status.FAILED)
    shown.trainer.last_exit = said
    return view.what_next(Reading(status.FAILED, "It does not fit.", shown, False), "p")


@pytest.mark.parametrize(
    ("ways", "first"),
    [
        ("It would fit with --set train.micro_batch=4.", ["train.micro_batch=4"]),
        ("It would fit with --set train.micro_batch=4 --set memory.keep=1 or --set a.b=1.", ["train.micro_batch=4", "memory.keep=1"]),
        ("These alone would fit with --set memory.ram_limit=3.5GB.", ["memory.ram_limit=3.5GB"]),
    ],
)
def test_what_it_names_is_typed_out(tmp_path: Path, ways: str, first: list[str]) -> None:
    """A command that can be copied: the run's own configuration, from its file, with the first of the ways; a run that a person named has
    another name then."""
    task = tmp_path / "my task.py"
    task.write_text(TASK, "utf-8")
    (tmp_path / "runs" / RUN).mkdir(parents=True)
    config = RunConfig(task=f"{task}:Tiny", train={"batch_size": 64, "micro_batch": 64})
    (tmp_path / "runs" / RUN / "config.yml").write_text(to_yaml(config.model_dump(mode="json")), "utf-8")
    _, start, later = refused(tmp_path, SAID + ways)
    _, begin, option, file, *rest = shlex.split(start.partition(" with: ")[2])
    assert (begin, option) == ("start", "--config") and rest == [word for setting in first for word in ("--set", setting)]
    asked = resolve(None, None, file, first[:1], {})
    assert asked.task_file == task and later.endswith("p resume")
    assert "--name mine-smaller" in refused(tmp_path, SAID + ways, "mine")[1] and "--name" not in start


@pytest.mark.parametrize("ways", ["A smaller model would.", "It would fit with --set train.micro_ba…"])
def test_where_nothing_would_help_more_memory_does(tmp_path: Path, ways: str) -> None:
    """Nor is a setting typed out that was cut off. Whatever else ended it, `resume` tries it again."""
    assert refused(tmp_path, SAID + ways)[1:] == ["Once there is more memory: p resume"]
    assert refused(tmp_path, "KeyError: 'x'")[1:] == ["Try again with: p resume"]
