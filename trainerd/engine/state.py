"""The state of a training as one plain dict: taken without holding the training up, and put back to the last bit.

Must not touch files. It holds only tensors and plain Python values (torch.load(weights_only=True) reads nothing else).
Frozen weights are not in it: they come from their source again, and their sha256 is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainerd.contract.errors import TrainerdError
from trainerd.engine import rng
from trainerd.engine.precision import Precision

FORMAT = 1
_NEW_RUN = "It belongs to another version of the model; start a new run with --no-resume, or bring the old version back."


class States:
    """Takes and puts back the state of one model, optimizer and precision.

    The copies live in staging buffers that are used again for the next capture: a capture is valid until the next one,
    and costs no more memory than one checkpoint.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision) -> None:
        self._learned = dict(learned(model))
        self._frozen = fingerprints(model)
        self._optimizer = optimizer
        self._precision = precision
        self._staging: dict[str, Tensor] = {}

    @property
    def frozen(self) -> dict[str, str]:
        """sha256 of every frozen weight, by name."""
        return self._frozen

    def capture(self, facts: dict[str, Any]) -> dict[str, Any]:
        """The state now; `facts` (position, best, plan, …) must be plain. When there is no memory for it nothing is kept of it."""
        try:
            return self._captured(facts)
        except BaseException:
            self._staging.clear()
            raise

    def _captured(self, facts: dict[str, Any]) -> dict[str, Any]:
        state = {
            "format": FORMAT,
            **facts,
            "model": self._stage(self._learned, "model"),
            "frozen": dict(self._frozen),
            "optimizer": self._stage(self._optimizer.state_dict(), "optimizer"),
            "scaler": self._stage(self._precision.state(), "scaler"),
            "rng": rng.to_document(rng.take()),
        }
        if self._precision.device.type == "cuda":
            torch.cuda.synchronize(self._precision.device)
        return state

    def let_go(self) -> None:
        """Give the staging buffers back: the last capture is not valid any more."""
        self._staging.clear()

    @property
    def staged_bytes(self) -> int:
        """What the staging buffers hold on to: the memory that saving beside the training costs."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._staging.values())

    def size_bytes(self) -> int:
        """About how large a capture is: known as soon as model and optimizer are built."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in self._learned.values()]
        for state in self._optimizer.state.values():
            sizes += [value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor)]
        return sum(sizes)

    def restore(self, state: dict[str, Any]) -> None:
        """Weights, optimizer and scaler become those of the state. Raises TrainerdError when they do not fit."""
        if state.get("format") != FORMAT:
            message = f"The checkpoint has format {state.get('format')!r}; this trainerd reads {FORMAT}."
            raise TrainerdError(message, "Use the trainerd that wrote it.")
        self._compare(state)
        with torch.no_grad():
            for name, tensor in self._learned.items():
                tensor.copy_(state["model"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._precision.restore(state["scaler"])

    def restore_weights(self, state: dict[str, Any]) -> None:
        """Only the weights: for exporting the best instead of the last."""
        with torch.no_grad():
            for name, tensor in self._learned.items():
                tensor.copy_(state["model"][name])

    def _compare(self, state: dict[str, Any]) -> None:
        saved = state["model"]
        for name in sorted(set(saved) ^ set(self._learned)):
            where = "the checkpoint" if name in saved else "the model"
            raise TrainerdError(f"The checkpoint does not fit the model: {name} is only in {where}.", _NEW_RUN)
        for name, tensor in self._learned.items():
            if saved[name].shape != tensor.shape:
                message = f"The checkpoint does not fit the model: {name} is {list(saved[name].shape)} there, {list(tensor.shape)} here."
                raise TrainerdError(message, _NEW_RUN)
        for name, digest in state["frozen"].items():
            if self._frozen.get(name) != digest:
                message = f"The frozen weight {name} is not the one this run was started with (its sha256 differs)."
                raise TrainerdError(message, "Bring back the base model the run was started with.")

    def _stage(self, value: Any, path: str) -> Any:
        """A copy on the CPU, in the buffer of the last time where it fits."""
        if isinstance(value, Tensor):
            buffer = self._staging.get(path)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = self._staging[path] = torch.empty(value.shape, dtype=value.dtype)
            return buffer.copy_(value.detach())
        if isinstance(value, dict):
            return {key: self._stage(entry, f"{path}.{key}") for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._stage(entry, f"{path}.{index}") for index, entry in enumerate(value))
        return value


def learned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters and persistent buffers, by name; what is shared comes once."""
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def fingerprints(model: nn.Module) -> dict[str, str]:
    """sha256 of every frozen parameter, by name."""
    return {name: _sha256(p) for name, p in model.named_parameters() if not p.requires_grad}


def _sha256(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    digest.update(plain.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()
