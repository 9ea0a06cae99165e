"""LoRA on a frozen denoiser, over latents that prepare() encodes once; noise and time of a sample come from its id."""

import numpy as np
import torch
from torch import nn

from trainerd.engine.task import Task


class LoraConv(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Conv2d(base.in_channels, rank, 1, bias=False), nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class DiffusionSketch(Task):
    def prepare(self, ctx):
        """The encoder is needed here only: it takes no memory while training."""
        random = torch.Generator().manual_seed(ctx.seed)
        encoder = nn.AvgPool2d(4)
        images = torch.rand(40, 3, 1, 1, generator=random) + torch.randn(40, 3, 32, 32, generator=random) * 0.1
        np.save(ctx.cache_dir / "latents.npy", encoder(images).numpy())
        ctx.report_data(40, 40, {})

    def model(self):
        base = [nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)]
        return nn.Sequential(LoraConv(base[0]), nn.SiLU(), LoraConv(base[1]))

    def dataset(self, split):
        latents = np.load(self.ctx.cache_dir / "latents.npy", mmap_mode="r")
        return latents[:8] if split == "eval" else latents[8:]

    def collate(self, samples):
        return torch.from_numpy(np.stack(samples))

    def counts(self, batch):
        return {"noise": batch.numel()}

    def loss(self, model, latents, ctx):
        draws = [torch.randn((4, 8, 8), generator=ctx.generator(i)) for i in ctx.sample_ids]
        drawn = torch.stack(draws).to(latents.device)
        noise, time = drawn[:, :3], drawn[:, 3:, :1, :1].sigmoid()
        noisy = (1 - time) * latents + time * noise
        predicted = model(torch.cat([noisy, time.expand(-1, 1, 8, 8)], 1))
        return {"noise": (nn.functional.mse_loss(predicted, noise - latents, reduction="sum"), 1.0)}, {}
