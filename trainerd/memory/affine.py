"""Numbers that are on a line in the samples of a micro-batch, so that a timeline is played once and told for any other number of them.

What is decided by such a number holds for some numbers of samples and not for others: Samples remembers for which. What a line
cannot be (a product of two, the length of a range, a key of a dictionary) raises NotAffine or TypeError: then every number of samples is
played by itself. Must not know what is counted.
"""

from __future__ import annotations

from typing import Any


class NotAffine(Exception):
    """This is no line in the number of samples."""


class Samples:
    """So many are played; from `least` to `most`, but for `others`, everything would have been decided as it was."""

    def __init__(self, number: int) -> None:
        self.number, self.least, self.most = number, 1, 1 << 60
        self.others: set[int] = set()

    def holds(self, number: int) -> bool:
        """Whether what was played is what would be played with so many."""
        return self.least <= number <= self.most and number not in self.others

    def not_negative(self, base: int, slope: int) -> None:
        """base + slope * samples >= 0 was seen, and something done for it."""
        if slope > 0:
            self.least = max(self.least, -(base // slope))
        else:
            self.most = min(self.most, base // -slope)

    def only_here(self) -> None:
        """Something was done that holds for this number alone."""
        self.least = self.most = self.number

    def not_where_zero(self, base: int, slope: int) -> None:
        """base + slope * samples != 0 was seen."""
        if base % slope == 0:
            self.others.add(-base // slope)


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise NotAffine
    return value


class Affine:
    """base + slope * samples. Not an int: what cannot compute with it must fail, and not go on with one value of it."""

    __slots__ = ("base", "samples", "slope")
    __hash__ = None  # type: ignore[assignment]
    base: Any
    slope: Any
    samples: Samples

    def __init__(self, samples: Samples, base: Any, slope: Any) -> None:
        self.samples, self.base, self.slope = samples, base, slope

    def at(self, number: int) -> Any:
        return self.base + self.slope * number

    def _line(self, base: Any, slope: Any) -> Any:
        return Affine(self.samples, base, slope) if slope else base

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Affine):
            return self._line(self.base + other.base, self.slope + other.slope)
        return Affine(self.samples, self.base + _number(other), self.slope)

    __radd__ = __add__

    def __neg__(self) -> Any:
        return Affine(self.samples, -self.base, -self.slope)

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Affine):
            raise NotAffine
        return self._line(self.base * _number(other), self.slope * other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, Affine):
            if self.base or other.base or self.slope % other.slope:
                raise NotAffine
            return self.slope // other.slope
        if not isinstance(other, int) or other < 1:
            raise NotAffine
        if self.base % other == 0 and self.slope % other == 0:
            return self._line(self.base // other, self.slope // other)
        found = self.at(self.samples.number) // other
        self._decided(self - found * other, True)
        self._decided(self - (found + 1) * other, False)
        return found

    def _decided(self, difference: Any, not_negative: bool) -> bool:
        """Remember for which numbers of samples this would be so."""
        if not isinstance(difference, Affine):
            return bool(difference >= 0)
        base, slope = (difference.base, difference.slope) if not_negative else (-difference.base - 1, -difference.slope)
        if not isinstance(base, int) or not isinstance(slope, int):
            raise NotAffine
        self.samples.not_negative(base, slope)
        return not_negative

    def _at_least(self, difference: Any) -> bool:
        seen = difference.at(self.samples.number) if isinstance(difference, Affine) else difference
        return self._decided(difference, seen >= 0)

    def __ge__(self, other: Any) -> bool:
        return self._at_least(self - other)

    def __lt__(self, other: Any) -> bool:
        return not self._at_least(self - other)

    def __le__(self, other: Any) -> bool:
        return self._at_least(other - self)

    def __gt__(self, other: Any) -> bool:
        return not self._at_least(other - self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int | float | Affine):
            return NotImplemented
        difference = self - other
        if not isinstance(difference, Affine):
            return bool(difference == 0)
        if difference.at(self.samples.number) == 0:
            self.samples.only_here()
            return True
        self.samples.not_where_zero(difference.base, difference.slope)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        return self != 0
