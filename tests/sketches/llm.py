"""A language model with a 4-bit base from a file and LoRA on top: the base is in no checkpoint, only its sha256 is."""

import bitsandbytes as bnb
import torch
from torch import nn

from trainerd.engine.task import Task


class LoraLinear(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.down = base, nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


class TinyLlm(nn.Module):
    def __init__(self, weights, dtype):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(weights["embed"], freeze=True)
        self.layers = nn.ModuleList()
        for weight in weights["layers"]:
            base = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
            base.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            self.layers.append(LoraLinear(base))

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + torch.nn.functional.gelu(layer(x.cumsum(1) / torch.arange(1, x.shape[1] + 1).view(-1, 1)))
        return x @ self.embed.weight.T


class LlmSketch(Task):
    tokens = "next"
    frozen_source = "base.pt, made by prepare()"

    def prepare(self, ctx):
        random = torch.Generator().manual_seed(7)
        layers = [torch.randn(64, 64, generator=random) / 8 for _ in range(2)]
        torch.save({"embed": torch.randn(50, 64, generator=random), "layers": layers}, ctx.cache_dir / "base.pt")

    def model(self):
        return TinyLlm(torch.load(self.ctx.cache_dir / "base.pt", weights_only=True), self.ctx.dtype)

    def dataset(self, split):
        return [(torch.arange(9) * step + start) % 50 for start in range(12) for step in (1, 2, 3)]

    def counts(self, batch):
        return {"next": batch[:, 1:].numel()}

    def loss(self, model, batch, ctx):
        logits = model(batch[:, :-1])
        return {"next": (nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"), 1.0)}, {}
