"""What happens more than once: a step's second micro-batch, and a second step, from the events of the first. Must not play anything.

What has ended is born again under the number it had, so that a second step is a list and not a play, and what it holds is known
from what the first held.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress, filterfalse
from operator import invert, itemgetter

from trainerd.memory.tape import Tape


def again(tape: Tape, began: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The events since `began` once more, but for what was made in them and is still there, and for ends of what was there before;
    and the places, counted from the first event of all, of those that are left out."""
    at, low = began
    played = tape.events[at:]
    begin, number, before = tape.round if tape.round[0] > at else (at, low, set())
    left_out = {n for n in before if n >= low}.union(range(number, len(tape.sizes)), range(-low, 0))
    left_out.difference_update(map(invert, tape.events[begin:]))
    places = list(compress(range(at, at + len(played)), map(left_out.__contains__, played)))
    for place in reversed(places):
        del played[place - at]
    return played, places


def highest_again(held: Sequence[int], begin: int, end: int, left_out: Sequence[int]) -> int:
    """The most that is held while the events from `begin` to `end` happen again: what is left out has happened already."""
    more, found = held[end] - held[begin], 0
    for place in left_out:
        found = max(found, max(held[begin : place + 1]) + more)
        more -= held[place + 1] - held[place]
        begin = place + 1
    return max(found, max(held[begin : end + 1]) + more)


def follow(tape: Tape, began: tuple[int, int]) -> None:
    """A second micro-batch after that since `began`: where leaves took their gradients, it is added to those and ends there.

    The first ones' gradients are still there, so that those of this one have numbers of their own.
    """
    at, low = began
    played, events, numbers = tape.events[at:], tape.events, dict[int, int]()
    there = tape.there(at).union(range(low, len(tape.sizes))).difference(map(invert, played))
    left_out = {stays for stays in there if stays >= low}.union(range(-low, 0))
    begin, middle = 0, len(events)
    tape.round = middle, len(tape.sizes), there
    given = sorted((one for one in tape.given if one[0] >= at), key=itemgetter(0))
    for _, number, kind in given:
        numbers[number], numbers[~number] = len(tape.sizes), ~len(tape.sizes)
        tape.sizes.append(tape.sizes[number])
        tape.kinds.append(kind)
        left_out.discard(number)
    for end, ended in [*((place - at, [numbers[~number]]) for place, number, _ in given), (len(played), [])]:
        part = list(filterfalse(left_out.__contains__, played[begin:end]))
        events += map(numbers.get, part, part)
        events += ended
        begin = end
    tape.reborn += (len(events) - middle) // 2 - len(given)  # it leaves nothing behind: half of it are births
