"""Writes runs/<run>/receipt.json: what was foretold and what was needed. Must not correct anything: trainerd/memory reads it.

Written when a training ends or leaves; a killed one leaves none. The RAM peak is the process's own, by the system's count. One of a
life whose plan has changed says so ("mixed"): its most was the larger plan's, and the forecast is the last one's.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from typing import Any

import psutil
import torch

from trainerd.config.model import RunConfig
from trainerd.contract import files, wire
from trainerd.contract.paths import RunPaths
from trainerd.engine import arenas, peak
from trainerd.engine import plan as plans
from trainerd.engine.fitting import Forecast, Send, device_facts
from trainerd.engine.guard import MemoryWatch
from trainerd.memory import receipts
from trainerd.memory.estimate import Estimate

_TAIL_BYTES = 64 << 10
_FEWEST_STEPS = 5


def write(found: Forecast, plan: plans.Plan, config: RunConfig, paths: RunPaths, steps: int, memory: MemoryWatch, send: Send) -> None:
    """The receipt of the run so far. Never raises: a run does not fail for it."""
    try:
        files.tidy(paths.folder, receipts.FILE)  # an earlier life may have been killed right here
        document = {**_document(found, plan, config, paths, steps, memory), "guard": memory.numbers()}
        files.write_json(paths.folder / receipts.FILE, document, durable=True)  # nobody tidies after the result
        send(wire.NOTE, kind="receipt", predicted=document["predicted"], real=document["real"])
    except Exception as error:  # whatever a driver or a full disk says: the training is worth more
        send(wire.NOTE, kind="no_receipt", text=f"{type(error).__name__}: {error}"[:300])


def _document(found: Forecast, plan: plans.Plan, config: RunConfig, paths: RunPaths, steps: int, memory: MemoryWatch) -> dict[str, Any]:
    device = plans.device_of(plan)
    name, driver = device_facts(device)
    predicted, setup = found.predicted(plan, config), found.setup(plan, config)
    return {
        "schema": files.SCHEMA,
        "at": time.time(),
        "kind": predicted.kind if predicted else None,
        "device": name,
        "driver": driver,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        "ram_total_bytes": int(psutil.virtual_memory().total),
        "plan": {key: plan.get(key) for key in ("precision", "micro_batch", "grad_accum", "effective_batch", "optimizer", "threads")},
        "setup": receipts.setup_kind(setup),
        "settings": dict(found.settings),
        "defaults": dict(found.defaults),
        "source": getattr(found.table, "source", ""),
        "mixed": setup != found.began or memory.oom_recoveries > found.recoveries or found.heap not in ("", arenas.now()),
        "steps": steps,
        "trace": found.trace,
        "splittable": found.splittable,
        "samples": found.samples,
        "predicted": dict(predicted.raw) if predicted else {},
        "at_most": {"ram_bytes": predicted.ram.upper, "driver_bytes": predicted.driver and predicted.driver.upper} if predicted else {},
        "real": {**_on_device(device, memory), "ram_bytes": _ram(found, predicted), "seconds_per_step": _seconds(paths)},
    }


def _on_device(device: torch.device, memory: MemoryWatch) -> dict[str, Any]:
    if device.type != "cuda":
        return {"allocated_bytes": None, "reserved_bytes": None, "driver_bytes": None}
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "driver_bytes": memory.driver.most(),
    }


def _ram(found: Forecast, predicted: Estimate | None = None) -> int | None:
    """None when it was higher before the training than ever in it, and the system cannot forget that; and when pages of a file that
    weights are mapped from are in its count, which are nobody's RAM."""
    if predicted is not None and predicted.on_disk_bytes:
        return None
    most = peak.ram_bytes()
    return most if most is not None and most > found.peak_before else None


def _seconds(paths: RunPaths) -> float | None:
    """The median time from step to step, of those at the end of the metrics."""
    with open(paths.metrics, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _TAIL_BYTES))
        lines = file.read().splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    times = [row["t"] for row in rows if "loss" in row and "t" in row]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times) if later > earlier]
    return statistics.median(gaps) if len(gaps) >= _FEWEST_STEPS else None
