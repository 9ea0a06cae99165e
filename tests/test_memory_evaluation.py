"""What an evaluation holds, against counts: the losses of every family through the engine's own evaluation, and CADENCE's completions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.memory import counted
from benchmarks.memory.families import HELD_OUT, KNOWN, family
from tests.memory_oracle import Budget, TensorCount
from tests.toy import LEAVE, Script, Toy, lines, run, weights
from tests.toy import config as toy_config
from trainerd.config.model import DataConfig, RunConfig
from trainerd.engine import attention, dropout
from trainerd.engine.evaluation import Evaluation
from trainerd.engine.precision import Precision
from trainerd.engine.task import TaskContext
from trainerd.engine.trainer import Trainer
from trainerd.memory.tape import Tape
from trainerd.memory.timeline import EVALUATING, STEP, Setup
from trainerd.tasks.cadence import blocks, completing, measures, model
from trainerd.tasks.cadence.search import Prompt, complete
from trainerd.tasks.cadence.settings import DEFAULTS, CadenceSettings
from trainerd.tasks.cadence.task import CadenceTask
from trainerd.tasks.cadence.vocabulary import Vocabulary, word_tokenizer

CPU = torch.device("cpu")
_SUMS_BYTES = 8 + 4  # what evaluation.py adds up in, and the loss of this micro-batch
FAMILIES = [*KNOWN, *HELD_OUT]


class _HeldOut(counted.FamilyTask):
    """Two micro-batches of held-out samples."""

    def dataset(self, split: str) -> Any:
        return range(self._rows)


def _counted(name: str, samples: int, precision: str) -> int:
    """The engine's evaluation at its highest, beside the weights."""
    parts = family(name)
    task = _HeldOut(parts, 2 * samples)
    task.bind(TaskContext(device=CPU, dtype=torch.float32, seed=0, cache_dir=None, data=None))  # type: ignore[arg-type]
    mixed = Precision(precision, CPU)
    made = mixed.prepare(task.model().train())
    dropout.attach(made, task.ctx)
    evaluation = Evaluation(task, made, mixed, task.dataset("eval"), None, batch_size=samples, every_steps=None, patience=None)
    with attention.for_trace(parts.attention), TensorCount([*made.parameters(), *made.buffers()]) as count:
        assert evaluation.run(1, 0, lambda: False, lambda *_: None)
    return count.peak - count.known


CELLS = [
    pytest.param(name, samples, precision, marks=[] if samples == 1 and (place + kind) % 2 else pytest.mark.slow)
    for place, name in enumerate(FAMILIES)
    for kind, precision in enumerate(("fp32", "bf16"))
    for samples in (1, 4, 16)
]


@pytest.mark.parametrize(("name", "samples", "precision"), CELLS)
def test_the_losses_of_an_evaluation_hold_what_is_foretold(name: str, samples: int, precision: str) -> None:
    """To the byte: without gradients, dropout or statistics of the batch."""
    parts = family(name)
    with counted.counted_tapes():
        line = counted.FamilyTable(name, parts).timeline(Setup("cpu", precision, samples, samples, attention=parts.attention))
    assert _counted(name, samples, precision) - _SUMS_BYTES == line.peaks[EVALUATING] - line.resting_bytes


_GRU_MN: dict[str, Any] = {"embedding": 64, "hidden": [80, 60], "attention": [40, 30], "context": 20}
MODELS: dict[str, dict[str, Any]] = {
    "gru": {"gru": {"hidden": 48}},
    "gru-mn": {"model": "gru-mn", "gru_mn": _GRU_MN},
    "plain gru-mn": {"model": "gru-mn", "gru_mn": {**_GRU_MN, "attention": []}},
}
_ALL: dict[str, Any] = {"p1": 0, "p2": 0, "p3": 0, "groups": 6, "gamma": 3, "delta": 6}
"""Whatever is thinkable is followed: the worst there is."""


def _small(name: str, **search: Any) -> tuple[CadenceSettings, Vocabulary, model.QueryModel]:
    settings = CadenceSettings.model_validate({**MODELS[name], "search": {**_ALL, **search}})
    vocabulary = Vocabulary(word_tokenizer([f"w{number:03d}" for number in range(300)]), ["a", "b"], [5, 5])
    torch.manual_seed(0)
    return settings, vocabulary, model.build(settings, vocabulary.num_tokens, vocabulary.num_outputs, vocabulary.num_marks).eval()


