"""A run that was interrupted is, to the last bit, the run that was not."""

import multiprocessing
import shutil
import sys
import threading
import time

import pytest

from tests.toy import LEAVE, Script, Toy, config, lines, run, same, weights
from trainerd.contract.errors import NoGoodCheckpoint, TrainerdError, UsageError
from trainerd.contract.paths import Home
from trainerd.engine import loop

VARIANTS = {
    "plain": config(),
    "split": config({"micro_batch": 3, "eval_every_steps": 4}),
    "fp16": config({"precision": "fp16", "micro_batch": 4}),
    "bf16": config({"precision": "bf16"}),
    "sgd": config({"optimizer": "sgd", "scheduler": "linear", "max_grad_norm": None}),
    "adafactor": config({"optimizer": "adafactor", "scheduler": "polynomial"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_left_anywhere_resumes_to_the_last_bit(variant, tmp_path):
    """Left in a step, between steps, at an epoch's end or in an evaluation, and resumed: nothing differs."""
    asked = VARIANTS[variant]
    whole = Script()
    run(tmp_path / "whole", asked, whole)
    stops = range(1, whole.looks + 1, 3) if variant == "plain" else range(2, whole.looks + 1, 11)
    for look in stops:
        home = tmp_path / f"left-{look}"
        assert run(home, asked, Script({look: LEAVE})).outcome == "left"
        assert run(home, asked).outcome == "finished"
        assert same(tmp_path / "whole", home), f"left at look {look}"


def test_a_run_left_again_and_again_resumes_to_the_last_bit(tmp_path):
    """A resume of a resume of a resume is still the same run."""
    asked = config({"micro_batch": 3, "eval_every_steps": 5})
    run(tmp_path / "whole", asked)
    starts = 0
    while run(tmp_path / "parts", asked, Script({5 + starts % 4: LEAVE})).outcome == "left":
        starts += 1
    assert starts > 5
    assert same(tmp_path / "whole", tmp_path / "parts")


class _Dies(Exception):
    pass


class _Mortal(Toy):
    """Dies at a step without a word, as a killed process does."""

    dies_at: int

    def loss(self, model, batch, ctx):
        if ctx.training and ctx.step == self.dies_at:
            raise _Dies
        return super().loss(model, batch, ctx)


def test_a_crash_costs_steps_but_no_bit(tmp_path):
    """What was trained after the last checkpoint is trained again, and its lines in the metrics are not doubled."""
    asked = config({"micro_batch": 3}, checkpoint={"every_steps": 4, "exact": True})
    run(tmp_path / "whole", asked)
    for dies_at in (2, 6, 7, 13, 20):
        task = _Mortal()
        task.dies_at = dies_at
        with pytest.raises(_Dies):
            run(tmp_path / "killed", asked, task=task)
    assert run(tmp_path / "killed", asked).outcome == "finished"
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_a_run_with_loader_workers_resumes_to_the_last_bit(tmp_path):
    """Workers change nothing: not the run, and not its resume in the middle of an epoch."""
    run(tmp_path / "whole", config())
    asked = config({"num_workers": 2})
    assert run(tmp_path / "workers", asked, Script({9: LEAVE})).outcome == "left"
    assert run(tmp_path / "workers", asked).outcome == "finished"
    assert same(tmp_path / "whole", tmp_path / "workers")


def test_early_stopping_counts_on_after_a_resume(tmp_path):
    """How many evaluations were no better is part of the state: the run stops where it would have."""
    asked = config({"epochs": 40, "lr": 0.3, "early_stopping": 2})
    whole = Script()
    result = run(tmp_path / "whole", asked, whole)
    assert result.step < 40 * 7
    home = tmp_path / "parts"
    assert run(home, asked, Script({whole.looks - 3: LEAVE})).outcome == "left"
    assert run(home, asked).step == result.step
    assert same(tmp_path / "whole", home)


def test_a_resume_reads_no_sample_that_was_used(tmp_path):
    """The order is computed, not replayed: the first sample read is the next one."""
    asked = config({"epochs": 1})
    before, after = Toy(), Toy()
    run(tmp_path, asked, Script({5: LEAVE}), task=before)
    run(tmp_path, asked, task=after)
    assert sorted(before.train_samples.log + after.train_samples.log) == list(range(50))


def test_the_plan_is_kept_and_not_resolved_again(tmp_path):
    """Another number of threads or another micro-batch in the configuration does not change a run that has begun."""
    run(tmp_path, config({"micro_batch": 4}), Script({5: LEAVE}))
    link = Script()
    run(tmp_path, config({"micro_batch": 2, "threads": 2}), link)
    assert link.of("plan")[0]["micro_batch"] == 4
    assert link.of("plan")[0]["record"]["threads"] == 1


def test_more_epochs_may_be_asked_for_on_resume(tmp_path):
    """The length of a run may change; what was trained stays."""
    run(tmp_path, config(), Script({12: LEAVE}))
    before = [line for line in lines(tmp_path) if "loss" in line]
    result = run(tmp_path, config({"epochs": 5}))
    assert result.step == 35
    assert [line for line in lines(tmp_path) if "loss" in line][: len(before)] == before


@pytest.mark.parametrize("less", [{"epochs": 1}, {"max_steps": 11}])
def test_an_end_that_lies_behind_is_refused(tmp_path, less):
    """Asked to end before the step that was reached, it says where it is instead of being done at once."""
    run(tmp_path, config(), Script({16: LEAVE}))
    with pytest.raises(UsageError, match="has reached step 13"):
        run(tmp_path, config(less))
    assert run(tmp_path, config({"max_steps": 13})).step == 13


def test_lost_checkpoints_are_no_beginning(tmp_path):
    """With the whole folder gone the run stops and says so; one that died before its first checkpoint begins again, aloud."""
    run(tmp_path, config(), Script({5: LEAVE}))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(NoGoodCheckpoint, match="are gone"):
        run(tmp_path, config())
    run(tmp_path / "other", config(), Script({5: {**LEAVE, "save": False}}))
    assert lines(tmp_path / "other")
    link = Script()
    assert run(tmp_path / "other", config(), link).outcome == "finished"
    assert "was ever saved" in link.of("warning")[0]["text"]


def test_damaged_metrics_are_told_and_kept(tmp_path):
    """A changed line before the checkpoint is noticed, the run goes on to the same weights, and the next resume is quiet."""
    run(tmp_path / "whole", config())
    run(tmp_path / "parts", config(), Script({9: LEAVE}))
    metrics = Home(tmp_path / "parts").run("toy").metrics
    metrics.write_bytes(metrics.read_bytes().replace(b'"step":2,', b'"step":9,', 1))
    link = Script({9: LEAVE})
    run(tmp_path / "parts", config(), link)
    assert ["sha256" in e["text"] for e in link.of("warning")] == [True]
    link = Script()
    run(tmp_path / "parts", config(), link)
    assert link.of("warning") == []
    assert weights(tmp_path / "parts").keys() == weights(tmp_path / "whole").keys()
    assert all((value == weights(tmp_path / "whole")[name]).all() for name, value in weights(tmp_path / "parts").items())


def test_a_checkpoint_from_before_the_hash_of_the_metrics_resumes(tmp_path):
    """States and manifests without it are as good as ever."""
    run(tmp_path / "whole", config())
    training, old = Script({9: LEAVE}), loop.Training.facts
    try:
        loop.Training.facts = lambda self: {key: value for key, value in old(self).items() if key != "metrics_sha256"}
        run(tmp_path / "parts", config(), training)
    finally:
        loop.Training.facts = old
    link = Script()
    run(tmp_path / "parts", config(), link)
    assert link.of("warning") == [] and same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/toy", "models/toy", "models/toy/a.txt", "runs/toy/metrics.jsonl", "runs"])
def test_nothing_is_written_through_a_link(tmp_path, place):
    """A link in the home, in place of a folder or a file that a training writes, is refused by name."""
    outside, home = tmp_path / "outside", tmp_path / "home"
    outside.mkdir()
    link = home / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "file" if link.suffix else outside)
    with pytest.raises(UsageError, match=f"{link.name} is a link"):
        run(home, config())
    assert list(outside.iterdir()) == []


def test_other_data_is_refused(tmp_path):
    """Samples that came or went since the run began are said aloud, not trained on."""
    run(tmp_path, config(), Script({5: LEAVE}))
    task = Toy()
    task.train_samples.rows = task.train_samples.rows[:20]
    task.train_samples.lengths = task.train_samples.lengths[:20]
    with pytest.raises(TrainerdError, match="The data has changed"):
        run(tmp_path, config(), task=task)


def test_another_model_is_refused(tmp_path):
    """A checkpoint that does not fit names the first tensor that differs."""
    run(tmp_path, config(), Script({5: LEAVE}))

    class Wider(Toy.model_kind):
        def __init__(self):
            super().__init__()
            self.extra = type(self.mix)(8, 3)

    task = Toy()
    task.model_kind = Wider
    with pytest.raises(TrainerdError, match=r"extra\.bias is only in the model"):
        run(tmp_path, config(), task=task)


def test_asked_to_leave_without_saving_it_saves_nothing(tmp_path):
    """`stop --now` leaves at once; the run stays where its last checkpoint is."""
    assert run(tmp_path, config(), Script({5: {**LEAVE, "save": False}})).outcome == "left"
    assert not list(Home(tmp_path).run("toy").checkpoints.glob("*.json"))


def test_no_thread_and_no_process_is_left_behind(tmp_path):
    """After train() a library user's process is as before: no saving thread, no loader worker."""
    before = set(threading.enumerate())
    run(tmp_path, config({"num_workers": 1, "epochs": 1}))
    deadline = time.monotonic() + 20  # a closed queue's feeder thread ends by itself, a moment later
    while not set(threading.enumerate()) <= before or multiprocessing.active_children():
        assert time.monotonic() < deadline, f"left: {set(threading.enumerate()) - before}, {multiprocessing.active_children()}"
        time.sleep(0.02)


def test_a_save_is_acknowledged_with_its_request(tmp_path):
    """Who asked for a checkpoint hears of that one."""
    link = Script({4: {"do": "save", "id": "abc"}})
    run(tmp_path, config(), link)
    assert [e["step"] for e in link.of("checkpoint") if e["request"] == "abc"] == [4]


def test_a_large_batch_is_broken_off_to_leave_soon(tmp_path):
    """Between two micro-batches the trainer looks up: the step is not done, and nothing of it is left."""
    asked = config({"micro_batch": 1})
    run(tmp_path / "whole", asked)
    assert run(tmp_path / "parts", asked, Script({12: LEAVE})).step == 1
    run(tmp_path / "parts", asked)
    assert same(tmp_path / "whole", tmp_path / "parts")
