"""What an extractor is: images in, one feature vector per layer out, with a name that says which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from diffadapt.evaluation.record import ExtractorSummary
from diffadapt.metrics.resize import resize

DTYPE = "float32"  # of networks and of stored features


@dataclass(frozen=True)
class Extractor:
    """A frozen network with its preprocessing.

    Attributes:
        name: "inception", "clip:NAME", "embedded:digits", "package.module:Class", ...
        sha256: of its weights.
        side: the pixels its network wants.
        preset: of the resize (`diffadapt.metrics.resize`).
        layers: what one forward gives, each (B, D) float32.
        features: the layer of distances and neighbours; None where there is none.
        logits: the layer of class scores for the Inception Score; None where there are none.
        network: (B, 3, side, side) float32 in [0, 255] -> layer -> (B, D).
        texts: captions -> (N, D) in the space of `features`; None without a text encoder.
        text_length: tokens that the text encoder reads.
        count_tokens: texts -> tokens of each, before anything is cut off.
        roles: further roles of `metrics.feature_set.ROLES` -> the layer that serves them; a layer that is
            not in `layers` is made only when asked for.
        smoke: random weights; nothing made with them is a score.
    """

    name: str
    sha256: str
    side: int
    preset: str
    layers: tuple[str, ...]
    features: str | None
    network: Callable[[Tensor], dict[str, Tensor]]
    logits: str | None = None
    perceptual: str | None = None  # the layer in which squared distances are LPIPS
    texts: Callable[[Sequence[str]], Tensor] | None = None
    text_length: int | None = None
    count_tokens: Callable[[Sequence[str]], list[int]] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    smoke: bool = False

    def layer_of(self, role: str) -> str | None:
        """The layer that serves a role; cosines take the features where no layer of length 1 is made."""
        own = {"features": self.features, "logits": self.logits, "pixels": self.perceptual}
        if role == "unit":
            return self.roles.get("unit", self.features)
        return own[role] if role in own else self.roles.get(role)

    def serving(self, roles: Sequence[str]) -> Extractor:
        """Itself with the layers that serve these roles."""
        wanted = [self.roles[role] for role in roles if role in self.roles]
        return replace(self, layers=tuple(dict.fromkeys([*self.layers, *wanted])))

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 3, side, side) float32 in [0, 255]."""
        return resize(images, self.side, self.preset)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Prepared images -> layer -> (B, D) float32 on the CPU."""
        features = self.network(pixels)
        return {layer: features[layer].float().cpu() for layer in self.layers}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> layer -> (B, D) float32."""
        return self.forward(self.prepare(images))

    @property
    def summary(self) -> ExtractorSummary:
        return ExtractorSummary(
            self.name, self.sha256, self.preset, self.side, self.layers, DTYPE, smoke=self.smoke
        )


def frozen(network: nn.Module, device: str | torch.device) -> nn.Module:
    return network.requires_grad_(False).eval().to(device)


def standardise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[0, 255] to zero mean and unit deviation per channel; mean and std as of values in [0, 1]."""
    shape = (1, 3, 1, 1)
    shift, scale = (pixels.new_tensor(values).view(shape) * 255 for values in (mean, std))
    return (pixels - shift) / scale
