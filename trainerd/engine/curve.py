"""How what a micro-batch needs grows with its samples: which traces tell, and what is taken for granted. Must not trace by itself.

Two and four samples make a line. It is looked at far from them, for a loss over all pairs of so few is less than rounding; where it is
passed there, one trace more is taken at a time, until what they say is true far away as well.
"""

from __future__ import annotations

from collections.abc import Callable

from trainerd.memory import traced
from trainerd.memory.traced import Trace

_LOOKED_AT, _NEARLY = 32, 1.02
_GROWS = "that what a micro-batch needs grows with the {power} of its samples, as it does from {first} to {checked}"
_POWERS = ("number", "square", "cube", "fourth power")
_FASTER = "; nothing was traced that checks it, and beyond that it may grow faster"
_STEPS = "that what a micro-batch needs grows beyond {last} samples as it does from {before} to {last}: no power fits all that was traced"
_BETWEEN = "that what a micro-batch needs grows as it does from {first} to {last} samples, with no whole power of them"
UNCHECKED = "that what a micro-batch needs grows evenly with its samples, as from 2 to 4: that it does so was not checked ({why})"


def followed(known: list[Trace], batch: int, gradients: list[int], made_of: Callable[[int], Trace]) -> tuple[list[Trace], str]:
    """The traces that tell how a micro-batch grows up to the whole batch, and in words what that assumes; "" where the line of the
    `known` ones will do. `gradients`: the size of each; `made_of` traces a step of so many samples."""
    waiting = [number for number in traced.CHECKED if number <= batch]
    if not waiting:
        return known, ""
    checked = [number for number in waiting if number <= _LOOKED_AT][-1]
    far = made_of(checked)
    is_alike = all(trace.events == far.events for trace in known)
    if is_alike and not _is_above(far, traced.stretched(known, checked, gradients)):
        return known, ""
    made = {trace.samples: trace for trace in (*known, far)}

    def of(samples: int) -> Trace:
        if samples not in made:
            made[samples] = made_of(samples)
        return made[samples]

    numbers = [*(trace.samples for trace in known), *waiting]
    alike = [number for number in numbers if number <= checked and of(number).events == far.events]
    if len(alike) > 1:  # fewer samples than those are another matter: they may have nothing to be compared with
        numbers = [number for number in numbers if number >= alike[0]]
    higher, far = _higher(numbers, far, gradients, of)
    peaks = [traced.stretched(some, batch, gradients).peak for some in (known, higher)]
    if peaks[1] <= peaks[0] * _NEARLY:
        return known, ""
    return _in_words(higher, far, gradients, numbers, of)


def _higher(numbers: list[int], far: Trace, gradients: list[int], of: Callable[[int], Trace]) -> tuple[list[Trace], Trace]:
    """One trace more at a time, until the farthest is not above what they say of it; and the farthest."""
    higher = [of(numbers[0]), of(numbers[1])]
    for number in numbers[2:]:
        if number > far.samples:
            far = of(number)
        if not _is_above(far, traced.stretched(higher, far.samples, gradients)):
            break
        higher.append(of(number))
    return higher, far


def _in_words(
    higher: list[Trace], far: Trace, gradients: list[int], numbers: list[int], of: Callable[[int], Trace]
) -> tuple[list[Trace], str]:
    last = higher[-1].samples
    is_checked = last < far.samples
    if last == traced.CHECKED[-1]:
        return higher, _STEPS.format(before=higher[-2].samples, last=last)
    grows = _GROWS.format(power=_POWERS[len(higher) - 2], first=higher[0].samples, checked=far.samples)
    if is_checked and _is_above(traced.stretched(higher, far.samples, gradients), far):
        # It grows by steps, or with a power that is not whole: all that may be traced says more than what is near.
        return [of(number) for number in numbers], _BETWEEN.format(first=higher[0].samples, last=numbers[-1])
    if len(higher) == 2 and is_checked:
        return higher, ""
    return higher, grows + ("" if is_checked else _FASTER)


def _is_above(made: Trace, told: Trace) -> bool:
    """Whether a step holds more than others say of it: in one of its storages, or, where it has another form, at its highest without
    what it holds in any case."""
    if made.events == told.events:
        return any(traced.is_off(real, foretold) for real, foretold in zip(made.sizes, told.sizes, strict=True))
    stays = sum(made.sizes[number] for _, number, _ in made.gradients)
    return traced.is_off(made.peak - stays, told.peak - stays)
