"""CADENCE as a task: its model, its data and its loss behind the protocol every task uses. Must not know the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainerd.engine.task import PrepareContext, Task, TaskContext
from trainerd.memory.timeline import Table
from trainerd.tasks.cadence import blocks, dataset, measures, prepare
from trainerd.tasks.cadence.dataset import TokenRows
from trainerd.tasks.cadence.model import Batch, GruMnModel, QueryModel, build
from trainerd.tasks.cadence.settings import CadenceSettings
from trainerd.tasks.cadence.vocabulary import Vocabulary

_LARGEST_EXPONENT = 700.0


class CadenceTask(Task):
    """A language model of queries or titles, told the category. A subclass may bring another model through build_model()."""

    Settings = CadenceSettings
    tokens = "loss"
    reads_data = False
    sometimes_unused = ("layers.*.key.*", "layers.*.score.*")  # rows of a single place have no past to read

    settings: CadenceSettings

    def prepare(self, ctx: PrepareContext) -> None:
        rows, used, dropped = prepare.prepare(self.settings, ctx.data, ctx.seed, ctx.cache_dir, ctx.progress)
        ctx.report_data(rows, used, dropped)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What prepare() built."""
        return Vocabulary.load(self.ctx.cache_dir)

    def model(self) -> nn.Module:
        made = self.build_model(self.vocabulary)
        if isinstance(made, QueryModel):
            made.softmax.chunked = self.ctx.logits != "full"
        return made

    def build_model(self, vocabulary: Vocabulary) -> QueryModel:
        """A fresh model for these words and categories."""
        return build(self.settings, vocabulary.num_tokens, vocabulary.num_outputs, vocabulary.num_marks)

    def memory_table(self) -> Table | None:
        """With the sizes the data have. A subclass with another model has another table, or is traced."""
        if type(self).build_model is not CadenceTask.build_model:
            return None
        sizes = blocks.Sizes(self.vocabulary.num_tokens, self.vocabulary.num_outputs, self.vocabulary.num_marks)
        rows = self.dataset("train")
        return blocks.CadenceTable(self.settings, sizes, int(rows.lengths.max()) if rows is not None else 1)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The memory network's layers; the laptop form is a single kernel, and not worth it."""
        return list(model.layers) if isinstance(model, GruMnModel) else []

    def dataset(self, split: str) -> TokenRows | None:
        rows = TokenRows(self.ctx.cache_dir, split, self.vocabulary.begin(0))
        return rows if len(rows) else None

    def collate(self, samples: Sequence[Any]) -> Batch:
        return dataset.collate(samples, self.vocabulary.begin(0))

    def length(self, sample: Any) -> int:
        return len(sample) - 1

    def counts(self, batch: Batch) -> Mapping[str, int]:
        return {"loss": len(batch.targets)}

    def loss(self, model: nn.Module, batch: Batch, ctx: TaskContext) -> tuple[dict[str, tuple[Tensor, float]], dict[str, float]]:
        return {"loss": (model(batch), 1.0)}, {}

    def evaluate(self, model: nn.Module, ctx: TaskContext, losses: Mapping[str, float]) -> dict[str, float]:
        """Loss and perplexity of the held-out rows, and how good the completions of some of their prefixes are."""
        values = {**losses, "perplexity": math.exp(min(losses["loss"], _LARGEST_EXPONENT))}
        rows = self.dataset("eval")
        if rows is None or not self.settings.eval_prefixes or not isinstance(model, QueryModel):
            return values
        search = self.settings.search
        return values | measures.generation(model, self.vocabulary, rows, self.settings.eval_prefixes, search, ctx.seed, ctx.in_parts)

    def export(self, model: nn.Module, folder: Path) -> None:
        self.vocabulary.save(folder)
