"""CADENCE through the real Trainer: it learns more than word frequencies, its result is usable, and resuming prepared data works."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from trainerd.config.model import DataConfig, RunConfig
from trainerd.engine.trainer import Trainer
from trainerd.tasks.cadence.settings import DEFAULTS
from trainerd.tasks.cadence.suggest import Suggester
from trainerd.tasks.cadence.task import CadenceTask

SMALL = {
    "gru": {"gru": {"hidden": 64, "word_embedding": 48, "category_embedding": 16}},
    "gru-mn": {"model": "gru-mn", "gru_mn": {"embedding": 48, "hidden": [64], "attention": [16], "context": 48, "dropout": 0.1}},
}


def unigram(task: CadenceTask) -> float:
    """Nats per token of held-out rows under the frequencies of the training rows, smoothed."""
    counts = np.ones(task.vocabulary.num_outputs)
    for split in ("train", "eval"):
        rows = task.dataset(split)
        assert rows is not None
        predicted = np.delete(rows.tokens.astype(np.int64), rows.offsets[:-1])
        if split == "train":
            counts += np.bincount(predicted, minlength=len(counts))
        else:
            return float(-np.log(counts[predicted] / counts.sum()).mean())
    raise AssertionError


@pytest.mark.parametrize("name", SMALL)
def test_a_short_training_beats_word_frequencies(name: str, tmp_path: Path) -> None:
    """120 steps on the built-in queries: far below the unigram's perplexity, with completions in the asked category."""
    settings = {**SMALL[name], "eval_prefixes": 8}
    train = {**DEFAULTS["train"], "epochs": 1, "max_steps": 120, "lr": 1e-2, "warmup_steps": 10, "threads": 1, "precision": "fp32"}
    config = RunConfig(data=DataConfig(size=5000), settings=settings, train=train)
    task = CadenceTask(settings)
    values = Trainer(task, config, home=tmp_path, run="run").train().metrics["eval"]
    assert values["loss"] < unigram(task) - 1.0
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    for measure in ("success@10", "mrr@10", "top1", "category_consistency", "distinct1", "distinct2"):
        assert 0 <= values[measure] <= 1
    found = Suggester.load(tmp_path / "models" / "run").suggest("samsung", "Televisions", 5)
    assert len(found) == 5 and all(one.text.startswith("samsung") for one in found)
    written = {path.name for path in (tmp_path / "models" / "run").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "categories.json"} <= written


def test_real_titles_train(shared_data: Path, tmp_path: Path) -> None:
    """The real merchant titles, header-less and gzipped, are held out by product cluster and learnt from."""
    data = DataConfig(
        path=str(shared_data / "cadence" / "pricerunner_aggregate.csv.gz"), columns={"text": 1, "category": 6, "group": 3}, size=3000
    )
    settings = {**SMALL["gru"], "eval_prefixes": 0}
    train = {**DEFAULTS["train"], "epochs": 1, "max_steps": 60, "lr": 1e-2, "warmup_steps": 10, "threads": 1}
    task = CadenceTask(settings)
    values = Trainer(task, RunConfig(data=data, settings=settings, train=train), home=tmp_path, run="run").train().metrics["eval"]
    assert values["loss"] < unigram(task) and set(values) == {"loss", "perplexity"}
    assert len(task.vocabulary.categories) == 10
