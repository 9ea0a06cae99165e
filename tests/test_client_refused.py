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
from trainerd.contract.errors import Refused
from trainerd.contract.status import Reading, Status
from trainerd.engine import fitting
from trainerd.memory import forecast
from trainerd.supervisor.opening import to_yaml
from trainerd.tasks.cadence import blocks
from trainerd.tasks.cadence.settings import CadenceSettings

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
        ("It would fit with --set train.lr=1.5 (1.0 GB at most) or --set a.b=1 (0.9 GB at most).", ["train.lr=1.5"]),
        ("It would be likely to fit with --set train.lr=1.5 --set a.b=1 (1.3 GB, 1.4 GB at most).", ["train.lr=1.5", "a.b=1"]),
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


@pytest.mark.parametrize(("fixed", "how"), [({}, "is likely to fit"), ({"batch_size": 8192, "micro_batch": 8192}, "fits")])
def test_the_trainers_own_words_say_how_much_it_needs_and_are_typed_out(tmp_path: Path, fixed: dict[str, int], how: str) -> None:
    """From the plan's answer over the trainer's refusal to the command in the status: whether it fits or is only likely to, with what of
    the memory, and all within what a status shows of a refusal."""
    asked = RunConfig.model_validate({"task": "cadence", "train": {"batch_size": 64, "precision": "bf16", **fixed}})
    table = blocks.table(CadenceSettings())
    small = forecast.answer(asked, forecast.Place("cpu", 260_000_000, "bf16"), table)
    assert small.least is not None
    budget = int(1_000_000_000 if fixed else small.least.estimate.needed.point + 1)
    answer = forecast.answer(asked, forecast.Place("cpu", budget, "bf16"), table)
    with pytest.raises(Refused, match=r"(B|bytes) at most\)") as error:
        fitting._refuse_too_large(answer)
    said = f"Refused: {error.value}"
    assert len(said) <= 300 and said.endswith(" at most).")
    changes = " ".join(f"--set {setting}" for setting in answer.proposals[0].settings)
    first = refused(tmp_path, said)[1]
    assert first.startswith(f"Start it as it {how} with: p start --config") and first.endswith(changes), first
