"""Who is timed: the engine, a bare PyTorch loop, Hugging Face Trainer, Lightning, and what document 002 describes.

Each contender is a function (workload, batches, steps, batch_size, precision) -> seconds spent from step WARM to the last,
its own start-up left out. `tokens_only` contenders train the task's model on the batches given; the padded ones train the
model a person would write, which computes logits wherever there is padding too.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.throughput.workload import Workload
from trainerd.config.model import RunConfig
from trainerd.engine.loop import Link
from trainerd.engine.trainer import Trainer

WARM = 5
DTYPE = {"fp32": None, "bf16": torch.bfloat16}
Contender = Callable[[Workload, Callable[[int], Iterator[list[int]]], int, int, str], float]


class Plain(nn.Module):
    """The same language model as a person writes it: padded batch in, logits for every position, cross-entropy that ignores padding."""

    def __init__(self, words: int, categories: int) -> None:
        super().__init__()
        self.word = nn.Embedding(words + 1, 128, padding_idx=words)
        self.category = nn.Embedding(categories, 64)
        self.drop = nn.Dropout(0.3)
        self.gru = nn.GRU(192, 256, batch_first=True)
        self.out = nn.Linear(256, words)

    def forward(self, inputs: Tensor, category: Tensor, targets: Tensor) -> Tensor:
        beside = self.category(category)[:, None].expand(-1, inputs.shape[1], -1)
        hidden, _ = self.gru(self.drop(torch.cat([self.word(inputs), beside], -1)))
        logits = self.out(self.drop(hidden))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def adamw(model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fused or None)


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    dtype = DTYPE[precision]
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def mean_loss(workload: Workload, model: nn.Module, batch: Any) -> Tensor:
    """The task's own loss, divided by its own count."""
    losses, _ = workload.task.loss(model, batch, workload.task.ctx)
    counts = workload.task.counts(batch)
    return sum((weight * total / counts[name] for name, (total, weight) in losses.items()), start=torch.zeros(()))


class TokensOnly:
    """The task's model behind the interface the trainers want: a batch in, a loss out."""

    def __init__(self, workload: Workload, batches: Iterator[list[int]], steps: int) -> None:
        self.workload, self.batches = workload, list(itertools.islice(batches, steps))
        self.model = workload.model()

    def batch(self, ids: list[int]) -> Any:
        self.workload.task.ctx.sample_ids = ids
        return self.workload.batch(ids)

    def loss(self, batch: Any) -> Tensor:
        return mean_loss(self.workload, self.model, batch)


