"""A status as text for a person: one line per thing one asks about. Must not read files, nor need more than the standard library.

`status` prints these lines and the monitor shows them in its own layout; both take their words from here.
"""

from __future__ import annotations

from trainerd.contract.errors import MissingModule, plain
from trainerd.contract.status import (
    COMPLETED,
    CRASHED,
    FAILED,
    NEVER_STARTED,
    NOT_ANSWERING,
    PAUSED,
    RUNNING,
    STOPPED,
    UNREADABLE,
    Reading,
    Status,
)

from . import own_task, refused, stuck
from .fit import Part, joined
from .words import NOT_KNOWN, ago, bar, clean, count, duration, known, moment, number, percent, share, size

_LEAST_BAR = 6
_ENDS = ".?! "
INDENT = " " * 13
"""What stands before the values of a report."""
_EXITS = {STOPPED: 3, NEVER_STARTED: 3, FAILED: 4, CRASHED: 4, UNREADABLE: 4, NOT_ANSWERING: 4}
_REFUSALS = {"UsageError": 2, "ConfigError": 2, "BadTaskFile": 2, "MissingModule": 2, "Refused": 5}


def exit_code(reading: Reading) -> int:
    """0 live or completed, 3 stopped or never started, 4 failed, crashed, unreadable or not answering."""
    return _EXITS.get(reading.state, 0)


def result_code(reading: Reading) -> int:
    """What `--wait` returns: as exit_code(), but a run that could not be trained at all says why as a wrong word would have."""
    if reading.state == PAUSED and not reading.alive:
        return _EXITS[STOPPED]  # no result, and nobody works at one
    words = _last_exit(reading) if reading.state == FAILED else ""
    return _REFUSALS.get(words.partition(":")[0], exit_code(reading))


def summary(reading: Reading) -> str:
    """The state in one sentence; a reason that begins with it says it already."""
    state, reason = reading.state.capitalize(), clean(reading.reason)
    return reason if reason.startswith(state) else f"{state}: {reason}"


def lines(reading: Reading, now: float, fancy: bool, program: str) -> list[str]:
    """The whole report."""
    head = reading.state.upper() if reading.status is None else f"{reading.state.upper()}  {clean(reading.status.run or '')}".rstrip()
    report = [head]
    if reading.reason:
        report.append(f"  {clean(reading.reason)}")
    if reading.status is not None:
        report += [f"  {label:<{len(INDENT) - 2}}{text}" for label, text in rows(reading.status, reading, now, fancy)]
        report += [f"  ! {clean(warning)}" for warning in reading.status.warnings[-5:]]
    return report + [f"  {hint}" for hint in what_next(reading, program)]


def rows(status: Status, reading: Reading, now: float, fancy: bool) -> list[tuple[str, str]]:
    """What is known, as (label, text); what nobody knows yet is left out."""
    found = [
        ("task", task(status)),
        ("progress", progress(status, fancy)),
        ("loss", loss(status)),
        ("speed", speed(status, now) if reading.state == RUNNING else ""),
        ("memory", memory(status) if reading.alive else ""),
        ("checkpoint", checkpoint(status, now)),
        ("unsaved", unsaved(status, now)),
        ("trainer", trainer(status, reading.reason)),
        ("plan", plan(status)),
        ("exact", exact(status)),
        ("log", clean(status.log or "")),
        ("home", clean(status.home)),
    ]
    return [(label, text) for label, text in found if text]


def task(status: Status) -> str:
    parts = [clean(status.task or ""), f"preset {clean(status.preset)}" if status.preset else ""]
    if known(status.data.used):
        dropped = {clean(reason, 40): n for reason, n in status.data.dropped.items() if known(n) and n}
        left_out = f" ({', '.join(f'{count(n)} {reason}' for reason, n in dropped.items())} left out)" if dropped else ""
        parts.append(f"{count(status.data.used)} samples{left_out}")
    return " · ".join(part for part in parts if part)


