"""Own tasks as a person writes them, without a memory table: transformers, adapters, a small convolution net. No measuring here."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional

from trainerd.engine.task import MapDataset, Task

_PADDING = -100


class Settings(BaseModel):
    """`kind`: gpt, lora, qlora (in 4 bits), by-hand (attention written out), ragged or cnn. `data_mb`: what the data set holds in RAM."""

    kind: str = "gpt"
    width: int = 256
    depth: int = 4
    length: int = 128
    words: int = 4000
    samples: int = 256
    data_mb: int = 0


class _Rows(torch.utils.data.Dataset[Tensor]):
    def __init__(self, settings: Settings, number: int) -> None:
        self._settings, self._number = settings, number
        self.held = torch.ones(settings.data_mb << 18) if number == settings.samples else None

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> Tensor:
        generator, kept = torch.Generator().manual_seed(index), self._settings
        if kept.kind == "cnn":
            return torch.randn(3, kept.length, kept.length, generator=generator)
        length = kept.length
        if kept.kind == "ragged" and index:
            length = int(torch.randint(4, length, (1,), generator=generator))
        return torch.randint(0, kept.words, (length,), generator=generator)


class _Adapted(nn.Module):
    """A product that is not trained, and a narrow one beside it that is."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.base = self._frozen(inside, outside).requires_grad_(False)
        self.down, self.up = nn.Linear(inside, 8, bias=False), nn.Linear(8, outside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]

    def _frozen(self, inside: int, outside: int) -> nn.Module:
        return nn.Linear(inside, outside)


class _Packed(_Adapted):
    """The same over a product in 4 bits."""

    def _frozen(self, inside: int, outside: int) -> nn.Module:
        import bitsandbytes.nn as packed

        layer: nn.Module = packed.Linear4bit(inside, outside, compute_dtype=torch.float32, quant_type="nf4")
        return layer


class _Block(nn.Module):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        product = {"lora": _Adapted, "qlora": _Packed}.get(kind, nn.Linear)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = product(width, 3 * width), product(width, width)
        self.up, self.down = product(width, 4 * width), product(4 * width, width)
        self.heads, self.by_hand = width // 64, kind == "by-hand"

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1))
        if self.by_hand:
            later = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
            mixed = (q @ k.transpose(-1, -2) / 8).masked_fill(later, float("-inf")).softmax(-1) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.between(x))))  # type: ignore[no-any-return]


class _Transformer(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.words, self.places = nn.Embedding(settings.words, width), nn.Embedding(settings.length, width)
        self.blocks = nn.ModuleList(_Block(width, settings.kind) for _ in range(settings.depth))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, settings.words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.words(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.last(hidden))  # type: ignore[no-any-return]


def _convolutions(settings: Settings) -> nn.Module:
    width, layers = settings.width, []
    for number in range(settings.depth):
        layers += [nn.Conv2d(width if number else 3, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Net(Task):
    """One of them."""

    Settings = Settings
    reads_data = False

    def dataset(self, split: str) -> MapDataset | None:
        return _Rows(self.settings, self.settings.samples if split == "train" else 8)

    def collate(self, samples: list[Tensor]) -> Tensor:
        if self.settings.kind == "ragged":
            return nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=_PADDING)
        return torch.stack(samples)

    def length(self, sample: Tensor) -> int:
        return sample.shape[-1]

    def model(self) -> nn.Module:
        return _convolutions(self.settings) if self.settings.kind == "cnn" else _Transformer(self.settings)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks) if isinstance(model, _Transformer) else []

    def counts(self, batch: Tensor) -> dict[str, float]:
        return {"loss": float(len(batch) if self.settings.kind == "cnn" else (batch[:, 1:] != _PADDING).sum())}

    def loss(self, model: nn.Module, batch: Tensor, ctx: Any) -> tuple[dict[str, tuple[Tensor, float]], dict[str, float]]:
        if self.settings.kind == "cnn":
            return {"loss": (model(batch).square().sum(), 1.0)}, {}
        scores, wanted = model(batch[:, :-1].clamp_min(0)), batch[:, 1:]
        lost = functional.cross_entropy(scores.float().flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=_PADDING)
        return {"loss": (lost, 1.0)}, {}
