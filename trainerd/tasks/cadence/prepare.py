"""From rows to memory-mapped tokens: collect once, choose, count, number, write. Must not import torch.

Everything after the collecting pass works on slices of arrays, so memory does not grow with the data; an interrupted
preparation goes on after the pass if that had ended, and else starts again.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainerd.config.model import DataConfig
from trainerd.contract.errors import UsageError
from trainerd.contract.files import write_json
from trainerd.tasks.cadence.clean import TitleCleaner
from trainerd.tasks.cadence.collect import Collected, Progress, collect, discard, read_words
from trainerd.tasks.cadence.data import open_source
from trainerd.tasks.cadence.encode import Encoder, SplitWriter, encoder_for
from trainerd.tasks.cadence.rows import EVAL, OUT, TRAIN, ChosenRows
from trainerd.tasks.cadence.settings import CadenceSettings
from trainerd.tasks.cadence.vocabulary import Vocabulary


def prepare(settings: CadenceSettings, data: DataConfig, seed: int, folder: Path, progress: Progress) -> tuple[int, int, dict[str, int]]:
    """Fills `folder`. Returns rows met, rows used, and rows dropped by reason."""
    found = collect(open_source(data, settings, seed), folder, settings.max_words, progress)
    if not found.rows:
        raise UsageError(f"{data.path} has no usable row.", "A usable row has a text and a category.")
    dropped = Counter(found.dropped)
    category, names = _main_categories(found, folder, settings.max_categories)
    split = _choose(found, folder, settings, data, seed, category >= 0, dropped)
    rows = ChosenRows(found, folder, split, category)
    counts = rows.word_counts(TRAIN)
    cleaner = TitleCleaner(rows, counts, settings.clean, settings.min_frequency, len(names)) if settings.clean.enabled else None
    encoder = encoder_for(rows, counts, read_words(folder), settings)
    in_train = np.bincount(category[split == TRAIN], minlength=len(names)).tolist()
    vocabulary = Vocabulary(encoder.tokenizer, names, in_train, settings.conditioned)
    used = _write(rows, cleaner, encoder, vocabulary, folder, dropped, progress)
    vocabulary.save(folder)
    discard(folder)
    return found.rows + sum(found.dropped.values()), used, {reason: count for reason, count in dropped.items() if count}


def _write(
    rows: ChosenRows,
    cleaner: TitleCleaner | None,
    encoder: Encoder,
    vocabulary: Vocabulary,
    folder: Path,
    dropped: Counter[str],
    progress: Progress,
) -> int:
    with SplitWriter(folder, "train", encoder, vocabulary) as train, SplitWriter(folder, "eval", encoder, vocabulary) as held:
        for done, chunk in rows.chunks():
            if cleaner is not None:
                before = len(chunk.lengths)
                chunk = cleaner.clean(chunk)
                dropped["nothing left after cleaning"] += before - len(chunk.lengths)
            train.add(chunk.where(chunk.split == TRAIN))
            held.add(chunk.where(chunk.split == EVAL))
            progress(done, rows.total, "rows")
        used = {writer.name: writer.finish() for writer in (train, held)}
    np.save(folder / "word_categories.npy", train.word_categories)
    write_json(folder / "splits.json", {"schema": 1, "dtype": train.dtype.name, "rows": used})
    return sum(used.values())


def _main_categories(found: Collected, folder: Path, at_most: int) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Each row's category, renumbered by name with the most frequent `at_most` kept and the others -1; and their names."""
    category = found.array(folder, "category")
    frequency = np.bincount(category, minlength=len(found.categories))
    kept = np.argsort(-frequency, kind="stable")[:at_most].tolist()
    kept.sort(key=found.categories.__getitem__)
    renumber = np.full(len(found.categories), -1, dtype=np.int32)
    renumber[kept] = np.arange(len(kept))
    return renumber[category], [found.categories[number] for number in kept]


def _choose(
    found: Collected,
    folder: Path,
    settings: CadenceSettings,
    data: DataConfig,
    seed: int,
    wanted: npt.NDArray[np.bool_],
    dropped: Counter[str],
) -> npt.NDArray[np.uint8]:
    """Which split each row belongs to: the first `data.size` of a seeded shuffle, some of their groups held out."""
    rows = np.flatnonzero(wanted).astype(np.uint32)
    dropped[f"not in one of the {settings.max_categories} most frequent categories"] += found.rows - len(rows)
    if data.size is not None and data.size < len(rows):
        dropped[f"beyond the first {data.size} of the shuffle"] += len(rows) - data.size
        rows = np.random.default_rng([seed, 1]).permutation(rows)[: data.size]
    if settings.eval_split == "group" and not found.grouped:
        raise UsageError("settings.eval_split is group, and the data have no column group.", "Name it with --set data.columns.group=NAME.")
    by_group = settings.eval_split != "random" and found.grouped
    order = _scatter(found.array(folder, "group" if by_group else "text")[rows], seed)
    split = np.full(found.rows, OUT, dtype=np.uint8)
    split[rows] = TRAIN
    split[rows[_held_out(order, data.eval_fraction)]] = EVAL
    return split


def _held_out(order: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """The rows with the lowest numbers, about `fraction` of them: rows with equal numbers stay together, and some always remain."""
    held: npt.NDArray[np.bool_] = np.zeros(len(order), dtype=bool)
    if fraction <= 0 or (order == order[0]).all():
        return held
    wanted = min(max(round(len(order) * fraction), 1), len(order) - 1)
    held = order < np.partition(order, wanted)[wanted]
    return held if held.any() else order == order.min()


def _scatter(keys: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each key that looks random and depends on key and seed only (the finaliser of splitmix64)."""
    mixed = keys.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
