"""The trial on the CPU, with forked lives where that can be, and on the GPU if there is one. Must not know how a trial goes on."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainerd.config.model import RunConfig
from trainerd.contract import interpreter
from trainerd.contract.paths import Home, RunPaths
from trainerd.engine.locks import DeviceLock, state_folder
from trainerd.engine.loop import Link
from trainerd.engine.selftest import small_run
from trainerd.engine.selftest.life import ForkedLife, Life, SpawnedLife, can_fork
from trainerd.engine.selftest.small_task import Small
from trainerd.engine.selftest.trial import Tally, Trial
from trainerd.engine.trainer import Trainer

# What takes about a minute on two cores; a spawned life spends seconds on importing torch.
FORKED_KILLS, SPAWNED_KILLS, GPU_KILLS = 50, 12, 4
Tell = Callable[..., None]


def everything(asked: argparse.Namespace, environment: Mapping[str, str], tell: Tell, watch: Callable[[], None]) -> dict[str, Any]:
    """Both trials, and the verdict as plain values."""
    home = Home(asked.home.absolute())
    home.logs.mkdir(parents=True, exist_ok=True)
    log = home.logs / "selftest.log"
    until = time.monotonic() + (asked.seconds or float("inf"))
    forked = not asked.spawn and _warm_up(home)
    begin = _forked(log) if forked else _spawned(log, interpreter.environment())
    kills = asked.kills or (FORKED_KILLS if forked else SPAWNED_KILLS)
    cpu = Trial(home, asked.seed, kills, begin, small_run.config, tell, watch, until).run()
    verdict: dict[str, Any] = {"schema": 1, "seed": asked.seed, "forked": forked, **cpu.document(), "gpu": None}
    if asked.gpu and cpu.problem is None:
        verdict["gpu"] = _on_gpu(asked, environment, home, log, tell, watch, until)
    gpu = verdict["gpu"]
    verdict["passed"] = cpu.problem is None and (gpu is None or gpu["problem"] is None)
    return verdict


def _warm_up(home: Home) -> bool:
    """Import and try once whatever a training needs, so that no life spends its time on that; whether lives can be forked."""
    if not can_fork():
        return False
    from trainerd.engine import process, training  # noqa: F401 - the lives' own

    scratch = home.root / "warm-up"
    Trainer(Small(), small_run.config(0, epochs=2), home=scratch, run="warm-up", link=Link()).train()
    shutil.rmtree(scratch)
    return can_fork()


def _forked(log: Path) -> Callable[[RunPaths], Life]:
    return lambda paths: ForkedLife(paths, log)


def _spawned(log: Path, environment: dict[str, str]) -> Callable[[RunPaths], Life]:
    return lambda paths: SpawnedLife(paths, log, environment)


def _on_gpu(
    asked: argparse.Namespace, given: Mapping[str, str], home: Home, log: Path, tell: Tell, watch: Callable[[], None], until: float
) -> dict[str, Any]:
    """The same with every life on the GPU, spawned from nothing. It is left alone while another training has it."""
    uuid, name = asked.gpu
    if torch.version.cuda is None:
        return _untested(name, "the installed torch is a build without CUDA")
    lock = DeviceLock(uuid, home.root, state_folder(given))
    why = lock.acquire_at_once()
    if why is not None:
        return _untested(name, why)
    try:
        environment = interpreter.environment({**given, "TRAINERD_STATE": str(home.root / "state")})
        kills = min(GPU_KILLS, asked.kills or GPU_KILLS)

        def tell_where(event: str, **fields: Any) -> None:
            tell(event, **fields, gpu=name)

        trial = Trial(home, asked.seed, kills, _spawned(log, environment), _gpu_config, tell_where, watch, until, damage_every=2)
        return _gpu_verdict(name, trial.run())
    finally:
        lock.release()


def _gpu_config(seed: int) -> RunConfig:
    return small_run.config(seed, precision="auto")


def _gpu_verdict(name: str, tally: Tally) -> dict[str, Any]:
    """A device that computes differently each time, and is said to, breaks no promise; one that is said to be exact does."""
    document = {"name": name, "tested": True, "why": None, "bit_exact": tally.problem is None, **tally.document()}
    if tally.differs_by_itself and not tally.exact:
        document["why"], document["problem"] = tally.because, None
    return document


def _untested(name: str, why: str) -> dict[str, Any]:
    return {"name": name, "tested": False, "why": why, "bit_exact": None, "problem": None}
