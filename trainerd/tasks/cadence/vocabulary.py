"""Numbers for words (or pieces of words) and for each category's begin and end. Must not import torch.

    0 unknown · 1 rare · 2 … the words, most frequent first · one end per category · one begin per category

Begins are only ever read and never predicted, so they come last and the softmax leaves them out.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from trainerd.contract.errors import Unreadable
from trainerd.contract.files import write_json
from trainerd.tasks.cadence.text import words

UNKNOWN, RARE = 0, 1
NUM_SPECIAL = 2
_SPECIAL = ["<unk>", "<rare>"]
_BLANK = "\u2581"
"""How a piece says that it begins a word (the usual sign, U+2581)."""


class Vocabulary:
    """A tokenizer and the categories."""

    def __init__(self, tokenizer: Tokenizer, categories: Sequence[str], rows: Sequence[int], conditioned: bool = True) -> None:
        self.tokenizer = tokenizer
        self.categories = list(categories)
        self.rows = list(rows)
        """Training rows of each category: how likely it is before anything is typed."""
        self.conditioned = conditioned
        self.num_words = tokenizer.get_vocab_size()
        self.pieces = isinstance(tokenizer.model, models.BPE)
        self._number = {name: number for number, name in enumerate(self.categories)}

    @property
    def num_outputs(self) -> int:
        """What can be predicted: words and ends."""
        return self.num_words + self.num_marks

    @property
    def num_tokens(self) -> int:
        """What can be read: words, ends and begins."""
        return self.num_words + 2 * self.num_marks

    @property
    def num_marks(self) -> int:
        """How many begins there are, and ends: one per category, or one for all when the model is not told categories."""
        return len(self.categories) if self.conditioned else 1

    def begin(self, category: int) -> int:
        return self.num_words + self.num_marks + (category if self.conditioned else 0)

    def end(self, category: int) -> int:
        return self.num_words + (category if self.conditioned else 0)

    def category(self, name: str) -> int | None:
        """The number of a category: by its name, or by the name in other letters' case."""
        if name in self._number:
            return self._number[name]
        return next((number for other, number in self._number.items() if other.casefold() == name.strip().casefold()), None)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text's words."""
        return [token for word in words(text) for token in self.encode_word(word)]

    def encode_word(self, word: str) -> list[int]:
        """The tokens of one normalised word."""
        if not self.pieces:
            token = self.tokenizer.token_to_id(word)
            return [UNKNOWN if token is None or token < NUM_SPECIAL else token]
        return list(self.tokenizer.encode(word, add_special_tokens=False).ids) or [UNKNOWN]

    @cached_property
    def surfaces(self) -> list[str]:
        """What each word token adds to a text: a blank where it begins a word. Empty for unknown and rare."""
        tokens = [str(self.tokenizer.id_to_token(number)) for number in range(self.num_words)]
        if self.pieces:
            plain = [token.replace(_BLANK, " ") for token in tokens]
        else:
            plain = [" " + token for token in tokens]
        return ["", "", *plain[NUM_SPECIAL:]]

    @cached_property
    def _sorted(self) -> tuple[list[str], npt.NDArray[np.int64]]:
        ranked = sorted(range(NUM_SPECIAL, self.num_words), key=self.surfaces.__getitem__)
        return [self.surfaces[number] for number in ranked], np.array(ranked, dtype=np.int64)

    def continuing(self, rest: str) -> npt.NDArray[np.int64]:
        """Tokens that can come next when the text must go on with `rest`: those that begin with it, and pieces of its beginning."""
        surfaces, numbers = self._sorted
        low = bisect.bisect_left(surfaces, rest)
        high = bisect.bisect_left(surfaces, rest + "\U0010ffff")
        found = [numbers[low:high]]
        if self.pieces:
            for cut in range(1, len(rest)):
                at = bisect.bisect_left(surfaces, rest[:cut])
                if at < len(surfaces) and surfaces[at] == rest[:cut]:
                    found.append(numbers[at : at + 1])
        return np.concatenate(found)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json (readable by `tokenizers` alone) and categories.json."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        document = {"schema": 1, "conditioned": self.conditioned, "categories": self.categories, "rows": self.rows}
        write_json(folder / "categories.json", document)

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """What save() wrote. Raises Unreadable."""
        try:
            document = json.loads((folder / "categories.json").read_text(encoding="utf-8"))
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return cls(tokenizer, document["categories"], document["rows"], document["conditioned"])
        except Exception as error:  # tokenizers raises bare Exception
            hint = "Is it the folder of a trained CADENCE model?"
            raise Unreadable(f"{folder} holds no vocabulary that can be read: {error}.", hint) from None


def word_tokenizer(vocabulary: Iterable[str]) -> Tokenizer:
    """Whole words, in order."""
    numbers = {word: number for number, word in enumerate([*_SPECIAL, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=_SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def piece_tokenizer(texts: Iterator[str], size: int) -> Tokenizer:
    """Byte-pair pieces learnt from texts of normalised words; a character too rare to keep is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK, prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=size + NUM_SPECIAL, special_tokens=_SPECIAL, limit_alphabet=1000, max_token_length=32, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
