"""What PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF) asks torch's CUDA allocator for, and the replay under it. Must not set it.

Read as torch 2.13 reads it: c10/core/AllocatorConfig.cpp and c10/cuda/CUDAAllocatorConfig.cpp. Of two variables the first one
counts; of keys that are there twice, the last. What the replay cannot follow is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from trainerd.memory import native
from trainerd.memory.allocator import LARGE_SEGMENT, Allocator, Peaks, replay

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_MIB = 1 << 20
_LEAST_OWN_SEGMENT_MIB = 10
_INTERVALS = 16  # of roundup_power2_divisions: from 1 MiB on, each twice the one before
_SWITCHES = {"True": True, "False": False}
_BACKENDS = {"native": False, "cudaMallocAsync": True}
# These change when and where something is done, but not how much a GPU's allocator holds.
_OF_NO_WEIGHT = ("release_lock_on_cudamalloc", "graph_capture_record_stream_reuse", "throw_on_cudamalloc_oom")
_NOT_REPLAYED = {
    "garbage_collection_threshold": "what it collects near the limit is not replayed: less may be reserved",
    "per_process_memory_fraction": "the trainer sets that share itself, by memory.vram_limit",
}
_UNREADABLE = "?"


@dataclass(frozen=True)
class Settings:
    """torch's own where nothing is asked for."""

    expandable: bool = False
    max_split: float = math.inf
    rounding: int = LARGE_SEGMENT
    large_segment: int = LARGE_SEGMENT
    divisions: tuple[int, ...] = ()
    asynchronous: bool = False
    """Another allocator altogether: cudaMallocAsync."""
    left_out: tuple[str, ...] = ()
    """What was asked for and is not replayed, in words."""

    @property
    def is_native(self) -> bool:
        """Whether the replay is the one without any setting."""
        return self.asynchronous or replace(self, left_out=()) == Settings()


def asked(environment: Mapping[str, str], system: str) -> str:
    """What these variables ask for that matters for a GPU's memory; empty: torch's own allocator.

    torch has expandable segments on Linux alone; elsewhere it warns and does without.
    """
    text = next((environment[name] for name in VARIABLES if environment.get(name) is not None), "")
    try:
        found = dict(_pairs(_tokens(text)))
        _settings(found)
    except ValueError:
        return _UNREADABLE + text
    if not system.startswith("linux"):
        found.pop("expandable_segments", None)
    usual = {"expandable_segments": "False", "backend": "native"}
    return ",".join(f"{key}:{value}" for key, value in found.items() if key not in _OF_NO_WEIGHT and usual.get(key) != value)


@lru_cache(maxsize=64)
def settings(text: str) -> Settings:
    """What asked() has found, ready to be replayed."""
    if text.startswith(_UNREADABLE):
        return Settings(left_out=(_words(text[len(_UNREADABLE) :], "trainerd cannot read it, and torch will most likely refuse it"),))
    return _settings(dict(_pairs(_tokens(text))))


def peaks(sizes: Sequence[int], order: native.Order, text: str) -> Peaks:
    """What torch's allocator makes of these births and deaths under these settings, without a limit."""
    found = settings(text)
    if found.is_native:
        return native.replayed(sizes, order)
    allocator = Allocator(
        expandable=found.expandable,
        max_split=found.max_split,
        rounding=found.rounding,
        large_segment=found.large_segment,
        divisions=found.divisions,
    )
    return replay(*order.written_out(sizes), allocator)


def _tokens(text: str) -> list[str]:
    """Words and the four signs; white space counts nowhere."""
    return re.findall(r"[,:\[\]]|[^,:\[\]]+", re.sub(r"\s", "", text))


