"""The planner's answer as lines for a person, at most 80 wide. Must not compute: it shows what the answer holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from textwrap import wrap

from trainerd.memory.estimate import UNVERIFIED, Estimate, Range
from trainerd.memory.planner import FITS, TIGHT, Answer, Proposal, smaller

from .outlook import Outlook, Unknown
from .words import NOT_KNOWN, bar, count, duration, share, size, sizes

_COLOURS = {FITS: "green", TIGHT: "yellow"}
_SAID = {FITS: "fits", TIGHT: "tight"}
_MEANT = {TIGHT: "It is likely to fit, and the step is repeated in smaller pieces when it does not; "}
_BAR, _INDENT, _WIDE = 24, 22, 80
_NAMES = {"casts": "low copies of weights", "staging": "checkpoint's copy", "cuda context and workspace": "CUDA overhead"}
_LEAST_SHOWN_BYTES = 50_000
Style = Callable[[str, str], str]


def lines(outlook: Outlook, fancy: bool, style: Style) -> list[str]:
    """The whole answer; `style(text, colour)` colours where the terminal can."""
    answer, found = outlook.answer, outlook.answer.estimate
    numbers, verdict = _numbers(found, outlook.budget.left_bytes), _verdict(answer, outlook, fancy, style)
    shown = [*_heading(found, outlook, style), "", *numbers, "", *verdict, ""]
    if answer.used:
        shown += _listed("Chosen to fit", [", ".join(answer.used)])
    if outlook.stated is not None:
        stated = outlook.stated
        shown += _listed("The preset says", [f"below {size(stated.vram_bytes)} of GPU memory and {size(stated.ram_bytes)} of RAM"])
    shown += [*_parts("At its highest", found.breakdown), *_parts("By phase", found.phases), ""]
    shown += _listed("How far to trust it", [found.trust])
    shown += _listed("Assumed", found.assumed)
    shown += _listed("Not in the estimate", found.not_modelled)
    return [*shown, *_changes(outlook)]


def short(outlook: Outlook, fancy: bool, style: Style) -> list[str]:
    """What is trained, what it needs, and whether that fits."""
    answer = outlook.answer
    shown = [*_heading(answer.estimate, outlook, style), *_verdict(answer, outlook, fancy, style), *unverified([outlook.place.device])]
    return [*shown, *_changes(outlook)]


def _changes(outlook: Outlook) -> list[str]:
    """Where something could be done about it."""
    return ["", *remedies(outlook)] if outlook.answer.verdict != FITS else []


def unverified(devices: Iterable[str]) -> list[str]:
    """What must be known of every number about a GPU, wherever it is shown."""
    return _wrapped(f"Not verified: {UNVERIFIED}.", _WIDE) if "cuda" in devices else []


def unknown(found: Unknown, style: Style) -> list[str]:
    """What will be done about a model that nothing is known of yet."""
    shown = [line for note in found.notes for line in _noted(note, style)]
    return [*shown, *_wrapped(found.reason, _WIDE), *(line for will in found.will for line in _point(will))]


def remedies(outlook: Outlook) -> list[str]:
    """What would make it fit, for certain where it is tight, likely where nothing does; each has been estimated with the change made."""
    answer, needed = outlook.answer, outlook.answer.estimate.needed
    if not answer.proposals and answer.verdict == TIGHT:
        said = f"Nothing the engine can change makes it certain. With {sizes(needed.upper, max(0, answer.budget_bytes))[0]} it would be"
        return _wrapped(f"{said}; `plan --measure` narrows the bound." if outlook.can_be_measured else f"{said}.", _WIDE)
    if not answer.proposals:
        if answer.no_model_fits:
            return _wrapped(answer.no_model_fits, _WIDE)
        return _least(answer)
    heading = f"It would fit{' for certain' if answer.verdict == TIGHT else ''} with:"
    if answer.proposals[0].verdict != FITS:
        heading = "Nothing that was tried fits for certain. It would be tight, likely to fit, with:"
    proposed = (line for proposal in answer.proposals for line in _proposed(proposal, answer.budget_bytes))
    return [*_wrapped(heading, _WIDE), *proposed]


def needs(proposal: Proposal, budget_bytes: int) -> str:
    """What is needed with these changes, by the number that they were judged by."""
    needed, left = proposal.estimate.needed, max(0, budget_bytes)
    if proposal.verdict == FITS:
        most, room = sizes(needed.upper, left)
        return f"needs {most} at most of {room} left"
    likely, most, room = sizes(needed.point, needed.upper, left)
    return f"needs {likely} likely, {most} at most, of {room} left"


def _least(answer: Answer) -> list[str]:
    """Nothing fits, not even likely: the least of what was tried, what to type for it on a line of its own, and what is left to change."""
    least = answer.least.estimate.needed if answer.least is not None else answer.estimate.needed
    words = " ".join(f"--set {setting}" for setting in answer.least.settings) if answer.least is not None else ""
    likely, most, room = sizes(least.point, least.upper, max(0, answer.budget_bytes))
    said = f"Nothing that was tried makes it fit: the least it needs is {likely} likely, {most} at most, of {room} left"
    said += ", with" if words else "."
    return [*_wrapped(said, _WIDE), *([f"  {words}"] if words else []), *_wrapped(smaller(answer), _WIDE)]


def _proposed(proposal: Proposal, budget_bytes: int) -> list[str]:
    """What to type stays on one line, to be copied."""
    words = " ".join(f"--set {setting}" for setting in proposal.settings)
    why = f"{needs(proposal, budget_bytes)}; {'; '.join(proposal.price)}"
    return [f"  {words}", *_wrapped(why, _WIDE, initial_indent="      ", subsequent_indent="      ")]


def _heading(found: Estimate, outlook: Outlook, style: Style) -> list[str]:
    setup = found.setup
    pieces = f"as {count(setup.accumulation)} × {count(setup.micro_batch)}" if setup.accumulation > 1 else "at once"
    learned = "" if found.num_trainable == found.num_parameters else f", {count(found.num_trainable)} of them learned"
    said = (
        f"{found.kind}: {count(found.num_parameters)} parameters{learned}, on {outlook.where}; "
        f"batch {count(setup.effective_batch)} {pieces}, {setup.precision}, {setup.optimizer}"
    )
    return [*_wrapped(said, _WIDE), *(line for note in outlook.notes for line in _noted(note, style))]


def _noted(note: str, style: Style) -> list[str]:
    return [style(line, "yellow") for line in _wrapped(note, _WIDE)]


def _numbers(found: Estimate, left_bytes: int) -> list[str]:
    """What is judged by what is left reads as it does there."""
    rows = [f"{'':<{_INDENT}}{'likely':>10}{'at most':>12}"]
    if found.driver is not None and found.reserved is not None and found.allocated is not None:
        rows += [_range("GPU, driver", found.driver, left_bytes), _range("  reserved by torch", found.reserved)]
        rows.append(_range("  allocated", found.allocated))
    rows.append(_range("RAM", found.ram, left_bytes if found.driver is None else None))
    rows += [_range("  of it pinned", found.pinned), _range("Disk", found.disk)]
    seconds = found.seconds_per_step
    if seconds is None:
        return [*rows, f"{'Time per step':<{_INDENT}}{NOT_KNOWN:>10}{NOT_KNOWN:>12}   known after: plan --measure"]
    return [*rows, f"{'Time per step':<{_INDENT}}{duration_of(seconds.point):>10}{duration_of(seconds.upper):>12}"]


def duration_of(seconds: float) -> str:
    """A step's time: milliseconds while it is short."""
    return f"{seconds * 1000:.0f} ms" if seconds < 2 else duration(seconds)