def fraction(status: Status) -> float | None:
    """How much is done: of the preparation while it lasts, of the steps after."""
    phase = status.phase
    if phase is not None and phase.name == "preparing":
        return share(phase.done, phase.total)
    return share(status.progress.step, status.progress.total_steps)


def progress(status: Status, fancy: bool, bar_width: int = 24, width: int | None = None) -> str:
    """How far it is. In a `width` the bar takes what the words leave, up to its own width."""
    done, phase, now = fraction(status), status.phase, status.progress
    parts = [Part(percent(done) if done is not None else "", 0, " ")]
    if phase is not None and phase.name not in ("training", "starting"):
        of = f" {count(phase.done)} of {count(phase.total)}" if known(phase.total) else f" {count(phase.done)}" if known(phase.done) else ""
        parts.append(Part(f"{clean(phase.name, 40)}{of} {clean(phase.unit or '', 40)}".rstrip(), 2))
    if known(now.step):
        of = f" of {count(now.total_steps)}" if known(now.total_steps) else ""
        parts.append(Part(f"step {count(now.step)}{of}", 1))
    if known(now.epoch) and known(now.epochs):
        parts.append(Part(f"epoch {count(now.epoch)} of {count(now.epochs)}", 3))
    if done is not None and bar_width:
        parts.insert(0, Part(stretched(done, joined(parts), bar_width, width, fancy), 4))
    return joined(parts, width)


def stretched(fraction: float | None, beside: str, most: int, width: int | None, fancy: bool) -> str:
    """A bar as wide as the words beside it leave room for; "" where that is too little to tell anything."""
    room = most if width is None else min(most, width - len(beside) - len("[] "))
    return bar(fraction, room, fancy) if room >= _LEAST_BAR else ""


def loss(status: Status, width: int | None = None, gradient: bool = False) -> str:
    now = status.progress
    parts = [Part(number(now.loss) if known(now.loss) else "")]
    for label, values, most, rank in (("eval", now.eval, 4, 1), ("best", now.best, 1, 3)):
        shown = [f"{clean(name, 30)} {number(v)}" for name, v in values.items() if known(v) and name != "step"][:most]
        at = f" at step {count(values['step'])}" if known(values.get("step")) else ""
        if shown:
            parts.append(Part(f"{label} {shown[0]}{at if len(shown) == 1 else ''}", rank))
            parts += [Part(text, rank + 1 + place, ", ") for place, text in enumerate(shown[1:])]
    parts.append(Part(f"lr {number(now.lr)}" if known(now.lr) else "", 6))
    parts.append(Part(f"gradient {number(now.grad_norm)}" if gradient and known(now.grad_norm) else "", 7))
    return joined(parts, width)


def speed(status: Status, now: float, width: int | None = None) -> str:
    """How fast it goes, and when it will be done: counted from the moment the numbers were written."""
    made = status.progress
    parts = [Part(f"{count(made.samples_per_second)} samples/s" if known(made.samples_per_second) else "", 1)]
    parts.append(Part(f"{count(made.tokens_per_second)} tokens/s" if known(made.tokens_per_second) else "", 2))
    if made.eta_seconds is not None and known(made.eta_seconds):
        since = min(max(now - status.updated_at, 0.0), made.eta_seconds) if known(status.updated_at) else 0.0
        left = made.eta_seconds - since
        parts.append(Part(f"done in {duration(left)}, at {moment(now + left, now)}"))
    return joined(parts, width)


def memory(status: Status) -> str:
    use, parts = status.memory, []
    if known(use.ram.used_bytes):
        own = f", the trainer {size(use.ram.trainer_bytes)} of it" if known(use.ram.trainer_bytes) else ""
        parts.append(f"RAM of the whole machine {size(use.ram.used_bytes)}{_allowed(use.ram.limit_bytes)}{own}")
    if known(use.vram.used_bytes):
        parts.append(f"VRAM {size(use.vram.used_bytes)}{_allowed(use.vram.limit_bytes)}")
    for number_of, what in ((use.cleanups, "cleanup"), (use.oom_recoveries, "out-of-memory recovered")):
        if known(number_of) and number_of:
            parts.append(f"{count(number_of)} {what}{'s' if number_of > 1 and what == 'cleanup' else ''}")
    return " · ".join(parts)