class Padded:
    """The plain model on padded batches."""

    def __init__(self, workload: Workload, batches: Iterator[list[int]], steps: int) -> None:
        self.workload, self.batches = workload, list(itertools.islice(batches, steps))
        torch.manual_seed(0)
        self.words, self.categories = workload.sizes()
        self.model = Plain(self.words, self.categories).train()

    def batch(self, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        rows = [self.workload.row(i) for i in ids]
        tokens = [torch.tensor(row) for row, _ in rows]
        inputs = nn.utils.rnn.pad_sequence([t[:-1] for t in tokens], True, self.words)
        targets = nn.utils.rnn.pad_sequence([t[1:] for t in tokens], True, -100)
        return inputs, torch.tensor([category for _, category in rows]), targets

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return self.model(*batch)


Form = type[TokensOnly] | type[Padded]


def bare(form: Form) -> Contender:
    """A loop as in the tutorials: nothing but forward, backward, clip, step, and the loss read each step."""

    def run(workload: Workload, batches: Callable[[int], Iterator[list[int]]], steps: int, batch_size: int, precision: str) -> float:
        work = form(workload, batches(batch_size), steps)
        optimizer = adamw(work.model)
        since = 0.0
        for step, ids in enumerate(work.batches):
            if step == WARM:
                since = time.perf_counter()
            batch = work.batch(ids)
            with autocast(precision):
                loss = work.loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(work.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        return time.perf_counter() - since

    return run


def huggingface(form: Form) -> Contender:
    """Hugging Face Trainer, logging and saving off; the same batches, one dataset item each."""
    import transformers

    class Clock(transformers.TrainerCallback):
        since = until = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.until = time.perf_counter()
            if state.global_step == WARM:
                self.since = self.until

    class Wrapped(nn.Module):
        def __init__(self, work: Any) -> None:
            super().__init__()
            self.work, self.inner = work, work.model

        def forward(self, ids: Any = None) -> dict[str, Tensor]:
            return {"loss": self.work.loss(ids)}

    def run(workload: Workload, batches: Callable[[int], Iterator[list[int]]], steps: int, batch_size: int, precision: str) -> float:
        work = form(workload, batches(batch_size), steps)
        folder = workload.home / "hf"
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=1, logging_strategy="no", save_strategy="no", report_to=[],
            optim="adamw_torch_fused", learning_rate=3e-3, lr_scheduler_type="constant", max_grad_norm=1.0, use_cpu=True,
            bf16=precision == "bf16", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        clock = Clock()

        class Ordered(transformers.Trainer):
            def _get_train_sampler(self, *args: Any) -> Any:
                return torch.utils.data.SequentialSampler(work.batches)

            def _prepare_inputs(self, inputs: Any) -> Any:
                return inputs  # everything is on the CPU already, and it cannot take a named tuple apart

        collate = lambda items: {"ids": work.batch(items[0])}  # noqa: E731
        Ordered(Wrapped(work), arguments, train_dataset=work.batches, data_collator=collate, callbacks=[clock]).train()
        shutil.rmtree(folder, ignore_errors=True)
        return clock.until - clock.since

    return run


def lightning(form: Form) -> Contender:
    """Lightning, everything that can be switched off is off. Clipping is off under bf16: it refuses it with fused AdamW."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self, work: Any) -> None:
            super().__init__()
            self.work, self.inner = work, work.model
            self.since = self.until = 0.0

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.work.loss(batch)

        def on_train_batch_end(self, *args: Any) -> None:
            self.until = time.perf_counter()
            if self.global_step == WARM:
                self.since = self.until

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.inner)

        def transfer_batch_to_device(self, batch: Any, *args: Any) -> Any:
            return batch

    def run(workload: Workload, batches: Callable[[int], Iterator[list[int]]], steps: int, batch_size: int, precision: str) -> float:
        work = form(workload, batches(batch_size), steps)
        module = Module(work)
        loader = torch.utils.data.DataLoader(work.batches, batch_size=None, collate_fn=work.batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, precision="bf16-mixed" if precision == "bf16" else "32-true",
                gradient_clip_val=None if precision == "bf16" else 1.0,
            )  # fmt: skip
            trainer.fit(module, loader)
        return module.until - module.since

    return run


def engine(
    workload: Workload, batches: Callable[[int], Iterator[list[int]]], steps: int, batch_size: int, precision: str, **train: Any
) -> float:
    """Our Trainer as a library user calls it, metrics and all; timed by its own per-step stamps. It makes its own batches."""
    words = workload.config.model_dump()
    words["train"].update(max_steps=steps, batch_size=batch_size, precision=precision, scheduler="constant", warmup_steps=0, **train)
    config = RunConfig.model_validate(words)
    name = f"engine-{time.monotonic_ns()}"
    Trainer(type(workload.task)(workload.task.settings), config, home=workload.home, run=name, link=Link()).train()
    rows = [json.loads(line) for line in (workload.home / "runs" / name / "metrics.jsonl").read_text("utf-8").splitlines()]
    stamps = {row["step"]: row["t"] for row in rows if "loss" in row}
    for kind in ("runs", "checkpoints", "models"):
        shutil.rmtree(workload.home / kind / name, ignore_errors=True)
    return stamps[steps] - stamps[WARM]


def document(
    workload: Workload, steps: int, warm: int, after: Callable[[int, Padded], None] = lambda step, work: None
) -> tuple[float, Padded]:
    """What document 002 describes: padded batches of 8, 4 of them a step, logits on padding, memory cleaned every 10 batches."""
    work = Padded(workload, workload.shuffled(8), steps * 4)
    optimizer = adamw(work.model, fused=False)
    since = 0.0
    for number, ids in enumerate(work.batches):
        if number == warm * 4:
            since = time.perf_counter()
        (work.loss(work.batch(ids)) / 4).backward()
        if number % 4 == 3:
            torch.nn.utils.clip_grad_norm_(work.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            after((number + 1) // 4, work)
        if number % 10 == 9:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return time.perf_counter() - since, work


def held_out_loss(workload: Workload, work: Padded) -> float:
    """The plain model's mean loss of a held-out token, over the split that the engine evaluates on."""
    held_out = workload.task.dataset("eval")
    assert held_out is not None
    rows = Workload(workload.home, workload.config, workload.task, held_out)
    before, work.workload, total, tokens = work.workload, rows, 0.0, 0
    work.model.eval()
    with torch.no_grad():
        for start in range(0, len(held_out), 256):
            batch = work.batch(list(range(start, min(start + 256, len(held_out)))))
            number = int((batch[2] != -100).sum())
            total, tokens = total + float(work.loss(batch)) * number, tokens + number
    work.workload = before
    work.model.train()
    return total / tokens
