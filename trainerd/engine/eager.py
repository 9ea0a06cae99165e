"""torch's optimizers without torch's compiler. Must not change a number: the same functions run, without what compiling wants.

Each method of an optimizer is wrapped so that torch.compile leaves it alone, and the first call of any imports the whole compiler
for that: a second of a restart, and RAM for as long as the training lives. What is compiled here is a model, never its optimizer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

_METHODS = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")


@functools.cache
def plain(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same kind of optimizer, by the same name. Where torch wraps differently it is as torch's own."""
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in _METHODS}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods)
