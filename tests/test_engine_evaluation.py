"""Evaluation leaves no trace in the training; the best is remembered, kept and, with early stopping, exported."""

import json

import pytest
import torch

from tests.toy import LEAVE, NUM_EVAL, Script, Toy, config, lines, run, same, weights
from trainerd.contract.errors import TrainerdError
from trainerd.contract.paths import Home
from trainerd.engine import saver
from trainerd.engine.dropout import SampleDropout


def _evaluations(home):
    return [(line["step"], line["eval"]) for line in lines(home) if "eval" in line]


def test_it_comes_after_every_epoch_or_every_so_many_steps_and_at_the_end(tmp_path):
    """21 steps in 3 epochs: after 7, 14, 21; or as often as asked, and once more at the end."""
    run(tmp_path / "epochs", config())
    run(tmp_path / "steps", config({"eval_every_steps": 8}))
    run(tmp_path / "short", config({"max_steps": 10}))
    assert [step for step, _ in _evaluations(tmp_path / "epochs")] == [7, 14, 21]
    assert [step for step, _ in _evaluations(tmp_path / "steps")] == [8, 16, 21]
    assert [step for step, _ in _evaluations(tmp_path / "short")] == [7, 10]


def test_evaluating_more_often_changes_nothing_else(tmp_path):
    """No random draw, no mode, no statistic of the training knows of an evaluation."""
    run(tmp_path / "often", config({"eval_every_steps": 1}))
    run(tmp_path / "rarely", config())
    assert [line for line in lines(tmp_path / "often") if "loss" in line] == [line for line in lines(tmp_path / "rarely") if "loss" in line]
    often, rarely = weights(tmp_path / "often"), weights(tmp_path / "rarely")
    assert all(torch.equal(often[name], rarely[name]) for name in often)


