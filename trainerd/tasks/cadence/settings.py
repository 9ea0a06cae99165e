"""What a person may set of CADENCE, and the values it starts from. Must not import torch: client, config and memory read this.

The docstring under a field is its text in `--help`, in the forms and in the docs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

DEFAULTS: dict[str, Any] = {
    "train": {
        "epochs": 3,
        "batch_size": 32,
        "optimizer": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.01,
        "scheduler": "cosine",
        "warmup_steps": 50,
        "max_grad_norm": 1.0,
    },
}
"""Merged under everything a preset, a file or a flag says."""

Width = Annotated[int, Field(ge=1, le=65536)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)


class GruSettings(_Part):
    """The laptop form: one GRU layer."""

    word_embedding: Width = 128
    """Width of a word's vector."""
    category_embedding: Width = 64
    """Width of the category's vector, put beside every word's."""
    hidden: Width = 256
    """Width of the GRU."""
    dropout: Share = 0.3
    """Dropout on the GRU's input and output."""


class GruMnSettings(_Part):
    """The paper's form: a stack of GRU layers with attention over their own past, the category entering at every layer."""

    embedding: Width = 256
    """Width of a word's vector."""
    hidden: list[Width] = Field([2000, 1500, 1000], min_length=1)
    """Width of each layer."""
    attention: list[Width] = [1000, 750, 500]
    """Width of each layer's attention over its past states; an empty list makes plain GRU layers."""
    context: Width = 500
    """Width of the intermediate context layer before the softmax."""
    dropout: Share = 0.8
    """Dropout between layers."""

    @model_validator(mode="after")
    def _one_attention_per_layer(self) -> GruMnSettings:
        if self.attention and len(self.attention) != len(self.hidden):
            raise ValueError(f"attention has {len(self.attention)} widths and hidden has {len(self.hidden)}: give one per layer, or none")
        return self


class CleanSettings(_Part):
    """Cleaning of product titles: words that say nothing about their category are taken out."""

    enabled: StrictBool = False
    """Clean titles before learning; leave it off for what people typed."""
    max_entropy: float = Field(0.9, ge=0, le=1)
    """Drop a word spread over the categories more evenly than this (0: it occurs in one category, 1: in all alike)."""
    min_pmi: float = -0.5
    """Drop a word from a title when its pointwise mutual information with the title's category is below this."""
    max_words: int = Field(10, ge=1, le=1000)
    """Keep at most this many words of a cleaned title, those with the highest mutual information."""


class SearchSettings(_Part):
    """How completions are searched for."""

    method: Literal["dynamic", "plain"] = "dynamic"
    """dynamic: the paper's, wide at the start and narrower later; plain: ordinary beam search."""
    p1: float = Field(0.01, ge=0, le=1)
    """dynamic: first words more probable than this each open a branch."""
    p2: float = Field(0.02, ge=0, le=1)
    """dynamic: second words more probable than this each open a beam group of their own."""
    p3: float = Field(0.02, ge=0, le=1)
    """dynamic: inside a group, only words more probable than this are followed."""
    gamma: int = Field(3, ge=1, le=64)
    """dynamic: width of each group's beam."""
    delta: int = Field(12, ge=1, le=64)
    """Words a completion may add at most."""
    groups: int = Field(24, ge=1, le=512)
    """dynamic: most groups followed for one prefix, the most probable ones."""
    width: int = Field(10, ge=1, le=512)
    """plain: width of the beam."""


class CadenceSettings(_Part):
    """The task's own settings."""

    model: Literal["gru", "gru-mn"] = "gru"
    """gru: the laptop form, 4.2 million parameters; gru-mn: the paper's GRU memory network."""
    conditioned: StrictBool = True
    """Tell the model the category, with begin and end tokens of its own. Off: one language model, and no category column is needed."""
    tokenizer: Literal["word", "bpe"] = "word"
    """word: whole words; bpe: pieces of words, so that no word is unknown."""
    vocabulary: int = Field(10_000, ge=8, le=1_000_000)
    """Words (or pieces) the model knows; begin, end and unknown tokens come on top."""
    min_frequency: int = Field(5, ge=1)
    """Words seen less often in the training rows become one token, `<rare>`; those seen once teach the model `<unk>`."""
    max_words: int = Field(24, ge=1, le=512)
    """Longer rows are cut after this many words."""
    max_categories: int = Field(1000, ge=1, le=20_000)
    """Rows of categories beyond this many most frequent ones are left out, and counted."""
    eval_split: Literal["auto", "random", "group"] = "auto"
    """group: rows of one group (column `group`, e.g. a product cluster) are held out together; auto: group where there is such a
    column. random never separates two rows with the same text."""
    eval_prefixes: int = Field(64, ge=0, le=100_000)
    """Prefixes completed at every evaluation, for success@10, MRR@10 and the others; 0: none."""
    gru: GruSettings = Field(default_factory=GruSettings)
    gru_mn: GruMnSettings = Field(default_factory=GruMnSettings)
    clean: CleanSettings = Field(default_factory=CleanSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
