"""Ways in which a disk, or a hand, spoils a checkpoint; each changes what is there. Must not look whether it is noticed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

_HOLE_BYTES = 4096


def flip(path: Path, chance: random.Random) -> None:
    """One bit."""
    with open(path, "r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def hole(path: Path, chance: random.Random) -> None:
    """A block of zeros where there was something: a write the disk has lost."""
    content = path.read_bytes()
    places = [place for place in range(0, len(content), _HOLE_BYTES) if any(content[place : place + _HOLE_BYTES])]
    place = chance.choice(places)
    gone = content[place : place + _HOLE_BYTES]
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(bytes(len(gone)))


def truncate(path: Path, chance: random.Random) -> None:
    """The end is missing, or all of it."""
    with open(path, "r+b") as file:
        file.truncate(chance.randrange(path.stat().st_size))


def remove(path: Path, chance: random.Random) -> None:
    """The whole file."""
    path.unlink()


WAYS: dict[str, Callable[[Path, random.Random], None]] = {"flip": flip, "hole": hole, "truncate": truncate, "remove": remove}


def spoil(manifest: Path, chance: random.Random) -> tuple[str, Path]:
    """Damage one file of a checkpoint, its state more often than its manifest; returns how and which."""
    path = manifest if chance.random() < 0.3 else manifest.with_suffix(".pt")
    way = chance.choice(list(WAYS))
    WAYS[way](path, chance)
    return way, path
