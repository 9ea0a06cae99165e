"""The result of a training on a disk that fails: tried again, and when it is given up everything is saved and nothing is trained twice."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.disks import FailingDisk, RecordingDisk
from tests.toy import LEAVE, Script, Toy, config, lines, run, same, weights
from tests.trainers import TASK, RunningTrainer, new_run, newest_step
from trainerd.contract import files, wire
from trainerd.contract.errors import ExportFailed, NotExported
from trainerd.contract.paths import Home
from trainerd.engine import finishing, space
from trainerd.engine.checkpoints import CheckpointStore

OFTEN = {"every_steps": 4, "exact": True}
SHORT = {"epochs": 1}


class Once(Script):
    """Asks to leave as soon as the training says that it waits."""

    left = False

    def command(self) -> dict[str, Any] | None:
        if self.left or not self.of(wire.WAITING):
            return None
        self.left = True
        return LEAVE


class BestInTheMiddle(Toy):
    """Whatever it learns, its evaluations are best half way."""

    def loss(self, model: Any, batch: Any, ctx: Any) -> Any:
        losses, more = super().loss(model, batch, ctx)
        factor = 1.0 if ctx.training else 1.0 + abs(ctx.step - 10)
        return {name: (value * factor, weight) for name, (value, weight) in losses.items()}, more


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "_PAUSES_SECONDS", (0.0, 0.0))


def last_weights(home: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """(step, weights) of the newest checkpoint."""
    store = CheckpointStore(Home(home).run("toy").checkpoints)
    step = store.committed()[-1].step
    state = store.read_step(step)
    assert state is not None
    return step, state["model"]


def test_a_disk_that_fails_once_anywhere_in_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO at each third operation from the last commit to the finished record: it is written anew, nothing is different or left over."""
    recording = RecordingDisk()
    monkeypatch.setattr(files, "disk", recording)
    run(tmp_path / "whole", config(SHORT, checkpoint=OFTEN))
    first = next(n for n, (kind, name) in enumerate(recording.seen, 1) if kind == "make_folder" and name == "models")
    places = [n for n in range(first, len(recording.seen) + 1) if recording.seen[n - 1][0] != "unlink"]
    assert len(places) > 10
    for place in places[::3]:
        home = tmp_path / f"fails-{place}"
        disk = FailingDisk(lambda number, kind, name, place=place: number == place, errno.EIO)
        monkeypatch.setattr(files, "disk", disk)
        link = Script()
        assert run(home, config(SHORT, checkpoint=OFTEN), link).outcome == "finished"
        reason = link.of(wire.WAITING)[0]["reason"]
        assert "Input/output error" in reason and "All that was trained is saved (step 7)" in reason, reason
        assert same(tmp_path / "whole", home), recording.seen[place - 1]
        assert {path.name for path in (home / "models").rglob("*")} == {path.name for path in (tmp_path / "whole" / "models").rglob("*")}


@pytest.mark.parametrize("at", [("create", "result.json"), ("sync", "model.safetensors")])
def test_a_result_that_is_given_up_is_written_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: tuple[str, str]
) -> None:
    """After so many attempts it ends with what to do; the next start trains nothing and writes what would have been written."""
    run(tmp_path / "whole", config(checkpoint=OFTEN))
    home = tmp_path / "failing"
    monkeypatch.setattr(files, "disk", FailingDisk(lambda number, kind, name: kind == at[0] and at[1] in name, errno.EIO))
    with pytest.raises(NotExported, match=rf"{at[1]}.*Input/output error\. All that was trained is saved \(step 21\)\. .*`resume`"):
        run(home, config(checkpoint=OFTEN))
    monkeypatch.undo()
    assert not Home(home).run("toy").result.exists() and last_weights(home)[0] == 21
    assert not [path for path in (home / "models").rglob("*") if files.is_temporary(path)]
    task = Toy()
    assert run(home, config(checkpoint=OFTEN), task=task).outcome == "finished"
    assert task.train_samples.log == [] and same(tmp_path / "whole", home)


def test_what_is_only_in_memory_is_never_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no checkpoint can be written either, it waits for as long as it takes, and says what is at stake; it may be stopped."""
    run(tmp_path / "whole", config(checkpoint=OFTEN))
    left = [40]

    def fails(number: int, kind: str, name: str) -> bool:
        """Neither the last checkpoint nor the result, for many attempts."""
        if kind != "create" or not ("step_21" in name or "model" in name or "config.json" in name):
            return False
        left[0] -= 1
        return left[0] >= 0

    monkeypatch.setattr(files, "disk", FailingDisk(fails, errno.EIO))
    link = Script()
    assert run(tmp_path / "failing", config(checkpoint=OFTEN), link).outcome == "finished"
    reasons = [told["reason"] for told in link.of(wire.WAITING)]
    assert len(reasons) > 10 and "the last steps are only in memory" in reasons[0], reasons[:1]
    assert same(tmp_path / "whole", tmp_path / "failing")
    left[0] = 10**9
    assert run(tmp_path / "stopped", config(checkpoint=OFTEN), Once()).outcome == "left"
    monkeypatch.undo()
    assert run(tmp_path / "stopped", config(checkpoint=OFTEN)).outcome == "finished"
    assert same(tmp_path / "whole", tmp_path / "stopped")


def test_no_result_before_all_of_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that takes neither the last checkpoint nor the last lines of the metrics there is no result that would outlive them;
    once the metrics are whole it is written, checkpoint or not."""
    stuck = {"metrics.jsonl", "step_7"}

    def fails(number: int, kind: str, name: str) -> bool:
        return kind in ("create", "write") and any(part in name for part in stuck)

    monkeypatch.setattr(files, "disk", FailingDisk(fails, errno.ENOSPC))
    monkeypatch.setattr(space, "_LOOK_SECONDS", 0.001)
    asked = config(SHORT, checkpoint={"every_steps": 100})
    assert run(tmp_path / "both", asked, Once()).outcome == "left"
    assert not Home(tmp_path / "both").run("toy").result.exists()
    stuck.remove("metrics.jsonl")
    assert run(tmp_path / "checkpoint", asked).outcome == "finished"
    assert sum("loss" in line for line in lines(tmp_path / "checkpoint")) == 7 and newest(tmp_path / "checkpoint") == 0


