"""The model families the estimate is measured on: each in torch, and as a table. No measuring here.

The split was fixed before the first measurement: gru, gpt, llama-lora and convnet were looked at while the tables were made;
gru-mn and cnn3d were opened once, when those were done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainerd.engine import checkpointing, dropout
from trainerd.engine.task import TaskContext
from trainerd.memory import kernels, layers, losses, ops
from trainerd.memory import tape as tapes
from trainerd.memory.checkpointing import checkpointed
from trainerd.memory.timeline import Setup
from trainerd.tasks.cadence import blocks, model
from trainerd.tasks.cadence.settings import CadenceSettings

KNOWN = ("gru", "gpt", "gpt-math", "gpt-few", "llama-lora", "llama-few", "convnet")
HELD_OUT = ("gru-mn", "cnn3d")


@dataclass
class Family:
    """`model()` is a module called with the tensors of `batch(samples)`; `table(tape)` the same, called with its own."""

    model: Callable[[], nn.Module]
    table: Callable[[tapes.Tape], Callable[..., tapes.Tensor]]
    batch: Callable[[int], list[Tensor]]
    attention: str = "auto"
    """As train.attention."""


def _wrapped(made: nn.Module, again: str) -> nn.Module:
    """The model with its repeated layers as the engine would wrap them."""
    checkpointing.wrap(made, repeated(made), again)
    return made


def repeated(made: nn.Module) -> list[nn.Module]:
    """The layers a task would name as its blocks."""
    inner = made.inner if isinstance(made, _Cadence) else made
    return list(next((getattr(inner, name) for name in ("blocks", "stages", "layers") if hasattr(inner, name)), []))


def _computed(block: Callable[[tapes.Tensor], tapes.Tensor], x: tapes.Tensor, again: str) -> tapes.Tensor:
    """The same for a table's."""
    return block(x) if again == "none" else checkpointed(block, x, keeps=again == "selective")


# A transformer as GPT-2's, and one as Llama's with LoRA


class _GptAttention(nn.Module):
    """A module of its own, as everybody has it: heads are held until it returns, and what it was given until then."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        samples, places, width = x.shape
        heads = [t.view(samples, places, self.heads, -1).transpose(1, 2) for t in self.inner(x).chunk(3, -1)]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        joined: Tensor = self.outer(mixed.transpose(1, 2).reshape(samples, places, width))
        return joined


class _GptMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(functional.gelu(self.up(x)))
        return made


class _GptBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.mlp = _GptAttention(width, heads), _GptMlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        made: Tensor = x + self.mlp(self.norm2(x))
        return made


class _Gpt(nn.Module):
    def __init__(self, words: int, width: int, heads: int, depth: int, places: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(places, width)
        self.blocks = nn.ModuleList(_GptBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.words(inputs) + self.places.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.words.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _GptBlockTable:
    def __init__(self, tape: tapes.Tape, width: int, heads: int) -> None:
        self.norm1, self.mix = layers.Norm(tape, width), layers.SelfAttention(tape, width, heads)
        self.norm2, self.mlp = layers.Norm(tape, width), layers.Mlp(tape, width, 4 * width)

    def __call__(self, x: tapes.Tensor) -> tapes.Tensor:
        x = ops.add(x, self.mix(self.norm1(x)))
        return ops.add(x, self.mlp(self.norm2(x)))


class _GptTable:
    def __init__(self, tape: tapes.Tape, words: int, width: int, heads: int, depth: int, places: int, again: str) -> None:
        self.again = again
        self.words, self.places = layers.Embedding(tape, words, width), layers.Embedding(tape, places, width)
        self.blocks = [_GptBlockTable(tape, width, heads) for _ in range(depth)]
        self.norm = layers.Norm(tape, width)

    def __call__(self, inputs: tapes.Tensor, targets: tapes.Tensor) -> tapes.Tensor:
        samples, places = inputs.shape
        x = ops.add(self.words(inputs), ops.part(self.places.weight, places, self.places.weight.shape[1], contiguous=True))
        for block in self.blocks:
            x = _computed(block, x, self.again)
        with inputs.tape.counting_as(tapes.LOGITS):
            logits = kernels.linear(self.norm(x), self.words.weight)
        return losses.cross_entropy(ops.reshape(logits, samples * places, logits.shape[-1]), targets)


class _LoraLinear(nn.Module):
    """PEFT's: the base frozen, down and up beside it."""

    def __init__(self, fan_in: int, fan_out: int, rank: int, drop: float) -> None:
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(fan_in, rank, bias=False), nn.Linear(rank, fan_out, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        given, x = result.dtype, x.to(self.down.weight.dtype)
        result = result + self.up(self.down(self.drop(x))) * 2.0
        return result.to(given)  # type: ignore[no-any-return]


class _LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int, inner: int, rank: int) -> None:
        super().__init__()
        self.heads, self.key_heads, size = heads, key_heads, width // heads
        made = [_LoraLinear(width, n * size, rank, 0.1) for n in (heads, key_heads, key_heads)]
        self.norm1, self.norm2 = (nn.RMSNorm(width).requires_grad_(False) for _ in (0, 1))
        self.q, self.k, self.v = made
        self.outer = _LoraLinear(width, width, rank, 0.1)
        self.gate, self.up = (_LoraLinear(width, inner, rank, 0.1) for _ in (0, 1))
        self.down = _LoraLinear(inner, width, rank, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(self.norm1(x))
        normed = self.norm2(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))

    def mixed(self, normed: Tensor) -> Tensor:
        """On its own, as everybody has it: heads must not be held while the rest is computed."""
        samples, places, width = normed.shape
        pairs = ((self.q, self.heads), (self.k, self.key_heads), (self.v, self.key_heads))
        q, k, v = (layer(normed).view(samples, places, heads, -1).transpose(1, 2) for layer, heads in pairs)
        q, k = _turned(q), _turned(k)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        joined: Tensor = self.outer(mixed.transpose(1, 2).reshape(samples, places, width))
        return joined


