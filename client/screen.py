"""The monitor's screen as lines of styled words, made to fit 80x24. Must not read files, draw, or need rich.

Every number that can be bad has a word beside it, not a colour alone; what is old is said to be old, never shown as news.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from trainerd.contract.status import CRASHED, FAILED, NOT_ANSWERING, PAUSED, RUNNING, STOPPING, UNREADABLE, Reading, Status

from . import curve, view
from .fit import Part, joined, shortened
from .words import NOT_KNOWN, clean, count, duration, known, moment, number, percent, share, size

Line = list[tuple[str, str]]  # (text, style) pieces

_ALARMING = (CRASHED, FAILED, NOT_ANSWERING, UNREADABLE)
_STYLE = {"ok": "green", "high": "yellow", "full": "bold red", "warm": "yellow", "hot": "bold red"}
_LABEL = 11
_KEY_GAP = "  "
_BAR = 20
_WIDE = 100
_DATED = re.compile(r"\d{4}-\d\d-\d\d (?=\d\d:\d\d:\d\d )")
_DATE = len("2026-11-21 ")
_LEAVE = [Part("q quit", 0, _KEY_GAP), Part("(training goes on)", 6, " ")]
_KEYS = {
    "p": Part("p pause", 2, _KEY_GAP),
    "r": Part("r resume", 2, _KEY_GAP),
    "c": Part("c checkpoint", 4, _KEY_GAP),
    "s": Part("s stop", 3, _KEY_GAP),
    "?": Part("? help", 5, _KEY_GAP),
}
HELP = [
    "p   pause: save a checkpoint, free RAM and GPU",
    "r   resume after a pause",
    "c   write a checkpoint now",
    "s   stop: save a checkpoint and end (asks once)",
    "q   leave this screen; the training goes on",
    "    The same from any terminal: pause, resume, save, stop, status, logs.",
]
HELP_ENDED = [
    "q   leave this screen",
    "    Nothing runs any more: what can be done next is typed in a terminal.",
    "    logs: what it printed     runs: all that was trained     start: begin anew",
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
    footer: str | None = None
    """What stands in the last line; None: the keys that do something now."""
    help: bool = False
    program: str = "trainerd"

    @property
    def beside(self) -> int:
        """Columns to the right of the labels."""
        return max(self.width - _LABEL, 10)


def frame(scene: Scene) -> list[Line]:
    """The lines from top to bottom, at most `height` of them, none longer than `width`."""
    found = scene.reading.status
    reason = wrap(clean(scene.reading.reason), scene.width) or [" "]
    lines = [_title(scene), *([(part, "bold" if scene.reading.state in _ALARMING else "")] for part in reason[:2])]
    for text in view.what_next(scene.reading, scene.program):
        lines += [[(part, "bold cyan")] for part in wrap(text, scene.width)[:2]]
    if found is not None:
        lines += [*_progress(found, scene), *_plot(scene), *_now(found, scene), *_safety(found, scene)]
    room = scene.height - len(lines) - 2
    helping = HELP if scene.reading.alive else HELP_ENDED
    below = helping if scene.help else [shortened(_timed(line, scene), scene.width) for line in map(clean, scene.log)]
    title = "help" if scene.help else "log"
    if room > 0:
        shown = below[:room] if scene.help else below[-room:]
        rule = "─" if scene.fancy else "-"
        lines.append([(f"{rule * 2} {title} {rule * max(scene.width - len(title) - 4, 0)}", "dim")])
        lines += [[(line, "")] for line in shown] + [[(" ", "")] for _ in range(room - len(shown))]
    footer = keys(scene) if scene.footer is None else shortened(scene.footer, scene.width)
    lines = [*lines[: scene.height - 1], [(footer, "reverse")]]
    return [_cut(line, scene) for line in lines]


def keys(scene: Scene) -> str:
    """The keys that do something in this state, as many as fit."""
    reading = scene.reading
    if not reading.alive:
        return joined([Part("q quit", 0, _KEY_GAP), _KEYS["?"]], scene.width)
    names = "" if reading.state == STOPPING else "rs" if reading.state == PAUSED else "pcs"
    known_keys = [*(_KEYS[name] for name in names), _KEYS["?"], *_LEAVE]
    line = joined(known_keys, scene.width)
    return line if len(line) <= scene.width else "q quit"[: scene.width]


def _timed(line: str, scene: Scene) -> str:
    """A line of the log without the date where room is dear: the screen is about now."""
    return line[_DATE:] if scene.width < _WIDE and _DATED.match(line) else line


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
    """Who, what, how it stands, and the time: the name of the program goes first where they do not fit, then the time."""
    state = scene.reading.state.upper()
    run = clean(scene.reading.status.run or "", 60) if scene.reading.status else ""
    style = "bold red" if scene.reading.state in _ALARMING else "bold green" if scene.reading.state == RUNNING else "bold yellow"
    hour = time.strftime("%H:%M:%S", time.localtime(scene.now))
    name, room = "trainerd  ", scene.width - len(state)
    run = f"{run}  " if run and len(run) + 2 <= room else ""
    name = name if len(name) + len(run) + len(hour) + 1 <= room else ""
    hour = hour if len(name) + len(run) + len(hour) + 1 <= room else ""
    blank = " " * max(room - len(name) - len(run) - len(hour), 0)
    return [(name, "bold"), (run, ""), (state, style), (blank, ""), (hour, "dim")]


def _progress(status: Status, scene: Scene) -> list[Line]:
    wide, running = scene.beside, scene.reading.state == RUNNING
    lines = [_labelled("progress", view.progress(status, scene.fancy, width=wide) or NOT_KNOWN)]
    lines += [_labelled("speed", view.speed(status, scene.now, wide) or NOT_KNOWN)] if running else []
    return [*lines, _labelled("loss", view.loss(status, wide, gradient=running) or NOT_KNOWN)]


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


def _now(status: Status, scene: Scene) -> list[Line]:
    """Memory and GPU, while somebody measures them: what was measured last is not true any more when all is over."""
    return [*_memory(status, scene), _gpu(status)] if scene.reading.alive else []


def _memory(status: Status, scene: Scene) -> list[Line]:
    ram, vram = status.memory.ram, status.memory.vram
    found: list[Line] = []
    for name, of, part, own in (("RAM", "machine ", ram, ram.trainer_bytes), ("VRAM", "", vram, None)):
        limit = part.limit_bytes if known(part.limit_bytes) else part.total_bytes
        used = share(part.used_bytes, limit)
        if used is None:
            continue
        word = "ok" if used < 0.85 else "high" if used < 0.97 else "full"
        verdict = f"{percent(used)} {word}"
        parts = [Part(f"{of}{size(part.used_bytes)}"), Part(f"of {size(limit)} allowed", 1, " ")]
        text = joined([*parts, Part(f"trainer {size(own)}" if known(own) else "", 2, ", ")], scene.beside - len(verdict) - 2)
        drawn = view.stretched(used, f"{text}  {verdict}", _BAR, scene.beside, scene.fancy)
        found.append([*_labelled(name, f"{text}  "), (f"{drawn} " if drawn else "", _STYLE[word]), (verdict, _STYLE[word])])
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
    last, step, ahead = status.checkpoint, status.progress.step, None
    if last is not None and step is not None and known(step) and known(last.step) and scene.reading.alive:
        ahead = max(step - last.step, 0)
    found = [_labelled("checkpoint", view.checkpoint(status, scene.now, scene.beside, ahead) or NOT_KNOWN)]
    found.append(_labelled("restarts", shortened(view.trainer(status, scene.reading.reason) or "none", scene.beside)))
    missing = view.unsaved(status, scene.now)
    found += [_labelled("unsaved", missing, "bold red")] if missing else []
    return found + [[(text, "yellow")] for text in _warnings(status, scene)]


def _warnings(status: Status, scene: Scene) -> list[str]:
    """The newest warnings, each in two lines at most, and how many more there are."""
    newest = status.warnings[-2:]
    lines = []
    for place, warning in enumerate(newest):
        whole = wrap(f"! {clean(warning)}", scene.width, subsequent_indent="  ")
        room = 2 if place == len(newest) - 1 else 1
        lines += [*whole[: room - 1], shortened(" ".join(whole[room - 1 :]), scene.width)] if len(whole) > room else whole
    return lines


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
