"""The paper's order at equal parameters, on real titles. Run: python -m benchmarks.cadence_order --data pricerunner_aggregate.csv.gz

1. no category < category < category + memory attention, in log-likelihood per token and top-1, on held-out product clusters;
2. raw < cleaned titles, as models of what people type: the canonical product names of held-out clusters stand for queries;
3. plain < dynamic beam in how many different words the completions of a prefix show.
It prints what comes out, also where the order does not hold.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainerd.config.model import DataConfig, RunConfig
from trainerd.engine.trainer import Trainer
from trainerd.tasks.cadence import measures
from trainerd.tasks.cadence.dataset import collate
from trainerd.tasks.cadence.model import build
from trainerd.tasks.cadence.search import Prompt, complete, typed
from trainerd.tasks.cadence.settings import DEFAULTS, CadenceSettings
from trainerd.tasks.cadence.suggest import Suggester
from trainerd.tasks.cadence.task import CadenceTask
from trainerd.tasks.cadence.text import words
from trainerd.tasks.cadence.vocabulary import NUM_SPECIAL

TARGET_PARAMETERS = 4_200_000
VOCABULARY = 10_000
BASE = {"model": "gru-mn", "min_frequency": 2, "vocabulary": VOCABULARY, "eval_prefixes": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "no category": {"conditioned": False, "attention": False},
    "category": {"conditioned": True, "attention": False},
    "category + memory": {"conditioned": True, "attention": True},
}


def settings_for(conditioned: bool, attention: bool, layers: int, clean: bool = False) -> dict[str, Any]:
    """Settings whose model has TARGET_PARAMETERS at the full vocabulary: the hidden width makes up for the attention."""

    def of(hidden: int) -> dict[str, Any]:
        sizes = {"embedding": 128, "hidden": [hidden] * layers, "attention": [hidden // 2] * layers if attention else [], "context": 200}
        return {**BASE, "conditioned": conditioned, "gru_mn": {**sizes, "dropout": 0.3}, "clean": {"enabled": clean}}

    return min((of(hidden) for hidden in range(64, 513, 4)), key=lambda some: abs(num_parameters(some) - TARGET_PARAMETERS))


def num_parameters(settings: dict[str, Any]) -> int:
    marks = 10 if settings["conditioned"] else 1
    with torch.device("meta"):
        model = build(CadenceSettings.model_validate(settings), VOCABULARY + 2 + 2 * marks, VOCABULARY + 2 + marks, marks)
    return sum(parameter.numel() for parameter in model.parameters())


class Trained:
    """A model after training, with what it was trained on."""

    def __init__(self, settings: dict[str, Any], data: DataConfig, seed: int, epochs: int, threads: int) -> None:
        train = {**DEFAULTS["train"], "epochs": epochs, "threads": threads}
        self._folder = tempfile.TemporaryDirectory()
        self.task = CadenceTask(settings)
        config = RunConfig(data=data, settings=settings, train=train, seed=seed)
        started = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            Trainer(self.task, config, home=self._folder.name, run="run").train()
        self.seconds = time.perf_counter() - started
        suggester = Suggester.load(Path(self._folder.name) / "models" / "run")
        self.model, self.vocabulary = suggester.model, suggester.vocabulary

    @torch.no_grad()
    def score(self, rows: Sequence[Any]) -> dict[str, float]:
        """Log-likelihood per token, and how often the most probable next word is the right one, over rows of tokens."""
        total, known, right, number, number_known = 0.0, 0.0, 0, 0, 0
        for start in range(0, len(rows), 128):
            batch = collate(rows[start : start + 128], self.vocabulary.begin(0))
            scores = torch.log_softmax(self.model.logits(batch), -1)
            chances = scores.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
            is_known = batch.targets >= NUM_SPECIAL
            total += float(chances.sum())
            known += float(chances[is_known].sum())
            right += int((scores.argmax(1) == batch.targets)[is_known].sum())
            number, number_known = number + len(chances), number_known + int(is_known.sum())
        return {"log-likelihood": total / number, "of known words": known / number_known, "next word top-1": right / number}

    def encode(self, rows: Iterable[tuple[str, str]]) -> list[Any]:
        """Tokens of (category, text)."""
        voc = self.vocabulary
        found = []
        for category, text in rows:
            number = voc.categories.index(category)
            found.append(np.array([voc.begin(number), *voc.encode(text), voc.end(number)]))
        return found

    def close(self) -> None:
        self._folder.cleanup()


def first_claim(data: DataConfig, seed: int, asked: argparse.Namespace) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """What each variant reaches on held-out clusters; and the beams' measures, with the last variant's model."""
    found: dict[str, dict[str, float]] = {}
    beams: dict[str, dict[str, float]] = {}
    for name, variant in VARIANTS.items():
        trained = Trained(settings_for(**variant, layers=asked.layers), data, seed, asked.epochs, asked.threads)
        rows = trained.task.dataset("eval")
        assert rows is not None
        values = trained.score([rows[index] for index in range(len(rows))])
        plain = trained.task.settings.search.model_copy(update={"method": "plain"})
        completed = measures.generation(trained.model, trained.vocabulary, rows, asked.prefixes, plain, seed)
        found[name] = values | {"completion top-1": completed["top1"], "success@10": completed["success@10"]}
        print(f"  seed {seed} {name} ({trained.seconds:.0f} s): {_show(found[name])}", flush=True)
        if name == "category + memory":
            beams = {method: beam(trained, method, asked.prefixes, seed) for method in ("plain", "dynamic")}
        trained.close()
    return found, beams


def beam(trained: Trained, method: str, num_prefixes: int, seed: int) -> dict[str, float]:
    """How different the ten completions of one prefix are, and how good."""
    rows = trained.task.dataset("eval")
    assert rows is not None
    search = trained.task.settings.search.model_copy(update={"method": method})
    values = measures.generation(trained.model, trained.vocabulary, rows, num_prefixes, search, seed)
    different, nexts = [], []
    for text, prefix, category in measures._sample(trained.vocabulary, rows, num_prefixes, seed):
        _, context, rest = typed(trained.vocabulary, prefix[: max(3, len(text) // 4)])  # an early prefix: where diversity matters
        [completions] = complete(trained.model, trained.vocabulary, [Prompt(category, context, rest)], 10, search)
        split = [completion.text.split() for completion in completions]
        different.append(len({word for some in split for word in some}))
        nexts.append(len({tuple(some[:2]) for some in split}))
    kept = {name: values[name] for name in ("distinct1", "distinct2", "success@10", "mrr@10")}
    return {"different words": float(np.mean(different)), "different beginnings": float(np.mean(nexts)), **kept}


def second_claim(path: Path, seed: int, asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Titles of some clusters, raw and cleaned, as models of the names of the others."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        products = [(row[6], row[1], row[3], row[4]) for row in csv.reader(file)]
    clusters = sorted({cluster for _, _, cluster, _ in products})
    held = set(random.Random(seed).sample(clusters, len(clusters) // 10))
    names = sorted({(category, " ".join(words(name))) for category, _, cluster, name in products if cluster in held})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        titles = Path(folder) / "titles.tsv"
        lines = [f"{category}\t{title}" for category, title, cluster, _ in products if cluster not in held]
        titles.write_text("\n".join(["category\ttext", *lines]) + "\n", encoding="utf-8")
        for name in ("raw titles", "cleaned titles"):
            settings = settings_for(True, True, asked.layers, clean=name.startswith("cleaned"))
            data = DataConfig(path=str(titles), eval_fraction=0.01, size=asked.rows)
            trained = Trained(settings, data, seed, asked.epochs, asked.threads)
            found[name] = trained.score(trained.encode(names))
            print(f"  seed {seed} {name} ({trained.seconds:.0f} s): {_show(found[name])}", flush=True)
            trained.close()
    return found


def _show(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def table(title: str, seeds: list[dict[str, dict[str, float]]]) -> None:
    """Means and standard deviations over seeds; and for each step of the order, in how many seeds it holds."""
    names, columns = list(seeds[0]), list(next(iter(seeds[0].values())))
    print(f"\n{title}\n{'':24}" + "".join(f"{column:>24}" for column in columns))
    for name in names:
        values = [[seed[name][column] for seed in seeds] for column in columns]
        print(f"{name:24}" + "".join(f"{f'{np.mean(some):.4f} ± {np.std(some):.4f}':>24}" for some in values))
    for lower, higher in itertools.pairwise(names):
        holds = [f"{column} {sum(seed[lower][column] < seed[higher][column] for seed in seeds)}/{len(seeds)}" for column in columns]
        print(f"{lower} < {higher}: " + ", ".join(holds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pricerunner_aggregate.csv.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=None, help="use this many rows")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--prefixes", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["category", "titles"])
    asked = parser.parse_args()
    for name, variant in VARIANTS.items():
        settings = settings_for(**variant, layers=asked.layers)
        print(
            f"{name}: {num_parameters(settings) / 1e6:.2f} million parameters at {VOCABULARY} words, hidden {settings['gru_mn']['hidden']}"
        )
    columns: dict[str, str | int] = {"text": 1, "category": 6, "group": 3}
    data = DataConfig(path=str(asked.data), columns=columns, eval_fraction=0.1, size=asked.rows)
    if asked.only != "titles":
        first = [first_claim(data, seed, asked) for seed in range(asked.seeds)]
        table("1. held-out clusters, at equal parameters", [found for found, _ in first])
        table("3. ten completions of an early prefix", [beams for _, beams in first])
    if asked.only != "category":
        table(
            "2. names of held-out products under models of titles", [second_claim(asked.data, seed, asked) for seed in range(asked.seeds)]
        )


if __name__ == "__main__":
    main()