def _turned(x: Tensor) -> Tensor:
    table = torch.ones(x.shape[-2], x.shape[-1], dtype=torch.float32)
    first, second = x.chunk(2, -1)
    return x * table + torch.cat([-second, first], -1) * table


class _Llama(nn.Module):
    def __init__(self, words: int, width: int, heads: int, key_heads: int, depth: int, inner: int, rank: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width).requires_grad_(False)
        self.blocks = nn.ModuleList(_LlamaBlock(width, heads, key_heads, inner, rank) for _ in range(depth))
        self.norm = nn.RMSNorm(width).requires_grad_(False)
        self.head = nn.Linear(width, words, bias=False).requires_grad_(False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.words(inputs)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _LlamaBlockTable:
    def __init__(self, tape: tapes.Tape, width: int, heads: int, key_heads: int, inner: int, rank: int) -> None:
        adapter = layers.Adapter(rank, dropout=0.1)
        self.norm1, self.norm2 = (layers.Norm(tape, width, root=True, trainable=False) for _ in (0, 1))
        self.mix = layers.SelfAttention(tape, width, heads, key_heads=key_heads, bias=False, adapter=adapter, rotary=True, joined=False)
        self.mlp = layers.SwiGlu(tape, width, inner, adapter=adapter)

    def __call__(self, x: tapes.Tensor) -> tapes.Tensor:
        x = ops.add(x, self.mix(self.norm1(x)))
        return ops.add(x, self.mlp(self.norm2(x)))


class _LlamaTable:
    def __init__(
        self, tape: tapes.Tape, words: int, width: int, heads: int, key_heads: int, depth: int, inner: int, rank: int, again: str
    ) -> None:
        self.again = again
        self.words = layers.Embedding(tape, words, width, trainable=False)
        self.blocks = [_LlamaBlockTable(tape, width, heads, key_heads, inner, rank) for _ in range(depth)]
        self.norm = layers.Norm(tape, width, root=True, trainable=False)
        self.head = layers.Linear(tape, width, words, bias=False, trainable=False)

    def __call__(self, inputs: tapes.Tensor, targets: tapes.Tensor) -> tapes.Tensor:
        samples, places = inputs.shape
        x = self.words(inputs)
        for block in self.blocks:
            x = _computed(block, x, self.again)
        with inputs.tape.counting_as(tapes.LOGITS):
            logits = self.head(self.norm(x))
        return losses.cross_entropy(ops.reshape(logits, samples * places, logits.shape[-1]), targets)


# Convolutions, in two dimensions and in three


class _Stage(nn.Module):
    """Convolution, batch norm, ReLU twice, the input added; then half the size."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.conv1, self.conv2 = (conv(channels, channels, 3, padding=1, bias=False) for _ in (0, 1))
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.pool = functional.max_pool2d if dims == 2 else functional.max_pool3d

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return self.pool(functional.relu(self.norm2(self.conv2(y)) + x), 2)


class _ConvNet(nn.Module):
    def __init__(self, channels: int, depth: int, classes: int, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.first = conv(3, channels, 3, padding=1)
        self.stages = nn.ModuleList(_Stage(channels, dims) for _ in range(depth))
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        x = self.first(images)
        for stage in self.stages:
            x = stage(x)
        return functional.cross_entropy(self.head(x.flatten(2).mean(-1)), targets)


class _StageTable:
    def __init__(self, tape: tapes.Tape, channels: int, dims: int) -> None:
        kernel = (3,) * dims
        self.conv1, self.conv2 = (layers.Convolution(tape, channels, channels, kernel, bias=False) for _ in (0, 1))
        self.norm1, self.norm2 = layers.BatchNorm(tape, channels), layers.BatchNorm(tape, channels)

    def __call__(self, x: tapes.Tensor) -> tapes.Tensor:
        y = ops.relu(self.norm1(self.conv1(x)))
        return kernels.pool(ops.relu(ops.add(self.norm2(self.conv2(y)), x)), tuple(n // 2 for n in x.shape[2:]), indices=True)


class _ConvNetTable:
    def __init__(self, tape: tapes.Tape, channels: int, depth: int, classes: int, dims: int, again: str) -> None:
        self.again, self.channels = again, channels
        self.first = layers.Convolution(tape, 3, channels, (3,) * dims)
        self.stages = [_StageTable(tape, channels, dims) for _ in range(depth)]
        self.head = layers.Linear(tape, channels, classes)

    def __call__(self, images: tapes.Tensor, targets: tapes.Tensor) -> tapes.Tensor:
        x = self.first(images)
        for stage in self.stages:
            x = _computed(stage, x, self.again)
        samples = x.shape[0]
        pooled = ops.reshape(ops.mean(ops.reshape(x, samples, self.channels, -1)), samples, self.channels)
        return losses.cross_entropy(self.head(pooled), targets)


# CADENCE's own


class _Cadence(nn.Module):
    """The real model, on rows of which a fifth is padding, as its collate() would give them."""

    def __init__(self, settings: CadenceSettings, sizes: blocks.Sizes) -> None:
        super().__init__()
        self.inner = model.build(settings, sizes.num_tokens, sizes.num_outputs, sizes.num_categories)
        context: Any = TaskContext(device=torch.device("cpu"), dtype=torch.float32, seed=0, cache_dir=None, data=None)  # type: ignore[arg-type]
        self.context = context
        dropout.attach(self, context)

    def forward(self, *batch: Tensor) -> Tensor:
        self.context.sample_ids = list(range(len(batch[0])))
        loss: Tensor = self.inner(model.Batch(*batch))
        return loss


def _cadence(settings: CadenceSettings, sizes: blocks.Sizes, places: int, again: str = "none") -> Family:
    def batch(samples: int) -> list[Tensor]:
        real = torch.arange(max(1, samples * places * 4 // 5))
        inputs, targets = torch.randint(0, sizes.num_outputs, (samples, places)), torch.randint(0, sizes.num_outputs, (len(real),))
        return [inputs, torch.zeros(samples, dtype=torch.int64), real, targets]

    def table(tape: tapes.Tape) -> Callable[..., tapes.Tensor]:
        made = blocks.build(tape, settings, sizes)
        return lambda *given: made.loss(blocks.Batch(*given), Setup(checkpointing=again))

    return Family(lambda: _wrapped(_Cadence(settings, sizes), again), table, batch)


def family(name: str, again: str = "none") -> Family:
    """A family by name, small enough for a CPU; `again`: what its blocks compute again, as train.activation_checkpointing."""

    words = 50 if name.endswith("-few") else 2000  # of few words a block is the highest point, of many the logits are

    def tokens(samples: int) -> list[Tensor]:
        return [torch.randint(0, words, (samples, 64)), torch.randint(0, words, (samples, 64))]

    if name in ("gpt", "gpt-few"):
        sizes = (words, 96, 4, 6, 64)
        return Family(lambda: _wrapped(_Gpt(*sizes), again), lambda tape: _GptTable(tape, *sizes, again), tokens)
    if name == "gpt-math":

        def math_table(tape: tapes.Tape) -> Callable[..., tapes.Tensor]:
            tape.attention = "math"
            return _GptTable(tape, 2000, 96, 4, 6, 64, again)

        return Family(lambda: _wrapped(_Gpt(2000, 96, 4, 6, 64), again), math_table, tokens, "math")
    if name in ("llama-lora", "llama-few"):
        shape = (words, 128, 8, 2, 4, 344, 8)
        return Family(lambda: _wrapped(_Llama(*shape), again), lambda tape: _LlamaTable(tape, *shape, again), tokens)
    if name in ("convnet", "cnn3d"):
        dims, side = (2, 32) if name == "convnet" else (3, 16)
        plan = (16, 3, 10, dims)

        def images(samples: int) -> list[Tensor]:
            return [torch.randn(samples, 3, *(side,) * dims), torch.randint(0, 10, (samples,))]

        return Family(lambda: _wrapped(_ConvNet(*plan), again), lambda tape: _ConvNetTable(tape, *plan, again), images)
    if name == "gru":
        return _cadence(CadenceSettings(), blocks.Sizes(10_010, 10_006, 4), 16)
    if name == "gru-mn":
        own: Any = {"embedding": 64, "hidden": [200, 150, 100], "attention": [100, 75, 50], "context": 50}
        return _cadence(CadenceSettings(model="gru-mn", gru_mn=own), blocks.Sizes(3010, 3006, 4), 12, again)
    raise ValueError(f"no family {name!r}")
