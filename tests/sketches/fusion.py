"""Camera and event stream fused: class, box and event losses, each summed over its own items; some samples have no box."""

import torch
from torch import nn

from trainerd.engine.task import Task


class FusionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 32))
        self.events = nn.GRU(3, 32, batch_first=True)
        self.heads = nn.ModuleDict({"class": nn.Linear(64, 4), "box": nn.Linear(64, 4), "event": nn.Linear(64, 2)})

    def forward(self, image, events):
        states, last = self.events(events)
        fused = torch.cat([self.image(image), last[0]], -1)
        per_event = torch.cat([self.image(image).unsqueeze(1).expand(-1, events.shape[1], -1), states], -1)
        return self.heads["class"](fused), self.heads["box"](fused), self.heads["event"](per_event)


class FusionSketch(Task):
    def model(self):
        return FusionNet()

    def dataset(self, split):
        random = torch.Generator().manual_seed(1 + (split == "eval"))
        kinds = torch.randint(4, (48,), generator=random)
        images = torch.randn(48, 1, 8, 8, generator=random) * 0.1 + kinds.view(-1, 1, 1, 1)
        events = torch.randn(48, 6, 3, generator=random)
        boxes = torch.stack([kinds / 4, kinds / 8, kinds / 4 + 0.2, kinds / 8 + 0.2], -1).float()
        return [(images[i], events[i], kinds[i], boxes[i], i % 3 != 0, (events[i, :, 0] > 0).long()) for i in range(48)]

    def counts(self, batch):
        return {"class": len(batch[2]), "box": int(batch[4].sum()), "event": batch[5].numel()}

    def loss(self, model, batch, ctx):
        image, events, kind, box, has_box, polarity = batch
        kinds, boxes, polarities = model(image, events)
        entropy = nn.functional.cross_entropy
        losses = {
            "class": (entropy(kinds, kind, reduction="sum"), 1.0),
            "box": (nn.functional.smooth_l1_loss(boxes[has_box], box[has_box], reduction="sum"), 5.0),
            "event": (entropy(polarities.flatten(0, 1), polarity.flatten(), reduction="sum"), 0.5),
        }
        return losses, {"accuracy": (kinds.argmax(-1) == kind).float().mean()}
