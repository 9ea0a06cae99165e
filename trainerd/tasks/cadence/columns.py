"""Which column holds the text, the category and the group, and the row in a record. Must not import torch or read files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trainerd.contract.errors import ConfigError, UsageError
from trainerd.tasks.cadence.text import visible, words

NAMES = {"text": ("text", "query", "title"), "category": ("category",), "group": ("group",)}
"""Column names understood without being told, in order of preference."""

EVERYTHING = "everything"
"""The category of every row when the model is not told categories."""

MAX_CHARACTERS = 1000
MAX_CATEGORY = 200


class Row(NamedTuple):
    """A usable row."""

    category: str
    words: list[str]
    group: str | None


class Columns(NamedTuple):
    """Where a record holds what is needed: numbers for cells, names for objects."""

    text: Any
    category: Any
    group: Any
    width: int
    header: bool
    """Whether the first record of a file of cells names its columns."""

    def keys(self) -> list[str]:
        """The names to read from a file that can be read by column."""
        return [key for key in (self.text, self.category, self.group) if key is not None]

    def pick(self, record: Any) -> Row | str:
        """The row in a record, or the reason why there is none."""
        if isinstance(record, dict):
            return _row(record.get(self.text), EVERYTHING if self.category is None else record.get(self.category), record.get(self.group))
        if len(record) > self.width:
            if self.text != self.width - 1:
                return "columns do not match"
            record = [*record[: self.text], " ".join(record[self.text :])]  # a tab or comma within the last column is a blank
        have = len(record)
        category = EVERYTHING if self.category is None else record[self.category] if self.category < have else None
        group = record[self.group] if self.group is not None and self.group < have else None
        return _row(record[self.text] if self.text < have else None, category, group)


def _row(text: Any, category: Any, group: Any) -> Row | str:
    text, category, group = _plain(text), _plain(category), _plain(group)
    if text is None:
        return "no text"
    if category is None:
        return "no category"
    if len(text) > MAX_CHARACTERS or len(category) > MAX_CATEGORY:
        return "too long"
    if not text.isprintable():
        if "\0" in text:
            return "NUL byte"
        if any("\ud800" <= c <= "\udfff" for c in text):
            return "not UTF-8"
    if not category.isascii() or not category.isprintable() or category != category.strip() or "  " in category:
        category = visible(category)
    found = words(text)
    if not found:
        return "no text"
    return Row(category, found, group) if category else "no category"


def _plain(value: Any) -> str | None:
    if type(value) is str:
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class ColumnFinder:
    """Finds the columns of a file by its first record: as configured, else by the names everybody understands."""

    def __init__(self, wanted: Mapping[str, str | int], conditioned: bool) -> None:
        unknown = sorted(set(wanted) - set(NAMES))
        if unknown:
            near = difflib.get_close_matches(unknown[0], NAMES, 1)
            raise ConfigError(
                [f"data.columns.{name} is not a column this task uses; it uses text, category and group" for name in unknown],
                f"Did you mean data.columns.{near[0]}?" if near else "",
            )
        self._wanted = wanted
        self._roles = ("text", "category", "group") if conditioned else ("text", "group")
        self._numbered = any(isinstance(column, int) for column in wanted.values())

    def search(self, names: list[str], by_name: bool) -> Columns | None:
        """The columns among these names (or cells of the first record); None when one that is needed is not there."""
        keys = {role: self._key(role, names, by_name) for role in self._roles}
        if keys["text"] is None or keys.get("category", 0) is None:
            return None
        text = keys["text"]
        numbered = self._wanted and all(isinstance(column, int) for column in self._wanted.values())
        header = not by_name and (not numbered or names[text].strip().casefold() in NAMES["text"])
        return Columns(text, keys.get("category"), keys["group"], len(names), header)

    def find(self, names: list[str], path: Path, by_name: bool) -> Columns:
        """Like search, but raises UsageError naming what is missing and what there is."""
        found = self.search(names, by_name)
        if found is not None:
            return found
        role = next(role for role in self._roles if self._key(role, names, by_name) is None)
        asked = self._wanted.get(role)
        shown = ", ".join(name.strip()[:40] for name in names[:12])
        what = f"column {asked!r}" if asked is not None else f"column named {' or '.join(NAMES[role])}"
        raise UsageError(
            f"{path} has no {what} (for the {role}); its first line holds: {shown}.",
            f"Name it with --set data.columns.{role}=NAME, or by number from 0 when the file has no header: --set data.columns.{role}=1.",
        )

    def _key(self, role: str, names: list[str], by_name: bool) -> Any:
        wanted = self._wanted.get(role)
        if isinstance(wanted, int):
            return None if not 0 <= wanted < len(names) else names[wanted] if by_name else wanted
        folded = [visible(name).casefold() for name in names]
        for name in (wanted,) if wanted is not None else () if self._numbered else NAMES[role]:
            if name.strip().casefold() in folded:
                number = folded.index(name.strip().casefold())
                return names[number] if by_name else number
        return None
