"""Measures this machine once for the memory estimate, in a process of its own: `python -m trainerd.engine.measuring --home DIR`.

The bare trainer's RAM, the speed of products, of memory and of copies to a GPU, and what a CUDA context takes. Must not train.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainerd.contract.paths import Home
from trainerd.machine import memory
from trainerd.memory import profile

_SIDE_CPU, _SIDE_GPU = 1024, 4096
_REPEATS = 5
_COPY_BYTES = 128 << 20


def measured(threads: int | None = None) -> tuple[profile.Profile, str, str | None]:
    """The profile, and the device and driver it is for, by so many threads, else as many as a trainer takes by itself. In a process that
    has not been on a GPU yet."""
    import torch

    from trainerd.engine import gpu_use, plan, trainer  # noqa: F401 - the trainer: what one has loaded before its model
    from trainerd.engine.fitting import device_facts

    torch.set_num_threads(threads or plan.own_threads())
    others = gpu_use.before_context()
    _take_a_step(torch, torch.device("cpu"))
    process_bytes = memory.own_bytes() + profile.LATER_BYTES
    through = _through(torch.ones(_COPY_BYTES, dtype=torch.uint8), torch.device("cpu"))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    workspace = 0
    if device.type == "cuda":
        workspace = _workspace_of(torch, device)
        _take_a_step(torch, device)  # the context grows with every kernel that is loaded for the first time
    name, driver = device_facts(device)
    side = _SIDE_GPU if device.type == "cuda" else _SIDE_CPU
    speeds = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if device.type == "cuda" or precision != "fp16":  # on a CPU fp16 takes minutes and is never chosen
            one = torch.randn(side, side, device=device).to(dtype)
            speeds[precision] = 2e-9 * side**3 / _fastest(lambda one=one: one @ one, device)  # type: ignore[misc]
    if device.type == "cpu":
        found = profile.Profile(name, "", str(torch.__version__), True, process_bytes, gigaflops=speeds, ram_bytes_per_second=through)
        return found, name, driver
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    to = _COPY_BYTES / _fastest(lambda: there.copy_(host), device)
    back = _COPY_BYTES / _fastest(lambda: host.copy_(there), device)
    within = _through(there, device)
    held, assumed = gpu_use.of(device, others).most(), profile.Profile()
    context = None if held is None else held - torch.cuda.memory_reserved(device)
    found = profile.Profile(
        device=name,
        driver=driver or "",
        torch=str(torch.__version__),
        measured=True,
        process_bytes=process_bytes,
        context_bytes=context or assumed.context_bytes,
        context_most_bytes=context or assumed.context_most_bytes,
        workspace_bytes=workspace or _workspace(name),
        gigaflops=speeds,
        ram_bytes_per_second=through,
        to_device_bytes_per_second=to,
        from_device_bytes_per_second=back,
        device_bytes_per_second=within,
    )
    return found, name, driver


def _workspace_of(torch: Any, device: Any) -> int:
    """What cuBLAS takes with the first product of a process and keeps, by the allocator's own count; 0 when it took none there."""
    one = torch.ones(256, 256, device=device)
    before = int(torch.cuda.memory_allocated(device))
    kept = one @ one
    made = int(kept.numel() * kept.element_size())
    return max(0, int(torch.cuda.memory_allocated(device)) - before - made)


def _take_a_step(torch: Any, device: Any) -> None:
    """A step of a tiny model: kernels and libraries that are loaded when first used belong to the bare trainer."""
    from trainerd.engine import eager

    layer, tiny = torch.nn.GRU(16, 16, batch_first=True).to(device), torch.randn(4, 8, 16, device=device)
    optimizer = eager.plain(torch.optim.AdamW)(layer.parameters())
    low = torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
    with torch.autocast(device.type, low):
        layer(tiny)[0].float().sum().backward()
    optimizer.step()


def _through(passed: Any, device: object) -> float:
    """Bytes per second of a tensor that is read and written."""
    return 2 * _COPY_BYTES / _fastest(lambda: passed.add_(1), device)


def _fastest(work: Callable[[], object], device: object) -> float:
    """The shortest of a few times, in seconds."""
    import torch

    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        work()
        if getattr(device, "type", "cpu") == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def _workspace(name: str) -> int:
    return (32 << 20) if profile.hopper(name) else profile.Profile().workspace_bytes


def main(arguments: list[str] | None = None) -> int:
    """Measure, and keep it under the home's cache."""
    parser = argparse.ArgumentParser(prog="trainerd.engine.measuring", description=__doc__)
    parser.add_argument("--home", required=True, type=Path)
    home = Home(parser.parse_args(arguments).home.absolute())
    found, name, driver = measured()
    try:
        profile.write(profile.file_of(home.cache, name, driver, found.torch), found)
    except OSError as error:
        print(f"The profile cannot be kept in {home.cache}: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
