"""Every random state of this process: taken, put back, kept as plain values. Must not know what draws from it.

Two forms: a Snapshot is raw and cheap (taken before every step, for a retry); a document holds only tensors and plain
Python values, so that torch.load(weights_only=True) reads it back from a checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Snapshot(NamedTuple):
    """The raw states of python, numpy, torch on the CPU and every CUDA device."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]


def seed(value: int) -> None:
    """Seed everything the training process draws from."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def take() -> Snapshot:
    """The states now."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return Snapshot(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def put_back(snapshot: Snapshot) -> None:
    """Make the states what they were."""
    random.setstate(snapshot.python)
    np.random.set_state(snapshot.numpy)
    torch.set_rng_state(snapshot.torch)
    for index, state in enumerate(snapshot.cuda[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace outside."""
    before = take()
    try:
        yield
    finally:
        put_back(before)


def to_document(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as tensors and plain values."""
    version, words, gauss = snapshot.python
    name, key, position, has_gauss, cached = snapshot.numpy
    return {
        "python": {"version": int(version), "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": snapshot.torch.clone(),
        "cuda": [state.clone() for state in snapshot.cuda],
    }


def from_document(document: dict[str, Any]) -> Snapshot:
    """The snapshot in a document that to_document() made."""
    python, numpy = document["python"], document["numpy"]
    return Snapshot(
        (python["version"], tuple(python["words"].tolist()), python["gauss"]),
        (numpy["name"], numpy["key"].numpy().astype(np.uint32), numpy["position"], numpy["has_gauss"], numpy["cached"]),
        document["torch"],
        list(document["cuda"]),
    )
