"""What an out-of-memory error looks like, and the watch over the limits: clean, hold to the cap, make room. Must not decide how a
step is retried, and must not shrink or leave by itself: the loop does, at a step's edge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from trainerd.config.model import MemoryConfig
from trainerd.contract import wire
from trainerd.contract.errors import Refused, TrainerdError
from trainerd.contract.sizes import written
from trainerd.engine import gpu_use
from trainerd.engine.cleaning import Cleaner, free
from trainerd.engine.growth import Growth, Leak
from trainerd.engine.lookout import Growing, Lookout
from trainerd.engine.pressure import LEAVE, SHRINK, Pressure, Want
from trainerd.machine import memory as machine_memory
from trainerd.memory.limits import resolve_limit

T = TypeVar("T")
_WHAT_TO_DO = "Close other programs, raise memory.ram_limit or memory.vram_limit, or choose a smaller model; `plan` says what it needs."
_WHAT_KEEPS = "The task keeps something from step to step, like a loss with its graph, or a list nobody empties: mend it there."
# How allocators say no when they do not raise OutOfMemoryError: torch's CPU allocator (Linux, Windows), cuBLAS, cuDNN, the driver.
_ALLOCATION_FAILED = (
    "out of memory",
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
# What they were asked for in one piece: torch on the CPU, torch on CUDA, numpy.
_ASKED = re.compile(r"(?:tried to|unable to) allocate (\d+(?:\.\d*)?) ?(bytes|[KMGTPE]iB)", re.IGNORECASE)
_CAPACITY = re.compile(r"total capacity of (\d+(?:\.\d*)?) ([KMGTPE]iB)")
_LOOK_SECONDS = 1.0
_CAP_SECONDS = 60.0
_THRESHOLD = 0.95  # of the limit: cleaning at the limit itself would be too late
_MARGIN_BYTES = 64 << 20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _ALLOCATION_FAILED)


def in_words(error: BaseException) -> str:
    """What could not be had, for an event: its size as a person reads it, where torch's CPU allocator or numpy says it; else the first
    line of what an allocator said."""
    text = str(error).strip()
    asked_bytes = _asked_bytes(text)
    if asked_bytes is not None and not isinstance(error, torch.OutOfMemoryError):
        return f"{written(asked_bytes)} could not be had in one piece"
    return text.splitlines()[0][:300] if text else type(error).__name__


def _asked_bytes(text: str) -> int | None:
    """How much an allocator was asked for in one piece, where it says so."""
    found = _ASKED.search(text)
    return _bytes(found) if found is not None else None


def _bytes(found: re.Match[str]) -> int:
    return int(float(found[1]) * 1024 ** (" KMGTPE".find(found[2][0].upper()) if found[2] != "bytes" else 0))


def _beyond_this_machine(error: BaseException) -> str | None:
    """That more was asked for in one piece than the device has in all, which no room that comes free will mend; None: it was less."""
    text = str(error)
    asked_bytes, capacity = _asked_bytes(text), _CAPACITY.search(text)
    has_bytes = _bytes(capacity) if capacity is not None else machine_memory.ram().total_bytes
    if asked_bytes is None or asked_bytes <= has_bytes:
        return None
    where = "this machine" if capacity is None else "the GPU"
    return f"{written(asked_bytes)} in one piece are asked for, and {where} has {written(has_bytes)} in all"


def with_room(work: Callable[[], T], told: Callable[[str], None]) -> T:
    """What `work` gives; when it runs out of memory, what it gives the second time, after freeing what can be. `told` hears of it."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        text = in_words(error)
    # Out of the except block: its frames held what is to be freed.
    free()
    told(text)
    return work()


@contextmanager
def worded(doing: str) -> Iterator[None]:
    """What cannot be tried in smaller parts ends in words a person can use, when there is no memory for it. Raises Refused where there
    never will be: that is not tried again."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        never = _beyond_this_machine(error)
        if never is not None:
            raise Refused(f"It does not fit: to {doing}, {never}.", "A smaller model would fit; more room would not help.") from error
        asked_bytes = _asked_bytes(str(error))
        much = "" if asked_bytes is None else f": {written(asked_bytes)} could not be had in one piece"
        raise TrainerdError(f"There is too little memory to {doing}{much}.", _WHAT_TO_DO) from error


@dataclass(frozen=True)
class DeviceUse:
    """A GPU's memory: what all use of it, and what of it is ours: reserved by our allocator, allocated by tensors."""

    used_bytes: int
    total_bytes: int
    reserved_bytes: int
    allocated_bytes: int

    @property
    def others_bytes(self) -> int:
        """Everything but our allocator's: other programs, the desktop, our context."""
        return self.used_bytes - self.reserved_bytes