def _allowed(limit_bytes: int | None) -> str:
    return f" of {size(limit_bytes)} allowed" if known(limit_bytes) else ""


def checkpoint(status: Status, now: float, width: int | None = None, ahead: int | None = None) -> str:
    """The newest one, how old it is, and what a kill now would repeat (`ahead` steps, when that is known)."""
    last = status.checkpoint
    if last is None:
        return "none yet" if known(status.progress.step) else ""
    parts = [Part(f"step {count(last.step)}, {ago(last.at, now)}"), Part(f"({size(last.bytes)})", 2, " ")]
    if ahead is not None:
        parts.append(Part(f"a kill now would repeat {count(ahead)} step{'' if ahead == 1 else 's'}", 1))
    return joined(parts, width)


def unsaved(status: Status, now: float) -> str:
    if not known(status.unsaved.since):
        return ""
    missing = f"; {size(status.unsaved.missing_bytes)} more disk space needed" if known(status.unsaved.missing_bytes) else ""
    return f"no checkpoint could be written since {ago(status.unsaved.since, now)}{missing}"


def trainer(status: Status, reason: str = "") -> str:
    """How often it was started again, and how it ended last, unless the `reason` that stands above says it."""
    parts = []
    if known(status.trainer.restarts) and status.trainer.restarts:
        parts.append(f"{count(status.trainer.restarts)} restart{'s' if status.trainer.restarts > 1 else ''}")
    if status.trainer.last_exit and plain(status.trainer.last_exit).rstrip(_ENDS) not in reason:
        parts.append(f"last exit: {clean(plain(status.trainer.last_exit))}")
    return " · ".join(parts)


def plan(status: Status) -> str:
    made = status.plan
    parts = [clean(text) for text in (made.device, made.precision) if text]
    if known(made.effective_batch):
        split = f" ({count(made.micro_batch)} × {count(made.grad_accum)})" if known(made.grad_accum) and known(made.micro_batch) else ""
        parts.append(f"batch {count(made.effective_batch)}{split}")
    parts += [clean(made.optimizer)] if made.optimizer else []
    parts += [f"{count(made.threads)} thread{'s' if made.threads != 1 else ''}"] if known(made.threads) else []
    return " · ".join(parts)


def exact(status: Status) -> str:
    """Said only when the run is no longer bit for bit that of an uninterrupted one."""
    if status.exact.now is not False:
        return ""
    since = f" since step {count(status.exact.since_step)}" if known(status.exact.since_step) else ""
    return f"not to the last bit{since}: {clean(status.exact.because or NOT_KNOWN)}"


def _last_exit(reading: Reading) -> str:
    return (reading.status.trainer.last_exit if reading.status else None) or ""


def what_next(reading: Reading, program: str) -> list[str]:
    """What to type next, where there is something, the likeliest first."""
    task = reading.status.task if reading.status else None
    if reading.state == NEVER_STARTED:
        return [f"Start with: {program} start"]
    if reading.state == PAUSED:
        return [f"Go on with: {program} resume"]
    if reading.state == COMPLETED:
        return [f"Ask the model with: {program} suggest PREFIX"] if task == "cadence" else []
    if reading.state == NOT_ANSWERING:
        return stuck.steps(reading, program)
    if reading.state in (STOPPED, CRASHED):
        saved = reading.status is not None and reading.status.checkpoint is not None
        return [f"Go on{' from the last checkpoint' if saved else ''} with: {program} resume"]
    if reading.state == FAILED:
        look = f"Look into the log with: {program} logs"
        if _last_exit(reading).startswith(MissingModule.__name__):
            return [f"When it is there again, go on with: {program} resume", look]
        again = refused.steps(reading, program) or own_task.steps(reading, program) or [f"Try again with: {program} resume"]
        return [look, *again]
    return []