def newest(home: Path) -> int:
    return newest_step(Home(home).run("toy"))


def test_the_best_weights_are_never_saved_as_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With early stopping the best weights are exported; a last checkpoint that is saved late still holds the last ones."""
    asked = config({"early_stopping": 50, "eval_every_steps": 1}, checkpoint=OFTEN)
    run(tmp_path / "whole", asked, task=BestInTheMiddle())
    last, whole = last_weights(tmp_path / "whole")
    best = weights(tmp_path / "whole")
    assert any(not torch.equal(whole[name], value) for name, value in best.items()), "the last evaluation is the best one"
    left = [3]

    def fails(number: int, kind: str, name: str) -> bool:
        hit = kind == "create" and f"step_{last}." in name and left[0] > 0
        left[0] -= hit
        return hit

    monkeypatch.setattr(files, "disk", FailingDisk(fails, errno.EIO))
    assert run(tmp_path / "failing", asked, task=BestInTheMiddle()).outcome == "finished"
    assert left[0] == 0
    step, found = last_weights(tmp_path / "failing")
    assert step == last and all(torch.equal(found[name], value) for name, value in whole.items())
    assert same(tmp_path / "whole", tmp_path / "failing")


def test_a_trainer_without_a_disk_for_its_result_says_so_and_is_not_restarted(tmp_path: Path) -> None:
    """The process ends as permanent, in words, with its last checkpoint; once the disk is mended the next one finishes at once."""
    broken = tmp_path / "broken"
    broken.touch()
    source = TASK + (
        "\n    def export(self, model, folder):\n"
        f"        if os.path.exists({str(broken)!r}):\n"
        "            raise OSError(5, os.strerror(5), str(folder / 'more.bin'))\n"
        "from trainerd.engine import finishing\nfinishing._PAUSES_SECONDS = (0.01,)\n"
    )
    paths = new_run(tmp_path / "home", source=source)
    trainer = RunningTrainer(paths)
    assert trainer.exit_code(180) == wire.EXIT_PERMANENT
    (told,) = trainer.of(wire.EXCEPTION)
    assert told["permanent"] and "more.bin: Input/output error" in told["text"] and "`resume` writes the result" in told["text"]
    assert newest_step(paths) == 60 and not paths.result.exists()
    broken.unlink()
    trainer = RunningTrainer(paths)
    assert trainer.exit_code(180) == wire.EXIT_FINISHED and paths.result.exists()
    assert lines_of(trainer) == []


def lines_of(trainer: RunningTrainer) -> list[int]:
    """The steps it trained."""
    return [told["step"] for told in trainer.of(wire.PROGRESS) if told["step"] != 60]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("classes"), "KeyError: 'classes'"),
        (FileNotFoundError(2, "No such file or directory", "template.json"), "template.json"),
        (SystemExit("no good"), "SystemExit: no good"),
    ],
    ids=["program", "no such file", "exit"],
)
def test_an_error_of_the_tasks_own_is_none_of_the_disks(tmp_path: Path, error: BaseException, words: str) -> None:
    """What export() of a task raises is not waited for: it is the task's to mend, in whichever step of the run it comes."""

    class Broken(Toy):
        def export(self, model: Any, folder: Path) -> None:
            raise error

    link = Script()
    with pytest.raises(ExportFailed, match=rf"(?s)export\(\) failed: line \d+: .*{words}.*saved \(step 7\).*Mend export"):
        run(tmp_path, config(SHORT), link, Broken())
    assert link.of(wire.WAITING) == [] and lines(tmp_path)


def test_no_error_of_the_tasks_own_gives_up_what_is_only_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the last steps cannot be saved it waits with them, export() or not; once they are saved it ends."""

    class Broken(Toy):
        def export(self, model: Any, folder: Path) -> None:
            raise KeyError("classes")

    left = [6]

    def fails(number: int, kind: str, name: str) -> bool:
        left[0] -= kind == "create" and "step_7" in name
        return kind == "create" and "step_7" in name and left[0] >= 0

    monkeypatch.setattr(files, "disk", FailingDisk(fails, errno.ENOSPC))
    monkeypatch.setattr(space, "_LOOK_SECONDS", 0.001)
    link = Script()
    with pytest.raises(ExportFailed):
        run(tmp_path, config(SHORT, checkpoint={"every_steps": 100}), link, Broken())
    assert link.of(wire.WAITING) and last_weights(tmp_path)[0] == 7