@pytest.mark.parametrize(
    ("name", "precision", "method"),
    [
        ("gru", "fp32", "dynamic"),
        ("gru", "bf16", "dynamic"),
        ("gru", "fp32", "plain"),
        ("gru-mn", "fp32", "dynamic"),
        ("gru-mn", "bf16", "dynamic"),
        ("plain gru-mn", "bf16", "dynamic"),
    ],
)
def test_completions_hold_at_worst_what_is_foretold(name: str, precision: str, method: str) -> None:
    """To the byte where every thinkable path is followed to the last word: what each remembers, twice, and the scores of all words."""
    settings, vocabulary, made = _small(name, method=method)
    prompts = [Prompt(number % 2, tuple(range(5, 10))) for number in range(4)]
    with TensorCount(made.parameters()) as count, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        complete(made, vocabulary, prompts, completing.NUM_COMPLETIONS, settings.search)
    tape = Tape("cpu", None if precision == "fp32" else precision)
    table = blocks.build(tape, settings, blocks.Sizes(vocabulary.num_tokens, vocabulary.num_outputs, vocabulary.num_marks))
    rows, before = completing.paths(settings.search, 4, worst=True), 5 + settings.search.delta - 1
    assert completing.most(table, tape, 4, rows, before) == count.peak - count.known
    assert made.remembers(before) == table.remembers(before) > 0


class _Rows:
    """Held-out rows as measures.py reads them."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self.folder, self.lengths, self.categories = folder, np.full(8, 7), np.zeros(8, np.int64)
        np.save(folder / "word_categories.npy", np.ones((vocabulary.num_words, 2), np.uint32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        return np.arange(10 + index, 16 + index)


@pytest.mark.parametrize("name", ["gru", "gru-mn"])
def test_fewer_prefixes_are_completed_at_once_where_a_path_remembers_much(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same completions in half of the memory; and the paper's model, whose paths would remember 2.4 GB, stays below half a GB."""
    paper = blocks.CadenceTable(CadenceSettings(model="gru-mn"), blocks.Sizes(10_010, 10_006, 4), 25)
    assert 300 << 20 < paper.timeline(Setup("cuda", "fp32", 1, 1)).worst_evaluation_bytes < 512 << 20
    settings, vocabulary, made = _small(name)
    rows, found = _Rows(tmp_path, vocabulary), []
    most = made.remembers(completing.tokens(settings.search, 7, worst=True)) * 8 * completing.paths(settings.search, 1, worst=True)
    for bytes_at_once in (completing._REMEMBERED_BYTES, 2 * most):
        monkeypatch.setattr(completing, "_REMEMBERED_BYTES", bytes_at_once)
        with TensorCount(made.parameters()) as count:
            values = measures.generation(made, vocabulary, rows, 8, settings.search, 0)  # type: ignore[arg-type]
        found.append((values, count.peak - count.known))
    (whole, held), (parts, less) = found
    assert whole == parts and less <= held / 2


@pytest.mark.parametrize("name", ["gru", pytest.param("gru-mn", marks=pytest.mark.slow)])
def test_a_whole_training_peaks_where_its_evaluation_is_the_most(name: str, tmp_path: Path) -> None:
    """The real engine and task, every tensor counted, where every thinkable path is followed: no less than likely, and within the bound."""
    settings = {**MODELS[name], "eval_prefixes": 16, "search": {**_ALL, "groups": 24, "delta": 4}}
    train = {**DEFAULTS["train"], "epochs": 1, "max_steps": 2, "eval_every_steps": 1, "batch_size": 2, "threads": 1, "precision": "fp32"}
    task = CadenceTask(CadenceSettings.model_validate(settings))
    with Budget(1 << 60) as count:
        config = RunConfig(data=DataConfig(size=400), settings=settings, train=train)
        assert Trainer(task, config, home=tmp_path).train().outcome == "finished"
    table = task.memory_table()
    assert table is not None
    with counted.counted_tapes():
        line = table.timeline(Setup("cpu", "fp32", 2, 2))
    assert line.peaks[STEP] < line.peaks[EVALUATING] <= count.peak <= line.resting_bytes + line.worst_evaluation_bytes


