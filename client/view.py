"""A status as text for a person: one line per thing one asks about. Must not read files, nor need more than the standard library.

`status` prints these lines and the monitor shows them in its own layout; both take their words from here.
"""

from __future__ import annotations

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

from .words import NOT_KNOWN, ago, bar, clean, count, duration, known, moment, number, percent, share, size

_EXITS = {STOPPED: 3, NEVER_STARTED: 3, FAILED: 4, CRASHED: 4, UNREADABLE: 4, NOT_ANSWERING: 4}


def exit_code(reading: Reading) -> int:
    """0 live or completed, 3 stopped or never started, 4 failed, crashed, unreadable or not answering."""
    return _EXITS.get(reading.state, 0)


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
        report += [f"  {label:<11}{text}" for label, text in rows(reading.status, reading, now, fancy)]
        report += [f"  ! {clean(warning)}" for warning in reading.status.warnings[-5:]]
    hint = what_next(reading, program)
    return [*report, f"  {hint}"] if hint else report


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
        ("trainer", trainer(status)),
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


def progress(status: Status, fancy: bool, bar_width: int = 24) -> str:
    done, phase, now = fraction(status), status.phase, status.progress
    shown = f"{bar(done, bar_width, fancy)} {percent(done)}" if done is not None else ""
    parts = [shown] if shown else []
    if phase is not None and phase.name not in ("training", "starting"):
        of = f" {count(phase.done)} of {count(phase.total)}" if known(phase.total) else f" {count(phase.done)}" if known(phase.done) else ""
        parts.append(f"{clean(phase.name, 40)}{of} {clean(phase.unit or '', 40)}".rstrip())
    if known(now.step):
        parts.append(f"step {count(now.step)} of {count(now.total_steps)}" if known(now.total_steps) else f"step {count(now.step)}")
    if known(now.epoch) and known(now.epochs):
        parts.append(f"epoch {count(now.epoch)} of {count(now.epochs)}")
    return " · ".join(parts)


def loss(status: Status) -> str:
    now = status.progress
    parts = [number(now.loss)] if known(now.loss) else []
    for label, values, most in (("eval", now.eval, 4), ("best", now.best, 1)):
        shown = [f"{clean(name, 30)} {number(v)}" for name, v in values.items() if known(v) and name != "step"][:most]
        at = f" at step {count(values['step'])}" if known(values.get("step")) else ""
        parts += [f"{label} {', '.join(shown)}{at}"] if shown else []
    parts += [f"lr {number(now.lr)}"] if known(now.lr) else []
    return " · ".join(parts)


def speed(status: Status, now: float) -> str:
    made = status.progress
    parts = [f"{count(made.samples_per_second)} samples/s"] if known(made.samples_per_second) else []
    parts += [f"{count(made.tokens_per_second)} tokens/s"] if known(made.tokens_per_second) else []
    if made.eta_seconds is not None and known(made.eta_seconds):
        parts.append(f"done in {duration(made.eta_seconds)}, at {moment(now + made.eta_seconds, now)}")
    return " · ".join(parts)


def memory(status: Status) -> str:
    use = status.memory
    parts = []
    for name, part in (("RAM", use.ram), ("VRAM", use.vram)):
        if known(part.used_bytes):
            of = f" of {size(part.limit_bytes)} allowed" if known(part.limit_bytes) else ""
            parts.append(f"{name} {size(part.used_bytes)}{of}")
    for number_of, what in ((use.cleanups, "cleanup"), (use.oom_recoveries, "out-of-memory recovered")):
        if known(number_of) and number_of:
            parts.append(f"{count(number_of)} {what}{'s' if number_of > 1 and what == 'cleanup' else ''}")
    return " · ".join(parts)


def checkpoint(status: Status, now: float) -> str:
    last = status.checkpoint
    if last is None:
        return "none yet" if known(status.progress.step) else ""
    return f"step {count(last.step)}, {ago(last.at, now)} ({size(last.bytes)})"


def unsaved(status: Status, now: float) -> str:
    if not known(status.unsaved.since):
        return ""
    missing = f"; {size(status.unsaved.missing_bytes)} more disk space needed" if known(status.unsaved.missing_bytes) else ""
    return f"no checkpoint could be written since {ago(status.unsaved.since, now)}{missing}"


def trainer(status: Status) -> str:
    parts = []
    if known(status.trainer.restarts) and status.trainer.restarts:
        parts.append(f"{count(status.trainer.restarts)} restart{'s' if status.trainer.restarts > 1 else ''}")
    if status.trainer.last_exit:
        parts.append(f"last exit: {clean(status.trainer.last_exit)}")
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


def what_next(reading: Reading, program: str) -> str:
    """The one thing to type next, where there is one."""
    if reading.state == NEVER_STARTED:
        return f"Start with: {program} start"
    if reading.state == PAUSED:
        return f"Go on with: {program} resume"
    if reading.state == COMPLETED and reading.status and reading.status.task == "cadence":
        return f"Ask the model with: {program} suggest PREFIX"
    if reading.state in (STOPPED, CRASHED):
        return f"Go on from the last checkpoint with: {program} resume"
    if reading.state == FAILED:
        return f"Look into the log with: {program} logs     Try again with: {program} resume"
    return ""
