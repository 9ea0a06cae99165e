"""torch.compile for a training that asks for it: refused in words where it cannot work. Must not choose it: no estimate covers it.

The module is compiled in place, so that weights keep their names and a checkpoint fits with and without.
"""

from __future__ import annotations

import torch
from torch import nn

from trainerd.contract.errors import ConfigError
from trainerd.engine.dropout import SampleDropout

_BACKEND = "inductor"


def warning(wanted: bool) -> str | None:
    """What a person is told who asked for it."""
    if not wanted:
        return None
    return "train.compile is on: what torch.compile allocates is not in the memory estimate. Running out of memory loses no step."


def compile_in_place(model: nn.Module, wanted: bool, device: torch.device) -> None:
    """From its next call on, the model is compiled. Raises ConfigError when this machine has nothing to compile with."""
    if not wanted:
        return
    missing = what_is_missing(device)
    if missing is not None:
        raise ConfigError([f"train.compile is on, but {missing}."], "Install it, or leave train.compile off.")
    for module in model.modules():
        if isinstance(module, SampleDropout):
            # Compiled, it made NaN as soon as shapes changed (seen on a CPU with torch 2.13): its integers overflow on purpose.
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign, no-untyped-call]
    model.compile(backend=_BACKEND)


def what_is_missing(device: torch.device) -> str | None:
    """In words what torch's compiler needs for this device and does not find; None when it can work."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch finds no Triton for this GPU"
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return "torch finds no C++ compiler on this machine (g++, clang or MSVC)"
    return None
