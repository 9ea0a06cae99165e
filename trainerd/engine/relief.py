"""What a training does when the machine is short of memory: go on in smaller parts, or leave until there is more. Between steps only.

When that is so is decided in pressure.py, from what guard.py sees. Must not measure or clean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainerd.contract import wire
from trainerd.engine import guard, pressure
from trainerd.engine import plan as plans
from trainerd.engine.step import Taken

if TYPE_CHECKING:
    from trainerd.engine.loop import Training


def make_room(t: Training, wanted: pressure.Want) -> None:
    """Halve the micro-batch by a named event, or ask the training to save and leave; or nothing."""
    if not wanted.what:
        return
    t.memory.done()
    because = wanted.because
    facts = {"resource": wanted.resource, "ceiling_bytes": wanted.ceiling_bytes, "own_bytes": wanted.own_bytes}
    if wanted.what == pressure.SHRINK:
        if t.step >= t.total_steps or t.evaluation.should_stop:
            return  # no step is left that smaller parts could help, or make another
        micro_batch = -(-t.plan["micro_batch"] // 2)
        t.stepper.split(micro_batch)
        plans.set_micro_batch(t.plan, micro_batch)
        t.exact.lost(t.step + 1, f"{because}; the micro-batch is now {micro_batch}")
        t.link.send(wire.NOTE, kind="shrunk", step=t.step + 1, micro_batch=micro_batch, text=because, **facts)
        t.link.send(wire.PLAN, **plans.shown(t.plan))
    elif wanted.what == pressure.LEAVE and t.asked.leave is None:
        t.asked.leave = {"do": wire.LEAVE, "why": wire.NO_ROOM, "save": True}
        leak = t.memory.leak() if wanted.resource == "ram" else None
        if leak is not None:  # one that starts anew holds nothing of it
            facts["needs_bytes"] = leak.needs_bytes
            because = f"{because}; the training keeps something from step to step: {leak.words}"
        t.link.send(wire.NO_ROOM, reason=because, **facts)


def take(t: Training, lr: float) -> Taken | None:
    """The next step, None when it is time to leave. What does not fit even in the smallest parts, while others hold what we had, is
    left for later: everything is as it was before the step."""
    try:
        return t.stepper.take(lr, t.leaving, t.shrunk)
    except (MemoryError, RuntimeError) as error:
        if not guard.is_out_of_memory(error) or not t.memory.may_wait or not t.stepper.put_back():
            raise
        text = guard.in_words(error)
    make_room(t, t.memory.want_to_leave(text))
    return None


def inform(t: Training) -> None:
    """Give the watch over the memory what only the training knows."""
    t.memory.saving = lambda: saving_bytes(t)
    t.memory.foretold = lambda: _foretold_bytes(t)


def _foretold_bytes(t: Training) -> int | None:
    found = t.foreseen.predicted(t.plan, t.config)
    return None if found is None else int(found.ram.point)


def saving_bytes(t: Training) -> int | None:
    """What half the micro-batch would give back of the RAM, by the estimate; None: it cannot be halved, or nobody knows."""
    micro_batch = t.plan["micro_batch"]
    if micro_batch == 1 or not t.task.splittable:
        return None
    half = dict(t.plan)
    plans.set_micro_batch(half, -(-micro_batch // 2))
    now, then = (t.foreseen.predicted(plan, t.config) for plan in (t.plan, half))
    return None if now is None or then is None else int(now.ram.point - then.ram.point)