def _range(name: str, value: Range, left_bytes: int | None = None) -> str:
    shown = [size(value.point), size(value.upper)] if left_bytes is None else sizes(value.point, value.upper, left_bytes)
    return f"{name:<{_INDENT}}{shown[0]:>10}{shown[1]:>12}"


def _verdict(answer: Answer, outlook: Outlook, fancy: bool, style: Style) -> list[str]:
    """The bar is what is needed at most, of what is left."""
    needed = answer.estimate.needed
    drawn = bar(share(needed.upper, answer.budget_bytes) if answer.budget_bytes > 0 else 1.0, _BAR, fancy)
    colour = _COLOURS.get(answer.verdict, "red")
    said = _SAID.get(answer.verdict, "does not fit")
    budget = outlook.budget.beside(needed.point, needed.upper)[1]
    return [f"{style(drawn, colour)} {style(said, colour)}", *_wrapped(_MEANT.get(answer.verdict, "") + budget, _WIDE)]


def _parts(name: str, sizes: Mapping[str, int]) -> list[str]:
    """The largest first, each with its bytes."""
    ordered = sorted(((part, value) for part, value in sizes.items() if abs(value) >= _LEAST_SHOWN_BYTES), key=lambda part: -part[1])
    return [
        f"{name if not number else '':<{_INDENT}}{size(value):>10}  {_NAMES.get(part, part)}"
        for number, (part, value) in enumerate(ordered)
    ]


def _listed(name: str, texts: Iterable[str]) -> list[str]:
    found: list[str] = []
    for text in texts:
        first = f"{name if not found else '':<{_INDENT}}"
        found += _wrapped(text, _WIDE, initial_indent=first, subsequent_indent=" " * (_INDENT + 2))
    return found


def _wrapped(text: str, width: int, initial_indent: str = "", subsequent_indent: str = "") -> list[str]:
    """Broken between words; a path or a setting stays whole, to be copied."""
    return wrap(
        text,
        width,
        initial_indent=initial_indent,
        subsequent_indent=subsequent_indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _point(text: str) -> list[str]:
    return _wrapped(text, _WIDE, initial_indent="- ", subsequent_indent="  ")
