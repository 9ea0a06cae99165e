"""Watches the RAM while a model is being built, which is one call of a task and has no edge. Must not know the model, nor train.

One that passes the limit before it is whole would never fit: it is refused before it has filled the machine. Where somebody starts the
process again it ends at once, whatever the call is at; in a library user's process at the next weight that the model is given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook

from trainerd.config.model import MemoryConfig
from trainerd.contract import wire
from trainerd.contract.errors import Refused
from trainerd.contract.sizes import compared
from trainerd.engine.lookout import LAST_SHARE, Lookout
from trainerd.engine.loop import Link
from trainerd.machine import memory
from trainerd.machine.memory import RamFacts, own_bytes
from trainerd.memory.limits import resolve_limit

_GROWTH_SHARE = 0.05  # by which others may grow meanwhile and it is still we who have passed the limit
_PATIENCE_SECONDS = 10.0
WHAT_TO_DO = "A smaller model would fit, or more memory: close programs, or raise the limit."


class Filling:
    """Judges what is seen once a second, in the thread that looks."""

    def __init__(self, config: MemoryConfig, link: Link, *, begun: bool) -> None:
        """`begun`: steps of this run have worked, so it is the room that is another one, and that is waited for."""
        ram = memory.ram()
        limit_bytes = resolve_limit(config.ram_limit, ram.total_bytes)
        self._link = link
        self._begun = begun
        # A limit that others have passed before bounds nothing (fitting.py): what the machine has does.
        self._ceiling_bytes = limit_bytes if ram.used_bytes <= limit_bytes else int(ram.total_bytes * LAST_SHARE)
        self._own_before = own_bytes()
        self._others_bytes = ram.used_bytes - self._own_before + int(ram.total_bytes * _GROWTH_SHARE)
        self._since: float | None = None
        self._refusal: Refused | None = None

    def seen(self, now: float, ram: RamFacts) -> None:
        """One look."""
        if ram.used_bytes <= self._ceiling_bytes or self._refusal is not None:
            self._since = None
            return
        self._since = now if self._since is None else self._since
        own = own_bytes()
        used, allowed = compared(ram.used_bytes, self._ceiling_bytes)
        is_ours = ram.used_bytes - own <= self._others_bytes
        if is_ours and not self._begun:
            taken = f"building the model alone has taken {max(0, own - self._own_before) / 1e9:.1f} GB of RAM"
            limit = f"{used} are in use where {allowed} may be (memory.ram_limit)"
            self._refusal = Refused(f"It does not fit: {taken}, and {limit}.", WHAT_TO_DO)
            self._link.give_up(self._refusal)
        elif now - self._since >= _PATIENCE_SECONDS and self._link.starts_again:
            because = f"RAM is short: {used} in use, {allowed} allowed"
            facts: dict[str, Any] = {"resource": "ram", "ceiling_bytes": self._ceiling_bytes, "own_bytes": own}
            self._link.send(wire.NO_ROOM, reason=because, **facts)
            self._link.give_up(None)

    def check(self, *_: object) -> None:
        """In the thread that builds. Raises Refused."""
        if self._refusal is not None:
            raise self._refusal


@contextmanager
def watched(config: MemoryConfig, link: Link, *, begun: bool) -> Iterator[None]:
    """For the time a model is built. Raises Refused when it has passed the limit."""
    filling = Filling(config, link, begun=begun)
    lookout = Lookout(memory.ram, filling.seen)
    hook = register_module_parameter_registration_hook(filling.check)
    lookout.start()
    try:
        yield
    finally:
        lookout.stop()
        hook.remove()
    filling.seen(time.monotonic(), memory.ram())  # what was built within a second
    filling.check()
