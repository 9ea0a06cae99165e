"""The planner's answer as lines for a person. Must not compute: it shows what the answer holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trainerd.memory.estimate import Estimate, Range
from trainerd.memory.planner import FITS, TIGHT, Answer, Proposal

from .outlook import Outlook
from .words import NOT_KNOWN, bar, count, duration, share, size

_COLOURS = {FITS: "green", TIGHT: "yellow"}
_SAID = {FITS: "fits", TIGHT: "tight: likely to fit, and the step is repeated in smaller pieces when it does not"}
_WIDTH = 24
_INDENT = 22
Style = Callable[[str, str], str]


def lines(outlook: Outlook, fancy: bool, style: Style) -> list[str]:
    """The whole answer; `style(text, colour)` colours where the terminal can."""
    answer, found = outlook.answer, outlook.answer.estimate
    shown = [_heading(found, outlook), "", *_numbers(found), ""]
    shown += [_verdict(answer, outlook, fancy, style)]
    if answer.used:
        shown.append(_row("Chosen to fit", ", ".join(answer.used)))
    shown += [_row("At its highest", _parts(found.breakdown)), _row("By phase", _parts(found.phases))]
    shown.append(_row("How far to trust it", found.trust))
    shown += _listed("Assumed", found.assumed)
    shown += _listed("Not in the estimate", found.not_modelled)
    if answer.verdict not in _SAID:
        shown += ["", *remedies(answer)]
    return shown


def remedies(answer: Answer) -> list[str]:
    """What would make it fit; each has been estimated with the change made."""
    if not answer.proposals:
        needed = answer.estimate.needed
        return [f"Nothing the engine can change makes it fit: at best it needs {size(needed.point)}. A smaller model would."]
    return ["It would fit with:", *(f"  {_proposed(proposal)}" for proposal in answer.proposals)]


def _proposed(proposal: Proposal) -> str:
    words = " ".join(f"--set {setting}" for setting in proposal.settings)
    return f"{words}   ({size(proposal.estimate.needed.upper)} at most; {'; '.join(proposal.price)})"


def _heading(found: Estimate, outlook: Outlook) -> str:
    setup = found.setup
    pieces = f"{setup.accumulation} × {setup.micro_batch}" if setup.accumulation > 1 else "at once"
    learned = "" if found.num_trainable == found.num_parameters else f", {count(found.num_trainable)} of them learned"
    return (
        f"{found.kind}: {count(found.num_parameters)} parameters{learned}, on {outlook.where}; "
        f"batch {setup.effective_batch} {pieces}, {setup.precision}, {setup.optimizer}"
    )


def _numbers(found: Estimate) -> list[str]:
    rows = [f"{'':<{_INDENT}}{'likely':>10}{'at most':>12}"]
    if found.driver is not None and found.reserved is not None and found.allocated is not None:
        rows += [_range("GPU, driver", found.driver), _range("  reserved by torch", found.reserved)]
        rows.append(_range("  allocated", found.allocated))
    rows += [_range("RAM", found.ram), _range("Disk", found.disk)]
    seconds = found.seconds_per_step
    likely, most = (duration_of(seconds.point), duration_of(seconds.upper)) if seconds else (NOT_KNOWN, NOT_KNOWN)
    return [*rows, f"{'Time per step':<{_INDENT}}{likely:>10}{most:>12}"]


def duration_of(seconds: float) -> str:
    """A step's time: milliseconds while it is short."""
    return f"{seconds * 1000:.0f} ms" if seconds < 2 else duration(seconds)


def _range(name: str, value: Range) -> str:
    return f"{name:<{_INDENT}}{size(value.point):>10}{size(value.upper):>12}"


def _verdict(answer: Answer, outlook: Outlook, fancy: bool, style: Style) -> str:
    needed = answer.estimate.needed
    drawn = bar(share(needed.upper, answer.budget_bytes) if answer.budget_bytes > 0 else 1.0, _WIDTH, fancy)
    colour = _COLOURS.get(answer.verdict, "red")
    said = _SAID.get(answer.verdict, "does not fit")
    return f"{style(drawn, colour)} {style(said, colour)}; {outlook.budget}"


def _parts(sizes: Mapping[str, int]) -> str:
    ordered = sorted(sizes.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size(value)}" for name, value in ordered if value >= 50_000)


def _row(name: str, text: str) -> str:
    return f"{name:<{_INDENT}}{text}"


def _listed(name: str, texts: tuple[str, ...]) -> list[str]:
    return [_row(name if not number else "", text) for number, text in enumerate(texts)]