@dataclass(frozen=True)
class Senses:
    """What the guard sees, and its only hand on the device. Tests bring their own."""

    ram: Callable[[], machine_memory.RamFacts]
    own_bytes: Callable[[], int]
    """The RAM this process holds."""
    device: Callable[[], DeviceUse | None]
    cap: Callable[[float], None]
    """Give our allocator this share of the device."""


def _senses(device: torch.device) -> Senses:
    if device.type != "cuda":
        return Senses(machine_memory.ram, machine_memory.own_bytes, lambda: None, lambda share: None)

    def use() -> DeviceUse:
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return DeviceUse(total_bytes - free_bytes, total_bytes, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))

    def cap(share: float) -> None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)

    return Senses(machine_memory.ram, machine_memory.own_bytes, use, cap)


class MemoryWatch:
    """Looks once a second: cleans above the threshold, holds CUDA's allocator to what the limit leaves it, and says when the
    machine needs the memory more. In a long micro-batch a thread beside it looks at the RAM; what is done is done at the edge."""

    def __init__(
        self,
        config: MemoryConfig,
        device: torch.device,
        send: Callable[..., None],
        *,
        may_leave: bool = False,
        senses: Senses | None = None,
    ) -> None:
        """`may_leave`: somebody will start this training again when there is memory."""
        self._config = config
        self._send = send
        self._senses = senses or _senses(device)
        self._may_leave = may_leave
        self._ram: Pressure | None = None
        self._vram: Pressure | None = None
        self._ram_limit = self._vram_limit = 0
        self._next_look = self._next_cap = 0.0  # the first look, before the first step, caps at once
        self._cap: int | None = None
        self._first_cap: int | None = None
        self.cleaner = Cleaner(self._held_bytes, send)
        self.saving: Callable[[], int | None] = lambda: None
        """What half the micro-batch would give back of the RAM; None: it cannot be halved, or nobody knows."""
        self.foretold: Callable[[], int | None] = lambda: None
        """The RAM that the whole training was foretold to need; None: nobody knows."""
        self.wants = Want()
        self._growth = Growth()
        self._said_ours = False
        self._lookout = Lookout(self._senses.ram, self._seen)
        self._growing = Growing(send)
        self._needs_cleaning = False
        """Blocks lie idle that others could have: after smaller parts, and when the cap has fallen."""
        self.oom_recoveries = 0
        self.driver = gpu_use.NOBODY
        """What the driver has seen of us at most; it knows what others held before this process was on the device."""

    @property
    def may_wait(self) -> bool:
        """Whether others hold now what we had at the beginning, and somebody starts us again when they have given it back."""
        if not self._may_leave or self._ram is None:
            return False
        vram = self._senses.device()
        if vram is None:
            return self._senses.ram().used_bytes > self._ram.ceiling_bytes
        cap = self._vram_limit - vram.others_bytes - _MARGIN_BYTES
        return self._first_cap is not None and cap < self._first_cap - _MARGIN_BYTES

    def want_to_leave(self, error: str) -> Want:
        """For a step that did not fit beside the others, however small its parts."""
        vram = self._senses.device()
        pressure = self._ram if vram is None else self._vram
        assert pressure is not None
        own = self._senses.own_bytes() if vram is None else vram.reserved_bytes
        return Want(LEAVE, f"Others hold the memory that a step needs ({error})", pressure.resource, pressure.ceiling_bytes, own)

    def look(self, now: float, step: int) -> Want:
        """Called in every step, and between micro-batches; does something once a second. What it wants, until it is done."""
        self.cleaner.passed(step, now)
        if now < self._next_look or self.wants.what:
            return self.wants
        self._next_look = now + _LOOK_SECONDS
        ram, vram = self._senses.ram(), self._senses.device()
        if self._ram is None:
            self._begin(ram, vram)
        if vram is not None:
            self.driver.look(vram.reserved_bytes)
        self._needs_cleaning |= vram is not None and self._hold_to_limit(now, vram)
        if (self._needs_cleaning or self._is_tight(ram, vram)) and self.cleaner.due(now, needed=self._needs_cleaning):
            self._needs_cleaning = False
            self.cleaner.clean(now, step)
            self.tell()
            ram, vram = self._senses.ram(), self._senses.device()
        self._growth.seen(step, self._senses.own_bytes())
        self.wants = self._judged(now, ram, vram)
        return self.wants

    def leak(self) -> Leak | None:
        """What the training keeps from step to step, if that is why it holds so much."""
        return self._growth.leak(self.foretold())

    @contextmanager
    def looked_after(self) -> Iterator[None]:
        """Meanwhile the RAM is seen within a second or two, however long a micro-batch takes."""
        self._lookout.start()
        try:
            yield
        finally:
            self._lookout.stop()

    def _seen(self, now: float, ram: machine_memory.RamFacts) -> None:
        """In the thread that looks: since when the limit is passed, and what must be said at once."""
        if self._ram is not None:
            self._growing.seen(now, ram, over=self._ram.see(now, ram.used_bytes), ceiling_bytes=self._ram.ceiling_bytes)

    def done(self) -> None:
        """What was wanted has been done. What smaller parts leave free is the heap's until it is trimmed, at the next look."""
        self._needs_cleaning |= self.wants.what == SHRINK
        self.wants = Want()

    def numbers(self) -> dict[str, Any]:
        """How often it had to do something, and what that has cost."""
        cleaner = self.cleaner
        return {"cleanups": cleaner.cleanups, "cleanup_seconds": round(cleaner.seconds, 4), "oom_recoveries": self.oom_recoveries}

    def tell(self) -> None:
        """Send the numbers of the status."""
        facts = self.numbers()
        use = self._senses.device()
        if use is not None:
            facts |= {"vram_allocated_bytes": use.allocated_bytes, "vram_reserved_bytes": use.reserved_bytes}
        self._send("memory", **facts)

    def _held_bytes(self) -> int:
        """What a cleaning can lower: our RAM, and the blocks CUDA's allocator keeps."""
        use = self._senses.device()
        return self._senses.own_bytes() + (use.reserved_bytes if use is not None else 0)

    def _begin(self, ram: machine_memory.RamFacts, vram: DeviceUse | None) -> None:
        self._ram_limit = resolve_limit(self._config.ram_limit, ram.total_bytes)
        self._ram = Pressure("ram", self._ram_limit, ram.total_bytes, ram.used_bytes, self._senses.own_bytes(), may_leave=self._may_leave)
        if vram is not None:
            self._vram_limit = resolve_limit(self._config.vram_limit, vram.total_bytes)
            needed = vram.others_bytes + vram.allocated_bytes
            self._vram = Pressure("vram", self._vram_limit, vram.total_bytes, needed, may_leave=self._may_leave)

    def _is_tight(self, ram: machine_memory.RamFacts, vram: DeviceUse | None) -> bool:
        # Of the GPU the allocator itself keeps us below the limit: only others can bring it above.
        return ram.used_bytes > self._ram_limit * _THRESHOLD or (vram is not None and vram.used_bytes > self._vram_limit)

    def _hold_to_limit(self, now: float, vram: DeviceUse) -> bool:
        """Once a minute, or at once when the limit is passed, our allocator gets what the limit leaves it beside everything else on
        the device, our context included. True: it holds more than that in blocks it does not use, because others have grown."""
        if now < self._next_cap and vram.used_bytes <= self._vram_limit:
            return False
        self._next_cap = now + _CAP_SECONDS
        cap = max(0, self._vram_limit - vram.others_bytes - _MARGIN_BYTES)
        before, self._cap = self._cap, cap
        self._first_cap = cap if self._first_cap is None else self._first_cap
        self._senses.cap(cap / vram.total_bytes)
        return before is not None and cap < before - _MARGIN_BYTES and cap < vram.reserved_bytes

    def _judged(self, now: float, ram: machine_memory.RamFacts, vram: DeviceUse | None) -> Want:
        """Weights and optimizer must fit on the device beside the others; what a step needs beyond them may shrink by itself,
        for past the cap it is an out-of-memory."""
        if vram is not None and self._vram is not None:
            wanted = self._vram.judge(now, vram.others_bytes + vram.allocated_bytes, vram.reserved_bytes, None)
            if wanted.what:
                return wanted
        assert self._ram is not None
        over = ram.used_bytes > self._ram.ceiling_bytes
        own_bytes = self._senses.own_bytes() if over else 0
        wanted = self._ram.judge(now, ram.used_bytes, own_bytes, self.saving() if over else None)
        if self._ram.is_ours and not self._said_ours:
            self._said_ours = True
            much = f"The training itself takes more RAM ({own_bytes / 1e9:.1f} GB) than memory.ram_limit leaves it"
            leak = self.leak()
            why, what_to_do = (f": {leak.words}", _WHAT_KEEPS) if leak is not None else ("", _WHAT_TO_DO)
            self._send(wire.WARNING, text=f"{much}{why}, and it goes on: nobody else has grown. {what_to_do}")
        return wanted
