"""Reads the samples of each step and makes micro-batches of them, here or in worker processes. Must not choose the order.

It takes nothing from the global random state, and starts at any step without reading what came before. Workers are
spawned, never forked: a fork of a process that has threads or CUDA is not safe.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from trainerd.engine import rng
from trainerd.engine.batches import Batches, Ids, split
from trainerd.engine.task import Batch, MapDataset, Task

_START_METHOD = "spawn" if sys.platform == "win32" else "forkserver"
_PREFETCH = 4

Request = tuple[int, int, list[int]]  # epoch, step, dataset indices


@dataclass
class Window:
    """All the samples of one step, as micro-batches on the CPU."""

    step: int
    epoch: int
    parts: list[tuple[list[int], Batch]]

    @property
    def num_samples(self) -> int:
        return sum(len(ids) for ids, _ in self.parts)


class Fetch(Dataset[Batch]):
    """Turns one request into a micro-batch; the same code here and in a worker."""

    def __init__(self, task: Task, dataset: MapDataset) -> None:
        self.task = task
        self.dataset = dataset
        self._many = getattr(dataset, "__getitems__", None) is not None

    def __getitem__(self, request: Request) -> Batch:
        ctx = self.task.ctx
        ctx.epoch, ctx.step, ctx.sample_ids = request
        ids = request[2]
        samples = self.dataset.__getitems__(ids) if self._many else [self.dataset[i] for i in ids]  # type: ignore[attr-defined]
        return self.task.collate(samples)


class _Requests(Sampler[Request]):
    """Requests from a step on, without end; the loop stops asking."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.step = 0
        self.micro_batch = batches.batch_size

    def __iter__(self) -> Iterator[Request]:
        step = self.step
        while True:
            epoch = step // self.batches.steps_per_epoch
            for ids in split(self.batches.ids(step), self.micro_batch):
                yield epoch, step, ids
            step += 1


class Loader:
    """A stream of windows. seek() first, then window() for each step."""

    def __init__(self, task: Task, dataset: MapDataset, batches: Batches, *, num_workers: int, seed: int, pin_memory: bool) -> None:
        self._fetch = Fetch(task, dataset)
        self._requests = _Requests(batches)
        self._batches = batches
        self.step = 0
        """The step the next window is for."""
        self._stream: Iterator[Batch] | None = None
        self._workers: DataLoader[Batch] | None = None
        if num_workers:
            self._workers = DataLoader(
                self._fetch,
                batch_size=None,  # a request is already a whole micro-batch
                sampler=self._requests,
                collate_fn=_as_it_is,
                worker_init_fn=_end_with_the_trainer,
                num_workers=num_workers,
                prefetch_factor=_PREFETCH,
                persistent_workers=True,
                multiprocessing_context=_START_METHOD,
                generator=torch.Generator().manual_seed(seed),
                pin_memory=pin_memory,
            )

    def seek(self, step: int, micro_batch: int) -> None:
        """Continue with `step`, in micro-batches of this size."""
        self.step = self._requests.step = step
        self._requests.micro_batch = micro_batch
        if self._workers is not None:
            with rng.preserved():
                self._stream = iter(self._workers)

    @property
    def micro_batch(self) -> int:
        """The samples of a micro-batch; the last one of a step may have less."""
        return self._requests.micro_batch

    def window(self) -> Window:
        """The samples of the next step."""
        step = self.step
        epoch = step // self._batches.steps_per_epoch
        parts = split(self._batches.ids(step), self._requests.micro_batch)
        if self._stream is None:
            window = Window(step, epoch, [(ids, self._fetch[epoch, step, ids]) for ids in parts])
        else:
            window = Window(step, epoch, [(ids, next(self._stream)) for ids in parts])
        self.step = step + 1
        return window

    def close(self) -> None:
        """Let the workers go."""
        self._stream = None
        self._workers = None


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _end_with_the_trainer(worker: int) -> None:
    """In a worker: end when the trainer does, however. (torch looks for another parent id; a forkserver's worker has the
    server for a parent, and the server lives as long as its workers: after a kill -9 both would stay for ever.)"""
    trainer = multiprocessing.parent_process()

    def wait() -> None:
        if trainer is not None:
            trainer.join()
            os._exit(1)

    threading.Thread(target=wait, name="trainer's end", daemon=True).start()


def lengths_of(task: Task, dataset: MapDataset) -> Ids | None:
    """The length of every sample, by which it is bucketed; None when the task knows no lengths."""
    known = getattr(dataset, "lengths", None)
    if known is not None:
        return np.asarray(known).astype(np.int64)
    if type(task).length is Task.length:
        return None
    return np.fromiter((task.length(dataset[i]) for i in range(len(dataset))), np.int64, len(dataset))


def move(batch: Any, device: torch.device) -> Any:
    """The batch on the device; tensors inside lists, tuples, named tuples and dicts are found, the rest is left alone."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
