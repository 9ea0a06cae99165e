"""TensorBoard event files beside metrics.jsonl, when asked for. Must not matter: without the package it says so and is silent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class TensorBoard:
    """Takes the lines of metrics.jsonl."""

    def __init__(self, folder: Path, step: int, send: Callable[..., None]) -> None:
        """Events after `step` from an earlier start are hidden: those steps are trained again."""
        self._writer: Any = None
        self._send = send
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its imports warn about packages that are none of ours
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            send("warning", text="TensorBoard is not installed: log.tensorboard does nothing. Install it with: pip install tensorboard")
            return
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except OSError as error:
            send("warning", text=f"TensorBoard files cannot be written: {error}")

    def line(self, line: dict[str, Any]) -> None:
        if self._writer is None:
            return
        try:
            self._add(line)
        except Exception as error:  # its writing thread's, handed on later: a full disk, mostly
            self._writer = None
            self._send("warning", text=f"TensorBoard files are no longer written: {type(error).__name__}: {error}")

    def _add(self, line: dict[str, Any]) -> None:
        step = line["step"]
        for name in ("loss", "lr", "grad_norm"):
            if line.get(name) is not None:
                self._writer.add_scalar(f"train/{name}", line[name], step)
        for group in ("eval", "metrics"):
            for name, value in line.get(group, {}).items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            with suppress(Exception):  # as above
                self._writer.close()