def _pairs(tokens: list[str]) -> Iterator[tuple[str, str]]:
    """Each key with its value; a list in brackets is one. Raises ValueError."""
    at = 0
    while at < len(tokens):
        key, value = tokens[at], tokens[at + 2 : at + 3]
        if key in ",:[]" or tokens[at + 1 : at + 2] != [":"] or not value:
            raise ValueError(f"{key} has no value")
        end = at + 3
        if value == ["["]:
            end = tokens.index("]", end) + 1
            value = tokens[at + 2 : end]
        elif value[0] in ",:]":
            raise ValueError(f"{key} has no value")
        yield key, "".join(value)
        if end < len(tokens) and tokens[end] != ",":
            raise ValueError(f"{tokens[end]} after {key}")
        at = end + 1


def _settings(found: Mapping[str, str]) -> Settings:
    """Raises ValueError for what torch refuses, and for what nobody knows."""
    made = Settings()
    if (large := found.get("large_segment_size_mb")) is not None:  # first, wherever it stands: others are measured by it
        size = _mebibytes(large, _LEAST_OWN_SEGMENT_MIB + 1)
        made = replace(made, large_segment=size, rounding=size)
    left_out: list[str] = []
    for key, value in found.items():
        if key in _READERS:
            name, read = _READERS[key]
            made = replace(made, **{name: read(value, made.large_segment // _MIB)})
        elif (why := _not_replayed(key, value)) is not None:
            left_out.append(_words(f"{key}:{value}", why))
    if made.asynchronous:
        left_out = [_words("backend:cudaMallocAsync", "which is not modelled: the replay is of torch's own allocator")]
    return replace(made, left_out=tuple(left_out))


def _not_replayed(key: str, value: str) -> str | None:
    """Why a setting is not followed; None: there is nothing to follow. Raises ValueError for what is not known."""
    if key == "garbage_collection_threshold" and not 0 < float(value) < 1:
        raise ValueError(f"{key}:{value}")
    if key.startswith("pinned_"):
        return "what it changes of the pinned RAM is not modelled"
    if key not in (*_NOT_REPLAYED, *_OF_NO_WEIGHT, "large_segment_size_mb"):
        raise ValueError(f"{key} is not known")
    return _NOT_REPLAYED.get(key)


def _words(what: str, why: str) -> str:
    return f"{VARIABLES[0]} has {what}: {why}"


def _one_of(value: str, meant: Mapping[str, bool]) -> bool:
    if value not in meant:
        raise ValueError(f"{value} is neither {' nor '.join(meant)}")
    return meant[value]


def _mebibytes(value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"{value} is not a number from {least} on")
    return int(value) * _MIB


def _divisions(value: str) -> tuple[int, ...]:
    """How often each power of two is divided, from 1 MiB on. In a list ">" stands for all above the one before it."""
    if not value.startswith("["):
        return (_power_of_two(value),) * _INTERVALS
    found = [0] * _INTERVALS
    last, is_first = 0, True
    for part in filter(None, value[1:-1].split(",")):
        boundary, _, number = part.partition(":")
        times = 0 if number == "0" else _power_of_two(number)
        if boundary == ">":
            found[last + 1 :] = [times] * (_INTERVALS - last - 1)
            continue
        at = min(_power_of_two(boundary).bit_length() - 1, _INTERVALS - 1)
        if is_first:
            found[:at] = [times] * at
        found[at] = times
        last, is_first = at, False
    return tuple(found)


def _power_of_two(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1 or number & (number - 1):
        raise ValueError(f"{text} is no power of two")
    return number


_READERS: dict[str, tuple[str, Callable[[str, int], Any]]] = {
    "expandable_segments": ("expandable", lambda value, least: _one_of(value, _SWITCHES)),
    "max_split_size_mb": ("max_split", _mebibytes),
    "max_non_split_rounding_mb": ("rounding", _mebibytes),
    "roundup_power2_divisions": ("divisions", lambda value, least: _divisions(value)),
    "backend": ("asynchronous", lambda value, least: _one_of(value, _BACKENDS)),
}
"""The field of each setting that is followed, and how it is read; the number is the least of its kind in MiB."""
