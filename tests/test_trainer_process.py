"""The trainer's process, for real: started, driven through its pipes, killed, resumed to the last bit, and never doubled."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.trainers import PREPARED, TASK, RunningTrainer, new_run, newest_step, outcome, steps_of
from trainerd.contract import wire
from trainerd.contract.lock import FileLock

Outcome = tuple[list[dict[str, Any]], bytes]
SLOW = {"TINY_PAUSE": "0.02"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningTrainer, Outcome]]:
    """A run that nothing happened to."""
    trainer = RunningTrainer(new_run(tmp_path_factory.mktemp("undisturbed"), **PREPARED))
    assert trainer.exit_code() == wire.EXIT_FINISHED, trainer.text()
    yield trainer, outcome(trainer.paths)


def test_a_run_from_hello_to_finished(undisturbed: tuple[RunningTrainer, Outcome]) -> None:
    """The events come in their order, stray prints land in the log, and exit 0 means the finished record is on the disk."""
    trainer, (steps, _) = undisturbed
    kinds = [message["event"] for message in trainer.events]
    order = [wire.HELLO, wire.CHECKED, wire.DATA, wire.PLAN, wire.CHECKPOINT, wire.FINISHED]
    assert [kind for kind in dict.fromkeys(kinds) if kind in order] == order and kinds[0] == wire.HELLO
    assert trainer.events[0]["pid"] == trainer.process.pid
    assert trainer.of(wire.DATA)[0] | {"rows": 99, "used": 96, "dropped": {"blank": 3}} == trainer.of(wire.DATA)[0]
    assert [step["step"] for step in steps] == list(range(1, 61))
    assert trainer.paths.result.exists() and newest_step(trainer.paths) == 60
    assert "a stray print" in trainer.text() and "preparing" in trainer.text() and "checkpoint: step" in trainer.text()
    assert trainer.of(wire.EXCEPTION) == [] and trainer.of(wire.WARNING) == []


def test_nothing_of_torch_before_hello() -> None:
    """What runs before HELLO and the locks imports no torch: a stop is heard while torch is still being imported."""
    program = "import trainerd.engine.process, sys; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=False).returncode == 0


_TELLS = """
import sys

class Tells(Tiny):
    def loss(self, model, batch, ctx):
        if ctx.step == 12:
            print("torch's compiler is loaded:", "torch._dynamo" in sys.modules, flush=True)
        return super().loss(model, batch, ctx)
"""


@pytest.mark.parametrize("train", [{}, {"precision": "fp16", "optimizer": "sgd", "deterministic": False}], ids=str)
def test_what_compiles_nothing_loads_no_compiler(tmp_path: Path, train: dict[str, Any]) -> None:
    """Neither a first life nor a resumed one loads torch's compiler: it would be a second of each start, and 70 MB of RAM."""
    paths = new_run(tmp_path, source=TASK + _TELLS, class_name="Tells", train=train, checkpoint={"every_steps": 3})
    trainer = RunningTrainer(paths, **SLOW)
    trainer.wait_for_step(13)
    trainer.kill()
    first = newest_step(paths)
    again = RunningTrainer(paths)
    assert again.exit_code() == wire.EXIT_FINISHED, again.text()
    told = [line.rpartition(" ")[2] for line in again.text().splitlines() if line.startswith("torch's compiler")]
    assert told and set(told) == {"False"} and first > 0


