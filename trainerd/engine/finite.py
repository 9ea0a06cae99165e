"""Whether a training's numbers are numbers still: a loss, gradient or weight that is NaN or infinite. Must not roll back itself.

It is asked with the numbers that were read from the device anyway, and before every save: so no checkpoint holds a weight that
is no number. What follows is the configuration's `faults.nan`; here it only ends the training, by an error that names the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from trainerd.config.model import FaultsConfig
from trainerd.contract import wire
from trainerd.contract.errors import NotFinite
from trainerd.engine.precision import Precision

# Below this, fp16's scaler has halved its scale thirty times: it is not the scale that overflows (fairseq draws the same line).
_COLLAPSED_SCALE = 1e-4
_SHOWN_SAMPLES = 16
_SENT_SAMPLES = 512
_LOSS, _GRADIENT = "the loss", "the gradient"


class FiniteWatch:
    """`samples(step)` gives the dataset indices of a step, counted from 0."""

    def __init__(
        self,
        faults: FaultsConfig,
        model: nn.Module,
        precision: Precision,
        samples: Callable[[int], list[int]],
        send: Callable[..., None],
    ) -> None:
        self._faults = faults
        self._weights = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._precision = precision
        self._samples = samples
        self._send = send
        self._in_a_row = 0
        self._first: tuple[int, int, str] | None = None
        self._warned = False

    def look(self, lines: Iterable[dict[str, Any]]) -> None:
        """At the metrics of the steps since the last time, where None is what is no finite number. Raises NotFinite."""
        for line in lines:
            what = self._wrong_in(line)
            if what is None:
                self._in_a_row, self._first = 0, None
                continue
            self._in_a_row += 1
            self._first = self._first or (line["step"], line["epoch"], what)
            if self._in_a_row > self._faults.nan_steps or self._faults.nan == "ignore":
                self._fault(*self._first)

    def look_at_weights(self, step: int, epoch: int) -> None:
        """Before they are saved. Raises NotFinite."""
        values = [p.detach() for _, p in self._weights]
        if not values or bool(torch.isfinite(torch.nn.utils.get_total_norm(values))):
            return
        # The norm of very large weights may overflow where none of them has.
        name = next((name for name, p in self._weights if not bool(torch.isfinite(p.detach()).all())), None)
        if name is not None:
            self._fault(step, epoch, f"the weight {name}")

    def _wrong_in(self, line: dict[str, Any]) -> str | None:
        if line["loss"] is None:
            return _LOSS
        if line["grad_norm"] is not None:
            return None
        scaler = self._precision.scaler
        if scaler is None:
            return _GRADIENT
        # fp16's scaler finds its scale by overflowing now and then: it leaves such a step out, and that is no fault.
        return "the gradient, at any scale," if scaler.get_scale() < _COLLAPSED_SCALE else None

    def _fault(self, step: int, epoch: int, what: str) -> None:
        if self._faults.nan == "ignore":
            if not self._warned:
                self._warned = True
                text = f"{what.capitalize()} is not a finite number any more (step {step}). A lower learning rate may help."
                self._send(wire.WARNING, text=text)
            return
        ids = self._samples(step - 1)
        self._send(
            wire.NAN,
            step=step,
            epoch=epoch,
            what=what,
            samples=ids[:_SENT_SAMPLES],
            num_samples=len(ids),
            policy=self._faults.nan,
        )
        shown = ", ".join(map(str, ids[:_SHOWN_SAMPLES])) + (f", … ({len(ids)} in all)" if len(ids) > _SHOWN_SAMPLES else "")
        where = f"step {step} (epoch {epoch}, samples {shown})"
        message = f"{what[0].upper()}{what[1:]} is not a finite number any more at {where}."
        raise NotFinite(message, "Look at these samples; a lower train.lr or train.precision=fp32 may help.", self._faults.nan == "stop")