def test_every_held_out_sample_counts_once_whatever_the_batches(tmp_path):
    """The sum over the whole split divided by its count, not a mean of means."""
    values = []
    for batch_size in (NUM_EVAL, 3):
        task = Toy()
        run(tmp_path / str(batch_size), config({"batch_size": batch_size, "lr": 1e-9, "epochs": 1}), task=task)
        assert sorted(task.eval_samples.log) == list(range(NUM_EVAL))
        values.append(_evaluations(tmp_path / str(batch_size))[-1][1]["loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_task_adds_its_own_values(tmp_path):
    """What evaluate() returns is in metrics, progress and result; the model is in eval mode and without gradients meanwhile."""

    class Scored(Toy):
        best_metric = "minus_score"

        def evaluate(self, model, ctx, losses):
            assert not model.training and not model.dropout.training and not torch.is_grad_enabled() and not ctx.training
            ctx.pulse()
            return {**losses, "minus_score": -2.0 * losses["tokens"]}

    link = Script()
    result = run(tmp_path, config({"epochs": 1}), link, Scored())
    values = result.metrics["eval"]
    assert values["minus_score"] == -2 * values["loss"]
    assert link.of("progress")[-1]["best"] == {**values, "step": 7}


def test_a_missing_best_metric_is_an_error(tmp_path):
    """The message names it, and what there was."""

    class Confused(Toy):
        best_metric = "accuracy"

    with pytest.raises(TrainerdError, match=r"no 'accuracy'.*tokens, loss"):
        run(tmp_path, config(), task=Confused())


def test_without_held_out_samples_nothing_is_evaluated(tmp_path):
    """And the run finishes all the same."""

    class Blind(Toy):
        def dataset(self, split):
            return super().dataset(split) if split == "train" else None

    link = Script()
    assert run(tmp_path, config({"early_stopping": 2}), link, Blind()).metrics["eval"] == {}
    assert "early_stopping does nothing" in link.of("warning")[0]["text"]


class Overfits(Toy):
    """Its evaluation is best at the second one."""

    def evaluate(self, model, ctx, losses):
        return {"loss": abs(ctx.epoch - 1) + 1.0, "real": losses["loss"]}


def test_early_stopping_exports_the_best_weights(tmp_path):
    """Two evaluations without a better one end the run; the result holds the weights of the best, byte for byte."""
    result = run(tmp_path / "stops", config({"epochs": 30, "scheduler": "constant", "early_stopping": 2}), task=Overfits())
    assert result.step == 4 * 7
    run(tmp_path / "two", config({"epochs": 2, "scheduler": "constant"}), task=Overfits())
    stopped, two = weights(tmp_path / "stops"), weights(tmp_path / "two")
    assert all(torch.equal(stopped[name], two[name]) for name in stopped)
    record = json.loads(Home(tmp_path / "stops").run("toy").result.read_text("utf-8"))
    assert (record["step"], record["exported_step"], record["best"]["step"]) == (28, 14, 14)


def test_the_best_checkpoint_is_kept(tmp_path):
    """Among the last three and the best there is the best, however long ago."""
    run(tmp_path, config({"epochs": 9}), task=Overfits())
    kept = sorted(int(p.stem.split("_")[-1]) for p in Home(tmp_path).run("toy").checkpoints.glob("checkpoint_*.pt"))
    assert 14 in kept and 63 in kept


def test_leaving_in_the_best_evaluation_does_not_lose_the_best(tmp_path):
    """The step was saved before its evaluation was done: after the resume it is the best one, and the same run comes out."""
    often = {"every_steps": 7, "exact": True}
    asked = config({"epochs": 30, "scheduler": "constant", "early_stopping": 5}, checkpoint=often)
    run(tmp_path / "whole", asked, task=Overfits())
    for look in (9, 17, 18, 19):
        home = tmp_path / str(look)
        assert run(home, asked, Script({look: LEAVE}), Overfits()).outcome == "left"
        run(home, asked, task=Overfits())
        assert same(tmp_path / "whole", home), look


def test_a_long_evaluation_lets_itself_be_asked_to_leave(tmp_path):
    """pulse() raises in it; the evaluation is done again after the resume, and the run is the same."""

    class Long(Toy):
        def evaluate(self, model, ctx, losses):
            for _ in range(100):
                torch.rand(3)
                ctx.pulse()
            return dict(losses)

    run(tmp_path / "whole", config(), task=Long())
    assert run(tmp_path / "parts", config(), Script({60: LEAVE}), Long()).step == 7
    run(tmp_path / "parts", config(), task=Long())
    assert same(tmp_path / "whole", tmp_path / "parts")


class _DiesEvaluating(Toy):
    """Killed in its first evaluation."""

    dies = True

    def evaluate(self, model, ctx, losses):
        if self.dies:
            raise KeyboardInterrupt
        return super().evaluate(model, ctx, losses)


@pytest.mark.parametrize("is_long", [True, False])
def test_what_was_trained_before_a_first_evaluation_survives_it(is_long, tmp_path, monkeypatch):
    """Killed in it, a run without any checkpoint yet goes on from the step of the evaluation, with the evaluation; only seconds that
    were trained are not worth that. Nothing of it changes a bit, also when each evaluation is long and has a save before it."""
    run(tmp_path / "whole", config())
    if is_long:
        monkeypatch.setattr(saver, "_WORTH_SECONDS", 0.0)
        monkeypatch.setattr(saver, "_LONG_SECONDS", 0.0)
        monkeypatch.setattr(saver, "_COST_SHARE", float("inf"))  # a save takes longer than these steps do
        monkeypatch.setattr(saver.Saver, "busy", property(lambda self: not self.wait()))  # nor is one still under way at the next
    asked = config(checkpoint={"every_steps": 1000})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", asked, task=_DiesEvaluating())
    again = Toy()
    link = Script()
    assert run(tmp_path / "killed", asked, link, task=again).outcome == "finished"
    steps = [event["step"] for event in link.of("progress")]
    assert steps[0] == (7 if is_long else 0)
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert [step for step, _ in _evaluations(tmp_path / "killed")] == [7, 14, 21]
    if is_long:
        saved = {(event["step"], event["epoch"]) for event in link.of("checkpoint")}
        assert {step for step, _ in saved} >= {7, 14, 21} and (21, 4) in saved, "before the last, too: what comes after it has another name"


def test_randomness_inside_a_sample_is_the_same_in_every_evaluation(tmp_path):
    """ctx.generator() depends on the epoch while training; while evaluating it does not, so that values can be compared."""
    drawn: list[float] = []

    class Noisy(Toy):
        def loss(self, model, batch, ctx):
            if not ctx.training:
                drawn.append(float(torch.rand((), generator=ctx.generator(ctx.sample_ids[0]))))
            return super().loss(model, batch, ctx)

    run(tmp_path, config({"batch_size": NUM_EVAL}), task=Noisy())
    assert len(drawn) == 3 and len(set(drawn)) == 1


def test_modules_are_in_the_mode_they_were_in(tmp_path):
    """A part that the task keeps in eval mode while training (a frozen encoder) stays in it."""

    class Half(Toy.model_kind):
        def __init__(self):
            super().__init__()
            self.part = SampleDropout(0.5).eval()

        def train(self, mode=True):
            super().train(mode)
            self.part.eval()
            return self

    modes = set()

    class Watching(Toy):
        model_kind = Half

        def loss(self, model, batch, ctx):
            modes.add((ctx.training, model.dropout.training, model.part.training))
            return super().loss(model, batch, ctx)

    run(tmp_path, config(), task=Watching())
    assert modes == {(True, True, False), (False, False, False)}