def test_kill_save_leave_and_a_vanished_supervisor_change_no_bit(tmp_path: Path, undisturbed: tuple[RunningTrainer, Outcome]) -> None:
    """SAVE is acknowledged by id; kill -9 loses nothing of it; the end of the command pipe and LEAVE commit before the exit;
    and after all of that, every number and the model are those of the undisturbed run."""
    paths = new_run(tmp_path, **PREPARED)
    trainer = RunningTrainer(paths, **SLOW)
    trainer.wait_for_step(6)
    trainer.command(do=wire.SAVE, id="request-1")
    acknowledged = trainer.wait_for(wire.CHECKPOINT, lambda message: message["request"] == "request-1")
    assert (tmp_path / acknowledged["path"]).exists()
    trainer.wait_for_step(acknowledged["step"] + 2)
    trainer.kill()
    assert newest_step(paths) >= acknowledged["step"]

    trainer = RunningTrainer(paths, **SLOW)
    first = trainer.wait_for(wire.PROGRESS)
    assert first["step"] >= acknowledged["step"] and trainer.of(wire.DATA)[0]["rows"] == 99
    assert not [message for message in trainer.of(wire.PHASE) if message["name"] == "preparing"], "prepared twice"
    trainer.wait_for_step(first["step"] + 7)
    assert trainer.process.stdin is not None
    trainer.process.stdin.close()
    assert trainer.exit_code(20) == wire.EXIT_LEFT
    assert newest_step(paths) == steps_of(paths)[-1]["step"] > first["step"]

    trainer = RunningTrainer(paths, **SLOW)
    trainer.wait_for_step(newest_step(paths) + 3)
    assert trainer.leave() == wire.EXIT_LEFT
    assert newest_step(paths) == steps_of(paths)[-1]["step"] < 60

    trainer = RunningTrainer(paths)
    assert trainer.exit_code() == wire.EXIT_FINISHED, trainer.text()
    assert outcome(paths) == undisturbed[1]
    assert not list(paths.checkpoints.glob("*.superseded*")) + list(paths.checkpoints.glob(".*"))

    trainer = RunningTrainer(paths)
    assert trainer.exit_code(20) == wire.EXIT_FINISHED and trainer.of(wire.FINISHED), "a finished run is not trained again"


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that can be filled without blocking")
def test_a_supervisor_that_reads_nothing_does_not_hold_it_up(tmp_path: Path, undisturbed: tuple[RunningTrainer, Outcome]) -> None:
    """With the event pipe full from the first step on, training runs to its end and to the same bits."""
    paths = new_run(tmp_path)
    trainer = RunningTrainer(paths, read=False)
    import fcntl

    assert trainer.process.stdout is not None
    fcntl.fcntl(trainer.process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    assert trainer.exit_code() == wire.EXIT_FINISHED, trainer.text()
    assert outcome(paths) == undisturbed[1]


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_a_log_out_commits(tmp_path: Path) -> None:
    """SIGTERM is a LEAVE; Ctrl-C is the supervisor's business and changes nothing."""
    paths = new_run(tmp_path)
    trainer = RunningTrainer(paths, **SLOW)
    trainer.wait_for_step(7)
    trainer.process.send_signal(signal.SIGINT)
    reached = trainer.wait_for_step(12)["step"]
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.exit_code(20) == wire.EXIT_LEFT and newest_step(paths) >= reached


def test_before_step_goes_back_past_a_poisoned_checkpoint(tmp_path: Path, undisturbed: tuple[RunningTrainer, Outcome]) -> None:
    """--before-step begins from an older checkpoint, sets the newer ones aside, and ends with the same bits."""
    paths = new_run(tmp_path)
    trainer = RunningTrainer(paths, **SLOW)
    trainer.wait_for_step(17)
    trainer.kill()
    newest = newest_step(paths)
    trainer = RunningTrainer(paths, before_step=newest)
    assert trainer.exit_code() == wire.EXIT_FINISHED, trainer.text()
    assert trainer.wait_for(wire.PROGRESS)["step"] < newest and list(paths.checkpoints.glob(f"*_step_{newest}.pt.superseded-1"))
    assert outcome(paths) == undisturbed[1]


# locks


def test_a_left_over_trainer_is_waited_for(tmp_path: Path) -> None:
    """While the home's lock is held it waits and says so; a stop is obeyed meanwhile, at once."""
    paths = new_run(tmp_path)
    left_over = FileLock(paths.home.trainer_lock)
    assert left_over.acquire()
    trainer = RunningTrainer(paths)
    assert "earlier trainer" in trainer.wait_for(wire.WAITING)["reason"]
    began = time.monotonic()
    assert trainer.leave() == wire.EXIT_LEFT and time.monotonic() - began < 30
    left_over.release()


def test_two_homes_on_one_device(tmp_path: Path) -> None:
    """The second waits, naming the first's home, and begins when the first has left."""
    first = RunningTrainer(new_run(tmp_path / "one"), state=tmp_path / "state", **SLOW)
    first.wait_for(wire.CHECKED)
    second = RunningTrainer(new_run(tmp_path / "two"), state=tmp_path / "state")
    reason = second.wait_for(wire.WAITING)["reason"]
    assert "the CPU" in reason and str(tmp_path / "one") in reason
    assert second.of(wire.CHECKED) == []
    assert first.leave() == wire.EXIT_LEFT
    second.wait_for(wire.CHECKED)
    assert second.exit_code() == wire.EXIT_FINISHED


# preparing


def child_of(trainer: RunningTrainer) -> psutil.Process:
    (child,) = psutil.Process(trainer.process.pid).children()
    return child


def test_a_stop_while_preparing_is_quick_and_leaves_nothing(tmp_path: Path) -> None:
    """Preparing happens in a child, its progress is told, and a LEAVE ends both at once; the next start prepares again."""
    paths = new_run(tmp_path, **PREPARED)
    trainer = RunningTrainer(paths, TINY_PREPARE="3000")
    told = trainer.wait_for(wire.PHASE, lambda message: message["name"] == "preparing" and (message["done"] or 0) > 10)
    assert told["unit"] == "rows"
    child = child_of(trainer)
    began = time.monotonic()
    assert trainer.leave() == wire.EXIT_LEFT and time.monotonic() - began < 30
    _, alive = psutil.wait_procs([child], timeout=60)
    assert not alive
    trainer = RunningTrainer(paths)
    assert trainer.exit_code() == wire.EXIT_FINISHED, trainer.text()


def test_the_preparing_child_does_not_outlive_a_killed_trainer(tmp_path: Path) -> None:
    """kill -9 of the trainer ends its preparing child too."""
    trainer = RunningTrainer(new_run(tmp_path, **PREPARED), TINY_PREPARE="3000")
    trainer.wait_for(wire.PHASE, lambda message: (message["done"] or 0) > 1)
    child = child_of(trainer)
    trainer.process.kill()
    trainer.exit_code()
    _, alive = psutil.wait_procs([child], timeout=60)
    assert not alive


# errors


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        ("prepare", wire.EXIT_PERMANENT, "The data is of no use."),
        ("model", wire.EXIT_PERMANENT, "this model is wrong"),
        ("first step", wire.EXIT_PERMANENT, "mat1 and mat2"),
        ("step", 1, "in the middle of training"),
    ],
)
def test_an_error_is_told_and_permanent_only_when_a_restart_cannot_help(tmp_path: Path, fail: str, code: int, words: str) -> None:
    """Errors of data and of the task before training are permanent; one in the middle of training is not. The traceback is
    in the log."""
    trainer = RunningTrainer(new_run(tmp_path, **(PREPARED if fail == "prepare" else {})), TINY_FAIL=fail)
    assert trainer.exit_code() == code
    (event,) = trainer.of(wire.EXCEPTION)
    assert words in event["text"] and event["permanent"] is (code == wire.EXIT_PERMANENT)
    assert "Traceback" in trainer.text() and words in trainer.text()


