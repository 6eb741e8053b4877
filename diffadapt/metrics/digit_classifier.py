"""The embedded classifier of digits: the digit that an image shows, and features to compare images by."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffadapt.assets import embedded

NAME = "embedded:digits"  # in the names of figures


class DigitClassifier(nn.Module):
    """Four 3x3 convolutions, two of them with stride 2, a mean over places, and one linear layer.

    Args:
        channels: of the four convolutions.
        side: height and width of its images, in pixels.
        classes: number of classes.
    """

    def __init__(
        self, channels: tuple[int, int, int, int] = (16, 32, 64, 64), side: int = 16, classes: int = 10
    ):
        super().__init__()
        self.config = {"channels": list(channels), "side": side, "classes": classes}
        self.side = side
        layers: list[nn.Module] = []
        for before, after, stride in zip((3, *channels), channels, (1, 2, 2, 1), strict=False):
            convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """(B, 3, side, side) in [0, 1] -> `pool` (B, channels[-1]) features, `logits` (B, classes)."""
        pool = self.convolutions(pixels * 2 - 1).mean(dim=(2, 3))  # (B, channels[-1]), of pixels in [-1, 1]
        return {"pool": pool, "logits": self.head(pool)}


def load_digit_classifier(folder: str | Path | None = None) -> DigitClassifier:
    """The classifier of a folder (config.json, model.safetensors), frozen, in float32; default: embedded."""
    folder = Path(folder) if folder is not None else embedded("digit-classifier")
    classifier = DigitClassifier(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    classifier.load_state_dict(load_file(folder / "model.safetensors"))
    return classifier.float().requires_grad_(False).eval()


@torch.no_grad()
def class_agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of images, from 0 to 1, whose largest logit is that of their label.

    Args:
        logits: (N, classes).
        labels: (N,).
    """
    return float((logits.argmax(dim=1) == labels).double().mean())
