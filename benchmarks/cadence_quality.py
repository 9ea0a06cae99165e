"""Does `gru` beat word frequencies and Kneser-Ney trigrams on held-out perplexity? Run: python -m benchmarks.cadence_quality

All on the same tokens: one vocabulary from the training rows, unknown and rare words predicted and counted like any other,
ends predicted, begins not. Rows of one product cluster are never on both sides: near-duplicates would leak.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.cadence_ngrams import KneserNey, unigram, unigram_nats
from trainerd.config.model import DataConfig, RunConfig
from trainerd.engine.trainer import Trainer
from trainerd.tasks.cadence.dataset import TokenRows
from trainerd.tasks.cadence.settings import DEFAULTS
from trainerd.tasks.cadence.suggest import Suggester
from trainerd.tasks.cadence.task import CadenceTask
from trainerd.tasks.cadence.vocabulary import NUM_SPECIAL, Vocabulary


def merged(rows: TokenRows, vocabulary: Vocabulary) -> list[tuple[int, list[int]]]:
    """Category and words of each row, all ends made one: an estimate that is not told the category need not guess it."""
    found = []
    for index in range(len(rows)):
        tokens = [min(token, vocabulary.num_words) for token in rows[index][1:].tolist()]
        found.append((int(rows.categories[index]), tokens))
    return found


def data_config(path: Path, eval_fraction: float) -> DataConfig:
    """The titles with their product clusters: a file without a header, columns by number."""
    return DataConfig(path=str(path), columns={"text": 1, "category": 6, "group": 3}, eval_fraction=eval_fraction)


def baselines(task: CadenceTask) -> dict[str, tuple[float, int]]:
    """Nats and words of the held-out rows under each count-based estimate."""
    voc = task.vocabulary
    train, held = (merged(task.dataset(split), voc) for split in ("train", "eval"))  # type: ignore[arg-type]
    num_outputs = voc.num_words + 1
    return {
        "unigram": unigram_nats(unigram((row for _, row in train), num_outputs), (row for _, row in held), num_outputs),
        "Kneser-Ney trigram": KneserNey(train, num_outputs).nats(held),
        "Kneser-Ney trigram + category": KneserNey(train, num_outputs, by_category=True).nats(held),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="pricerunner_aggregate.csv.gz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--eval-fraction", type=float, default=0.1)
    parser.add_argument("--min-frequency", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", action="store_true", help="also print suggestions for every category")
    asked = parser.parse_args()
    settings = {"eval_prefixes": 0, "min_frequency": asked.min_frequency}
    train = {**DEFAULTS["train"], "epochs": asked.epochs, "threads": asked.threads}
    perplexities: dict[str, list[float]] = {}
    for seed in range(asked.seeds):
        config = RunConfig(data=data_config(asked.data, asked.eval_fraction), settings=settings, train=train, seed=seed)
        with tempfile.TemporaryDirectory() as home:
            started, task = time.perf_counter(), CadenceTask(settings)
            result = Trainer(task, config, home=home, run="run").train()
            seconds = time.perf_counter() - started
            found = {name: nats / words for name, (nats, words) in baselines(task).items()} | {"gru": result.metrics["eval"]["loss"]}
            held = task.dataset("eval")
            assert held is not None
            unknown = float((held.tokens < NUM_SPECIAL).sum() / (len(held.tokens) - len(held)))
            for name, nats in found.items():
                perplexities.setdefault(name, []).append(math.exp(nats))
            print(f"seed {seed}: {len(held)} held-out rows, {unknown:.1%} of their tokens unknown or rare, trained in {seconds:.0f} s")
            print("  " + ", ".join(f"{name} {math.exp(nats):.2f}" for name, nats in found.items()), flush=True)
            if asked.samples and seed == 0:
                samples(Path(home) / "models" / "run")
    print("\nheld-out perplexity, mean ± standard deviation over seeds (each with its own split)")
    for name, values in perplexities.items():
        print(f"{name:32} {np.mean(values):8.2f} ± {np.std(values):.2f}")


def samples(folder: Path) -> None:
    """Five suggestions for a first letter in every category."""
    suggester = Suggester.load(folder)
    for category in suggester.vocabulary.categories:
        print(f"  {category}: " + " | ".join(one.text for prefix in ("", "s") for one in suggester.suggest(prefix, category, 3)))


if __name__ == "__main__":
    main()