_EVALUATES = """
class Evaluates(Tiny):
    def dataset(self, split):
        return super().dataset("train")

    def evaluate(self, model, ctx, losses):
        if ctx.step >= int(os.environ.get("FAILS_FROM", 10**9)):
            raise KeyError("recall")
        return losses
"""


@pytest.mark.parametrize(("first", "code"), [(5, wire.EXIT_PERMANENT), (11, 1)])
def test_an_evaluation_that_never_went_well_is_not_tried_again(tmp_path: Path, first: int, code: int) -> None:
    """Like a first step: whatever checkpoint it begins from, it would fail again. After a good one it is restarted."""
    train = {"eval_every_steps": 10}
    paths = new_run(tmp_path, source=TASK + _EVALUATES, class_name="Evaluates", train=train)
    trainer = RunningTrainer(paths, FAILS_FROM=str(first))
    assert trainer.exit_code() == code and newest_step(paths) >= 5
    (event,) = trainer.of(wire.EXCEPTION)
    assert "recall" in event["text"] and event["permanent"] is (code == wire.EXIT_PERMANENT)


def test_a_broken_task_file_is_permanent(tmp_path: Path) -> None:
    """A file that cannot be loaded ends before CHECKED, names its line, and is never retried."""
    trainer = RunningTrainer(new_run(tmp_path, source=TASK + "\nundefined_name\n"))
    assert trainer.exit_code() == wire.EXIT_PERMANENT
    text = trainer.of(wire.EXCEPTION)[0]["text"]
    assert f"line {len(TASK.splitlines()) + 1}" in text or f"line {len(TASK.splitlines()) + 2}" in text
    assert "NameError" in text and trainer.of(wire.CHECKED) == []


def test_no_good_checkpoint_has_an_exit_of_its_own(tmp_path: Path) -> None:
    """When no checkpoint can be loaded it does not begin anew: exit 13, and the files are still there."""
    paths = new_run(tmp_path)
    paths.checkpoints.mkdir(parents=True)
    for suffix in (".pt", ".json"):
        (paths.checkpoints / f"checkpoint_epoch_1_step_5{suffix}").write_bytes(b"{}")
    trainer = RunningTrainer(paths)
    assert trainer.exit_code() == wire.EXIT_NO_CHECKPOINT
    assert trainer.of(wire.WARNING) and trainer.of(wire.EXCEPTION)[0]["permanent"]
    assert len(list(paths.checkpoints.glob("*.bad-1"))) == 2


# workers


def test_loader_workers_leave_no_process_behind(tmp_path: Path) -> None:
    """With two workers: after LEAVE none is left, and after kill -9 they end by themselves (the supervisor is faster)."""
    paths = new_run(tmp_path, train={"num_workers": 2})
    for end in (RunningTrainer.leave, RunningTrainer.kill):
        trainer = RunningTrainer(paths, **SLOW)
        trainer.wait_for(wire.PROGRESS, lambda message: message["loss"] is not None)
        workers = psutil.Process(trainer.process.pid).children(recursive=True)
        assert len(workers) >= 2
        end(trainer)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, [process.cmdline() for process in alive]