@pytest.mark.parametrize("name", ["gru", "gru-mn"])
def test_completions_that_run_out_of_memory_are_made_fewer_at_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many prefixes, and half of those, the losses not again and in batches as before; later evaluations begin with what went.
    The values, the training and its result are those of a run in which there was room."""
    settings = {**MODELS[name], "eval_prefixes": 20, "search": {**_ALL, "groups": 4, "delta": 3}}
    train = {**DEFAULTS["train"], "epochs": 1, "max_steps": 4, "eval_every_steps": 2, "batch_size": 4, "threads": 1, "precision": "fp32"}
    config = RunConfig(data=DataConfig(size=400), settings=settings, train=train)
    numbers: list[int] = []
    losses: list[int] = []

    class Watched(CadenceTask):
        def loss(self, model: Any, batch: Any, ctx: TaskContext) -> Any:
            losses.append(0 if ctx.training else len(batch.categories))
            return super().loss(model, batch, ctx)

    def hungry(made: Any, vocabulary: Any, prompts: Any, n: int, search: Any, fits: int) -> Any:
        numbers.append(len(prompts))
        if len(prompts) > fits:
            torch.empty(1 << 60, dtype=torch.int8)  # what torch's own allocator says of it
        return complete(made, vocabulary, prompts, n, search)

    found = []
    for fits in (1 << 30, 4):
        numbers.clear()
        losses.clear()
        monkeypatch.setattr(measures, "complete", partial(hungry, fits=fits))
        link = Script()
        task = Watched(CadenceSettings.model_validate(settings))
        result = Trainer(task, config, home=tmp_path / str(fits), run="toy", link=link).train()
        values = [row["eval"] for row in lines(tmp_path / str(fits)) if "eval" in row]
        found.append((values, list(losses), weights(tmp_path / str(fits)), list(numbers)))
        assert result.outcome == "finished" and len(values) == 2
        recovered = [event for event in link.of("note") if event["kind"] == "out_of_memory"]
        assert len(recovered) == (0 if fits > 4 else 2), recovered
    (whole, batches, trained, at_once), (parts, again, other, fewer) = found
    assert whole == parts and batches == again and all(torch.equal(trained[key], other[key]) for key in trained)
    assert at_once == [16, 4] * 2 and fewer == [16, 8, *[4] * 10]


def test_in_the_end_one_prefix_is_tried_once_more_and_no_losses_again(tmp_path: Path) -> None:
    """What a task's own evaluate() cannot have even for one item is not helped by smaller batches: the evaluation is done once more."""
    tried: list[int] = []
    evaluations: list[int] = []

    class Never(Toy):
        def evaluate(self, model: Any, ctx: TaskContext, losses: Any) -> dict[str, float]:
            evaluations.append(1)

            def work(some: Any) -> Any:
                tried.append(len(some))
                raise MemoryError

            return {**losses, "made": float(sum(ctx.in_parts(range(6), 4, work)))}

    link = Script()
    with pytest.raises(MemoryError):
        run(tmp_path, toy_config(), link, Never())
    assert tried == [4, 2, 1, 1, 1, 1] and len(evaluations) == 2


def test_what_went_at_once_is_known_to_the_next_life(tmp_path: Path) -> None:
    """A resumed run begins its evaluations with as many as went, not with the number that ran out of memory before."""
    tried: list[int] = []
    done: list[int] = []

    class Small(Toy):
        def evaluate(self, model: Any, ctx: TaskContext, losses: Any) -> dict[str, float]:
            def work(some: Any) -> Any:
                tried.append(len(some))
                if len(some) > 1:
                    raise MemoryError
                return some

            made = float(sum(ctx.in_parts(range(3), 4, work)))
            done.append(len(tried))
            return {**losses, "made": made}

    class Leaving(Script):
        left = False

        def command(self) -> dict[str, Any] | None:
            before, self.left = self.left, bool(done)
            return LEAVE if done and not before else None

    asked = toy_config({"max_steps": 4, "eval_every_steps": 2})
    assert run(tmp_path, asked, Leaving(), Small()).outcome == "left" and len(done) == 1
    assert run(tmp_path, asked, Script(), Small()).outcome == "finished" and len(done) > 1
    assert tried == [3, 2, *[1] * 3 * len(done)]
