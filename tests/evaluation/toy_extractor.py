"""A small extractor of one's own, `toy_extractor:Toy`, that counts what goes through it."""

import torch
from torch import nn


class Toy(nn.Module):
    """Two fixed random maps of an 8 x 8 image: features and class scores."""

    side = 8
    features = "wide"
    logits = "scores"
    images_seen = 0

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.wide = nn.Parameter(torch.randn(3 * 64, 16, generator=generator) / 100)
        self.scores = nn.Parameter(torch.randn(16, 5, generator=generator))

    def forward(self, pixels):
        type(self).images_seen += len(pixels)
        wide = (pixels.flatten(1) / 255) @ self.wide
        return {"wide": wide, "scores": wide @ self.scores}


class Broken(Toy):
    """Its features of dark images are NaN."""

    def forward(self, pixels):
        found = super().forward(pixels)
        dark = pixels.mean(dim=(1, 2, 3)) < 10
        return {**found, "wide": found["wide"].masked_fill(dark[:, None], float("nan"))}


class Shapeless(Toy):
    """Keeps no contract: gives one number per batch."""

    def forward(self, pixels):
        return {"wide": pixels.mean(), "scores": pixels.mean()}
