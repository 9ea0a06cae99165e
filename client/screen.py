"""The monitor's screen as lines of styled words, made to fit 80x24. Must not read files, draw, or need rich.

Every number that can be bad has a word beside it, not a colour alone; what is old is said to be old, never shown as news.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from trainerd.contract.status import CRASHED, FAILED, NOT_ANSWERING, RUNNING, UNREADABLE, Reading, Status

from . import curve, view
from .words import NOT_KNOWN, bar, clean, count, duration, known, moment, number, percent, share, size

Line = list[tuple[str, str]]  # (text, style) pieces

_ALARMING = (CRASHED, FAILED, NOT_ANSWERING, UNREADABLE)
_STYLE = {"ok": "green", "high": "yellow", "full": "bold red", "warm": "yellow", "hot": "bold red"}
_LABEL = 11
KEYS = "p pause  r resume  c checkpoint  s stop  ? help  q quit (training goes on)"
HELP = [
    "p   pause: save a checkpoint, free RAM and GPU",
    "r   resume after a pause",
    "c   write a checkpoint now",
    "s   stop: save a checkpoint and end (asks once)",
    "q   leave this screen; the training goes on",
    "    The same from any terminal: pause, resume, save, stop, status, logs.",
]


@dataclass
class Scene:
    """Everything one frame is drawn from."""

    reading: Reading
    losses: Sequence[tuple[int, float]] = ()
    log: Sequence[str] = ()
    now: float = field(default_factory=time.time)
    width: int = 80
    height: int = 24
    fancy: bool = True
    braille: bool = True
    footer: str = KEYS
    help: bool = False


def frame(scene: Scene) -> list[Line]:
    """The lines from top to bottom, at most `height` of them, none longer than `width`."""
    found = scene.reading.status
    reason = wrap(clean(scene.reading.reason), scene.width) or [" "]
    lines = [_title(scene), *([(part, "bold" if scene.reading.state in _ALARMING else "")] for part in reason[:2])]
    if found is not None:
        lines += [*_progress(found, scene), *_plot(scene), *_memory(found, scene), _gpu(found), *_safety(found, scene)]
    room = scene.height - len(lines) - 2
    below = HELP if scene.help else [clean(line, scene.width) for line in scene.log]
    title = "help" if scene.help else "log"
    if room > 0:
        shown = below[:room] if scene.help else below[-room:]
        rule = "─" if scene.fancy else "-"
        lines.append([(f"{rule * 2} {title} {rule * max(scene.width - len(title) - 4, 0)}", "dim")])
        lines += [[(line, "")] for line in shown] + [[(" ", "")] for _ in range(room - len(shown))]
    lines = [*lines[: scene.height - 1], [(scene.footer, "reverse")]]
    return [_cut(line, scene) for line in lines]


def _cut(line: Line, scene: Scene) -> Line:
    """The part of a line that fits, in characters the output can carry."""
    left, kept = scene.width, []
    for text, style in line:
        if not scene.fancy:
            text = text.replace("·", "|").replace("×", "x")
        kept.append((text[:left], style))
        left -= len(text[:left])
    return kept


def _title(scene: Scene) -> Line:
    state = scene.reading.state
    run = clean(scene.reading.status.run or "", 60) if scene.reading.status else ""
    style = "bold red" if state in _ALARMING else "bold green" if state == RUNNING else "bold yellow"
    hour = time.strftime("%H:%M:%S", time.localtime(scene.now))
    used = len("trainerd  ") + len(run) + 2 + len(state) + len(hour)
    return [("trainerd  ", "bold"), (f"{run}  ", ""), (state.upper(), style), (" " * max(scene.width - used, 1), ""), (hour, "dim")]


def _progress(status: Status, scene: Scene) -> list[Line]:
    made = status.progress
    grad = f"gradient {number(made.grad_norm)}" if known(made.grad_norm) else ""
    loss = " · ".join(part for part in (view.loss(status), grad) if part)
    speed = view.speed(status, scene.now) if scene.reading.state == RUNNING else ""
    return [
        _labelled("progress", view.progress(status, scene.fancy, 12 if scene.width < 100 else 24) or NOT_KNOWN),
        _labelled("speed", speed or NOT_KNOWN),
        _labelled("loss", loss or NOT_KNOWN),
    ]


def _plot(scene: Scene) -> list[Line]:
    """The loss over the whole run, with its highest and lowest mean at the left."""
    height = max(3, min(8, scene.height - 19))
    losses = [loss for _, loss in scene.losses]
    if len(losses) < 2:
        return [[(" " * _LABEL + "the loss curve appears here after the first steps", "dim")]]
    width = max(scene.width - _LABEL - 1, 10)
    rows = curve.draw(losses, width, height, scene.braille)
    labels = [""] * height
    labels[0], labels[-1] = number(max(losses)), number(min(losses))
    return [[(f"{label:>{_LABEL - 1}} ", "dim"), (row, "cyan")] for label, row in zip(labels, rows, strict=True)]


def _memory(status: Status, scene: Scene) -> list[Line]:
    found: list[Line] = []
    for name, part in (("RAM", status.memory.ram), ("VRAM", status.memory.vram)):
        limit = part.limit_bytes if known(part.limit_bytes) else part.total_bytes
        used = share(part.used_bytes, limit)
        if used is None:
            continue
        word = "ok" if used < 0.85 else "high" if used < 0.97 else "full"
        text = f"{size(part.used_bytes)} of {size(limit)} allowed"
        drawn = bar(used, 20, scene.fancy)
        found.append([*_labelled(name, f"{text:<26}"), (f"{drawn} {percent(used)} ", _STYLE[word]), (word, _STYLE[word])])
    return found


def _gpu(status: Status) -> Line:
    gpu, power = status.gpu, status.power
    pieces: Line = [(clean(gpu.name, 32), "")] if gpu.name else [("no GPU in use", "dim")]
    if known(gpu.temperature_c):
        word = "ok" if _at_most(gpu.temperature_c, 79) else "warm" if _at_most(gpu.temperature_c, 86) else "hot"
        pieces.append((f"  {number_short(gpu.temperature_c)} °C {word}", _STYLE[word]))
    pieces += [(f"  {number_short(gpu.power_w)} W", "")] if known(gpu.power_w) else []
    pieces += [(f"  {number_short(gpu.utilization_percent)} % busy", "")] if known(gpu.utilization_percent) else []
    if power.plugged is not None:
        pieces.append(("  · on mains" if power.plugged else "  · on battery", "" if power.plugged else "yellow"))
    pieces += [(f", battery {number_short(power.percent)} %", "")] if known(power.percent) else []
    return [*_labelled("GPU", ""), *pieces]


def _safety(status: Status, scene: Scene) -> list[Line]:
    """Checkpoint, what a kill would cost, restarts, and the newest warnings."""
    last, step = status.checkpoint, status.progress.step
    text = view.checkpoint(status, scene.now) or NOT_KNOWN
    if last is not None and step is not None and known(step) and known(last.step) and scene.reading.alive:
        text += f" · a kill now would repeat {count(max(step - last.step, 0))} steps"
    found = [_labelled("checkpoint", text), _labelled("restarts", view.trainer(status) or "none")]
    missing = view.unsaved(status, scene.now)
    found += [_labelled("unsaved", missing, "bold red")] if missing else []
    found += [[(f"! {clean(warning)}", "yellow")] for warning in status.warnings[-2:]]
    return found


def line(reading: Reading, now: float) -> str:
    """One plain line, for a pipe."""
    status = reading.status
    parts = [time.strftime("%H:%M:%S", time.localtime(now)), reading.state]
    if status is None:
        return " ".join([*parts, clean(reading.reason)])
    made, ram = status.progress, status.memory.ram
    parts += [clean(status.phase.name, 40)] if status.phase and status.phase.name != "training" else []
    done = view.fraction(status)
    parts += [percent(done)] if done is not None else []
    parts += [f"step {count(made.step)}/{count(made.total_steps)}"] if known(made.step) else []
    parts += [f"loss {number(made.loss)}"] if known(made.loss) else []
    if reading.state == RUNNING:
        parts += [f"{count(made.samples_per_second)} samples/s"] if known(made.samples_per_second) else []
        parts += [f"ETA {duration(made.eta_seconds)}"] if known(made.eta_seconds) else []
        parts += [f"RAM {size(ram.used_bytes)}/{size(ram.limit_bytes)}"] if known(ram.used_bytes) else []
    parts += [f"checkpoint {count(status.checkpoint.step)} at {moment(status.checkpoint.at, now)}"] if status.checkpoint else []
    return "  ".join(parts)


def number_short(value: Any) -> str:
    return f"{value:.0f}" if known(value) else NOT_KNOWN


def _at_most(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound


def _labelled(label: str, text: str, style: str = "") -> Line:
    return [(f"{label:<{_LABEL}}", "dim"), (text, style)]
