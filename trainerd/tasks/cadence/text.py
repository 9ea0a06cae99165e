"""What a word is: the one normalisation that preparing, suggesting and measuring share. Must not import torch or read files."""

from __future__ import annotations

import re
import unicodedata

MAX_WORD = 64
"""Longer words are cut: nobody types them, and millions of them would not fit in memory."""

# Control and invisible characters that str.split() does not already take as blanks, the byte order mark, and halves of surrogate pairs.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """The text without characters nobody sees, every run of blanks (tabs, line separators) one space."""
    if not text.isprintable():
        text = _INVISIBLE.sub("", text)
    return " ".join(text.split())


def words(text: str) -> list[str]:
    """The text's words: compatibility forms folded, lower case, split at blanks."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    if not text.isprintable():
        text = _INVISIBLE.sub("", text)
    found = text.lower().split()
    if len(text) > MAX_WORD:
        return [word[:MAX_WORD] for word in found]
    return found
